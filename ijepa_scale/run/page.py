"""A run as one HTML file to read and to show: RUN/report.html. And several runs beside one another.

history.py reads the folder, visualize/page.py writes the HTML; here is what is said.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ijepa_scale.config.redaction import redacted
from ijepa_scale.data.files import write_whole
from ijepa_scale.evals.scores import Score
from ijepa_scale.run import numbers
from ijepa_scale.run.evaluations import evaluation_blocks
from ijepa_scale.run.history import History, panels_of, read_history, read_json
from ijepa_scale.run.verdict import health_verdict
from ijepa_scale.visualize.page import (
    PNG,
    Block,
    Charts,
    Command,
    Details,
    Figures,
    Frame,
    Pictures,
    Section,
    Table,
    Words,
    panel_charts,
    render_page,
)
from ijepa_scale.visualize.panels import draw_panels, scores_svg

PAGE = "report.html"
SECTIONS = ("masks", "features", "neighbours", "predictions", "sketches")  # of RUN/pictures, in this order
SECONDS_NOTE = "Seconds are those of training steps: checkpoints, health checks and the report come on top."


def write_page(path: str | Path, out: str | Path | None = None, *, axis: str = "steps") -> Path:
    """Write the page of a run, whole or not at all; returns where. out: RUN/report.html where it is not given."""
    history = read_history(path)
    out = Path(out or history.path / PAGE)
    out.parent.mkdir(parents=True, exist_ok=True)
    name = history.path.resolve().name
    scores = scores_of(history)
    pictures, left_out = pictures_of(history.path)
    evaluated, unread = evaluation_blocks(history.path, verb("evaluate"))
    left_out += unread
    sections = [
        Section("Summary", [Figures(key_figures(history, scores)), Table("What was trained", [], trained_on(history))]),
        Section("Go on", [Command(commands(history))]),
        Section("Health of the features", health_blocks(history) if trains_encoder(history) else []),
        Section("Curves", [panel_charts(group, found) for group, found in panels_of([history], axis).items()]),
        Section("Probes", probe_blocks(history, scores) + evaluated if trains_encoder(history) else []),
        *(Section(title.capitalize(), blocks) for title, blocks in pictures.items()),
        Section("Environment", environment_blocks(history) + [Words(f"Left out: {words}") for words in left_out]),
    ]
    lead = f"{numbers.method(history)} on {numbers.source(history)}: {numbers.state(history)}."
    write_whole(out, render_page(name, lead, [section for section in sections if section.blocks]))
    return out


def write_comparison(paths: Sequence[str | Path], out: str | Path, *, axis: str = "steps") -> Path:
    """Write several runs beside one another: a PNG of their curves where out ends so, else a page."""
    histories = [read_history(path) for path in paths]
    names = [history.path.resolve().name for history in histories]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    groups = panels_of(histories, axis)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        draw_panels(out, [panel for found in groups.values() for panel in found], names)
        return out
    rows = [[name, *numbers.row(history)] for name, history in zip(names, histories, strict=True)]
    differing = [[key, *values] for key, values in numbers.differences(histories)]
    about = [Table("Loss: mean of the last steps. ±: one standard error, where there is one", numbers.HEAD, rows)]
    sections = [
        Section("Runs", about),
        Section("What differs", [Table("Keys of the configs that are not the same", ["key", *names], differing)]),
        Section("Curves", [panel_charts(group, found) for group, found in groups.items()]),
    ]
    lead = f"{len(names)} runs, along {axis}. {SECONDS_NOTE if axis == 'seconds' else ''}".strip()
    kept = [section for section in sections if section.blocks and (section.title != "What differs" or differing)]
    write_whole(out, render_page("Runs beside one another", lead, kept, names))
    return out


def trains_encoder(history: History) -> bool:
    return history.config.get("objective", {}).get("name") != "sketch"


def scores_of(history: History) -> list[Score]:
    names = [field.name for field in fields(Score)]
    try:
        return [Score(**{name: row[name] for name in names}) for row in history.report.get("scores", [])]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{history.path / 'report.json'} holds no scores as a run writes them: {error!r}") from error


def key_figures(history: History, scores: Sequence[Score]) -> list[tuple[str, str, str]]:
    rows = [("Steps", numbers.steps(history), "finished" if history.finished else "not finished")]
    if history.health:
        rows.append(("Features", verdict(history).partition(":")[0], "the last health check; see below"))
    for score in scores[:4]:
        value = f"{score.trained:.1f} ± {score.trained_error:.1f}%"
        note = f"before training {score.initial:.1f} ± {score.initial_error:.1f}%, chance {score.chance:.1f}%"
        rows.append((score.probe, value, note))
    if history.steps:
        rows.append(("Throughput", *numbers.throughput(history)))
        rows.append(
            ("Training time", numbers.duration(numbers.seconds(history)), f"in steps alone{numbers.recorded(history)}")
        )
    return rows


def trained_on(history: History) -> list[list[str]]:
    rows = [
        ["objective", numbers.method(history)],
        ["encoder", numbers.encoder(history)],
        ["images", numbers.images(history)],
        ["batch", numbers.batch(history)],
        ["images seen", f"{history.images_seen:,}" if history.images_seen else ""],
        ["loss", numbers.loss(history)],
        ["arithmetic", numbers.flops(history)],
        ["most memory", numbers.memory(history)],
        ["steps skipped", f"{history.skipped:,}, as loss or gradients were not finite" if history.skipped else ""],
        ["images not read", f"{history.bad_images:,}" if history.bad_images else ""],
        ["last record", f"{history.last_record:%Y-%m-%d %H:%M} UTC"],
    ]
    return [row for row in rows if row[1]]


def in_checkout() -> bool:
    """Whether this process was called from one; else it is installed."""
    return Path(sys.argv[0]).parent.name == "launch"


def verb(name: str) -> str:
    """The words by which a verb is called, as this process was."""
    return f"python launch/{name}.py" if in_checkout() else f"ijepa-scale {name}"


def commands(history: History) -> str:
    """What to type next."""
    run = shlex.quote(str(history.path))
    ranks = history.environment.get("world_size", 1)
    start = verb("pretrain")
    if ranks != 1:
        nodes = history.environment.get("nodes", 1)  # which older runs do not say
        launched = "launch/pretrain.py" if in_checkout() else "--module ijepa_scale.verbs.command pretrain"
        several = f"--nnodes {nodes} --node-rank N --master-addr FIRST_NODE " if nodes > 1 else ""
        start = f"torchrun {several}--nproc-per-node {ranks // nodes} {launched}"
    moved = "" if history.config.get("run_dir") == str(history.path) else f" run_dir={run}"
    source = history.config.get("data", {}).get("source")
    data = shlex.quote(source) if isinstance(source, str) and source else "LABELLED_IMAGES"
    again = "the run is finished: this makes its report again" if history.finished else "go on from the last checkpoint"
    of_encoder = {
        "score the encoder": f"{verb('evaluate')} knn --checkpoint {run} --data {data}",
        "features of your images": f"{verb('embed')} {run} IMAGES --out embeddings",
        "weights for timm": f"{verb('export')} {run} --format timm --out {shlex.quote(str(history.path) + '_timm')}",
    }
    listed = {
        again: f"{start} --config {shlex.quote(str(history.path / 'config.yaml'))}{moved}",
        **(of_encoder if trains_encoder(history) else {}),
        "this page again": f"{verb('report')} {run}",
    }
    return redacted("\n\n".join(f"# {what}\n{command}" for what, command in listed.items()))


def verdict(history: History, count: int | None = None) -> str:
    """What was said at the last of the first so many health checks."""
    return health_verdict(history.health[:count], objective=history.objective)


def health_blocks(history: History) -> list[Block]:
    """The last verdict, and a table of the checks at which the verdict changed."""
    if not history.health:
        return [Words("No health check is recorded; logging.health_every_steps sets how often there is one.")]
    rows, before = [], ""
    for count, record in enumerate(history.health, start=1):
        said = verdict(history, count)
        word = said.partition(":")[0]
        if word != before or count == len(history.health):
            values = [numbers.plain(record.get(key)) for key in ("rankme", "feature_std", "drift")]
            rows.append([f"{record['step']:,}", word, numbers.knn(record), *values])
        before = word
    head = ["step", "verdict", "k-NN, %", "rank", "feature std", "drift"]
    caption = "Health checks at which the verdict changed, and the last. ±: one standard error, where it is recorded"
    return [Words(f"{verdict(history)}."), Table(caption, head, rows)]


def probe_blocks(history: History, scores: Sequence[Score]) -> list[Block]:
    report = history.report
    if not scores:
        note = report.get("note", "they are made at the end of the run")
        return [Words(f"No probes: {note}.")]
    rows = []
    for one in scores:
        pairs = ((one.initial, one.initial_error), (one.trained, one.trained_error))
        change = f"{one.difference:+.1f} ± {one.difference_error:.1f}"
        values = [f"{one.chance:.1f}", *(f"{a:.1f} ± {b:.1f}" for a, b in pairs), change, one.verdict]
        rows.append([one.probe, f"{one.num_test:,}", *values])
    head = ["probe", "test images", "chance, %", "initial, %", "trained, %", "difference, points", "verdict"]
    caption = (
        f"Top-1 accuracy of frozen features at step {report.get('step', '?')}, {report.get('train_images', '?')} "
        f"images to fit on, seed {report.get('seed', '?')}. ±: one standard error; of differences at most so much, as "
        "both are of the same test images"
    )
    blocks: list[Block] = [
        Table(caption, head, rows),
        Charts("Before and after training", [("top-1 accuracy (%), ± one standard error", scores_svg(scores))]),
    ]
    words = [f"Initial: {report['initial']}."] if report.get("initial") else []
    words += [f"Not probed: {name}: {reason}." for name, reason in report.get("not_probed", {}).items()]
    if report.get("held_out") is False:
        words.append("There is no validation split: the test images were among the training images.")
    if not history.finished:
        words.append("The run has trained on since then.")
    return blocks + [Words(text) for text in words]


def environment_blocks(history: History) -> list[Block]:
    said = history.environment
    facts = {
        "device": said.get("device"),
        "processes": said.get("world_size"),
        "precision": said.get("precision"),
        "attention": said.get("attention"),
        "git revision": said.get("git_revision"),
        "python": said.get("python"),
        **said.get("packages", {}),
    }
    rows = [[name, str(value)] for name, value in facts.items() if value not in (None, "")]
    blocks: list[Block] = [Table("What it ran on", [], rows)] if rows else []
    if said.get("command"):
        blocks.append(Details("The command it was started with", shlex.join(said["command"])))
    if history.config:
        text = yaml.safe_dump(history.config, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
        blocks.append(Details("The config, with every key", text))
    return blocks


def pictures_of(path: Path) -> tuple[dict[str, list[Block]], list[str]]:
    """By section, masks.png and what lies in RUN/pictures with a NAME.json beside it; and why others are left out.

    NAME.json: {"title", "caption", "alt", "section", "step"}; step may be null. One title at several steps is a slider.
    """
    found: dict[str, dict[str, list[Frame]]] = {section: {} for section in SECTIONS}
    left_out = []
    masks = path / "masks.png"
    if masks.is_file() and (wrong := _no_png(masks)):
        left_out.append(f"{masks.name}: {wrong}")
    elif masks.is_file():
        caption = "What the encoder sees of the first images, and the patches that are predicted."
        alt = "Rows of images: whole, with the hidden patches grey, with the blocks to predict coloured, and both."
        found["masks"]["Context and targets"] = [Frame(path=masks, caption=caption, alt=alt)]
    for picture in sorted((path / "pictures").glob("*.png")):
        sidecar = picture.with_suffix(".json")
        try:
            said = read_json(sidecar)
            if not said:
                raise ValueError(f"{sidecar.name} is not there")
            words: dict[str, Any] = {key: str(said[key]) for key in ("caption", "alt")}
            frames = found[said["section"]].setdefault(str(said["title"]), [])
            step = said.get("step")
            if wrong := _no_png(picture):
                raise ValueError(wrong)
            frames.append(Frame(path=picture, step=None if step is None else int(step), **words))
        except (ValueError, KeyError, TypeError) as error:
            left_out.append(f"{picture.name}: {error!r}" if isinstance(error, KeyError) else f"{picture.name}: {error}")
    blocks: dict[str, list[Block]] = {}
    for section, titles in found.items():
        ordered = {title: sorted(frames, key=_place) for title, frames in titles.items()}
        if ordered:
            blocks[section] = [Pictures(title, frames) for title, frames in ordered.items() if frames]
    return blocks, left_out


def _no_png(path: Path) -> str:
    """What is wrong with a file that should be one, written to its end; "" where nothing is."""
    content = path.read_bytes()
    if not content.startswith(PNG):
        return "it is no PNG"
    return "" if content[-8:-4] == b"IEND" else "it is half a PNG"


def _place(frame: Frame) -> tuple[bool, int]:
    """Among those of a title: by step, then what has none."""
    return frame.step is None, frame.step or 0
