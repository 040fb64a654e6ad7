"""An evaluation, top to bottom: an encoder and two splits of images -> tasks -> tables, results.json and pictures."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ijepa_scale.build import scenes
from ijepa_scale.config import over, ranges
from ijepa_scale.config.redaction import redacted
from ijepa_scale.data.files import cache_path
from ijepa_scale.data.images import ImageSet
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.evals.evaluation import Evaluation, Outcome
from ijepa_scale.evals.labels import open_splits, some_of
from ijepa_scale.evals.results import RESULTS, read_results, results_table, write_results
from ijepa_scale.evals.tasks import TASKS, askable, settled
from ijepa_scale.exchange.load import Loaded, load
from ijepa_scale.exchange.weights import digest
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.run.progress import watched
from ijepa_scale.run.records import log_evaluation
from ijepa_scale.visualize.accuracies import draw_accuracies, draw_confusions

LEAST_CLASSES = 3  # from which on a picture of confusions tells more than the accuracy


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: the arguments of the verb, which says what each means (verbs/evaluate.py).

    arguments: the same as they were typed, where they were, for results.json to say.
    """

    task: str
    overrides: list[str] = field(default_factory=list)
    checkpoint: str
    network: str = "target"
    data: str
    test_data: str = ""
    split: str = "train"
    test_split: str = ""
    train_images: int = 0  # at most so many, evenly over the classes; 0: all
    test_images: int = 0
    label: str = ""
    features: bool = False
    out: str = ""
    image_size: int = 0
    batch_size: int = 64
    workers: int = 2
    seed: int = 0
    cache_dir: str = ""
    column: str = ""
    config: str = ""
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if min(self.train_images, self.test_images) < 0:
            raise ValueError(
                "--train-images and --test-images must be 0 (all) or more, got "
                f"{self.train_images} and {self.test_images}"
            )
        most = {"batch_size": ranges.BATCH, "workers": ranges.PROCESSES, "image_size": ranges.PIXELS, "seed": 2**63 - 1}
        for key, limit in most.items():
            if getattr(self, key) > limit:
                raise ValueError(f"--{key.replace('_', '-')} must be {limit:,} or less, got {getattr(self, key)}")
        if self.batch_size < 1 or min(self.workers, self.image_size, self.seed) < 0:
            raise ValueError(
                "--batch-size must be 1 or more, --workers, --image-size and --seed 0 or more, got "
                f"{self.batch_size}, {self.workers}, {self.image_size} and {self.seed}"
            )


@dataclass(frozen=True)
class Asked:
    """A task that is to be run, with all that it takes."""

    name: str
    evaluation: Evaluation
    settings: Any
    run: Callable[[Evaluation, Any], Outcome]


def evaluate_tasks(ranks: Ranks, request: Request) -> None:
    """Run a task, or all that the images' columns allow. All ranks call it.

    Raises ValueError for what a user can get wrong, before the first task begins where that can be seen.
    """
    say = Console(emoji=False, markup=False, highlight=False, soft_wrap=True, quiet=not ranks.first).print
    loaded = ranks.together(lambda: load(request.checkpoint, request.network))
    for note in loaded.notes:
        say(note)
    # Of the network itself: a checkpoint's own digest is of all its networks.
    sha256 = ranks.from_first(digest(loaded.network) if ranks.first else "")
    loaded = replace(loaded, sha256=sha256, image_size=_image_size(request, loaded))
    train, test = ranks.together(lambda: _open(request, loaded, say), on="node")
    folder = Path(request.out) if request.out else _usual_folder(request, loaded, train, test)
    facts = ranks.together(lambda: _facts(request, loaded, train, test) if ranks.first else {})
    ranks.together(lambda: read_results(folder, facts) if ranks.first else None)
    tasks = _asked(ranks, request, loaded, train, test, folder, say)
    say(f"{loaded.path}, the {loaded.name} encoder, on {train.name} and {test.name}")
    for asked in tasks:
        started = time.perf_counter()
        outcome = asked.run(asked.evaluation, asked.settings)
        seconds = time.perf_counter() - started
        if ranks.first:
            if request.arguments:
                outcome = replace(outcome, facts={**outcome.facts, "arguments": redacted(request.arguments)})
            write_results(folder, facts, asked.name, asked.settings, outcome, seconds)
            _show(folder, asked, outcome, seconds)
            try:
                log_evaluation(loaded.path, asked.name, {measure.name: measure.value for measure in outcome.measures})
            except (ValueError, OSError) as error:  # the results are there, and other tasks wait
                say(f"warning: {asked.name} is not in the run's wandb: {error}")
    say(f"results: {folder / RESULTS}")
    if folder.parent.name == "evaluations" and ((run := folder.parents[1]) / "checkpoints").is_dir():
        say(f"on the page of the run: python launch/report.py {run} (or ijepa-scale report)")


def check_request(request: Request) -> None:
    """ValueError for settings that are wrong whatever is evaluated: before an encoder or images are opened."""
    names = list(TASKS) if request.task == "all" else [request.task]
    _check_overrides(request, names)
    for name in names:
        refused = []
        for usual in TASKS[name].usual:
            try:
                over(usual, _overrides(request, name, usual))
            except ValueError as error:
                refused.append(error)
        if len(refused) == len(TASKS[name].usual):
            raise refused[0]


def _image_size(request: Request, loaded: Loaded) -> int:
    """Pixels a side that images are given to the network at. ValueError for what is no multiple of its patch."""
    encoder: Any = loaded.network
    size = request.image_size or loaded.image_size
    PatchGrid.of_image(size, size, encoder.patch_embed.patch_size)  # which refuses it, here before it is encoded
    return size


def _open(request: Request, loaded: Loaded, say: Callable[[str], None]) -> tuple[ImageSet, ImageSet]:
    train, test = (
        scenes(request.cache_dir, image_size=loaded.image_size) if source == "scenes" else source
        for source in (request.data, request.test_data)
    )
    reading: dict[str, Any] = {"cache_dir": request.cache_dir or None}
    reading |= {"column": request.column, "config": request.config}
    return open_splits(train, test, request.split, request.test_split, say=say, **reading)


def _usual_folder(request: Request, loaded: Loaded, train: ImageSet, test: ImageSet) -> Path:
    """One for each checkpoint, network, label and choice of images: in the run that it is of, or where one is."""
    of_run = loaded.path.is_dir() and loaded.path.parent.name == "checkpoints"
    run = loaded.path.parents[1] if of_run else Path()
    words = [train.name.rpartition(":")[0], request.label, loaded.path.stem]
    words += ["context"] * (request.network == "context")
    words += [f"on-{test.name.replace(':', '-')}"] * bool(request.test_data or request.test_split)
    if request.train_images or request.test_images:
        words.append(f"{request.train_images or 'all'}+{request.test_images or 'all'}-images")
    return run / "evaluations" / "-".join(filter(None, words))


def _facts(request: Request, loaded: Loaded, train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """What results are of."""
    return {
        "checkpoint": str(loaded.path.absolute()),
        "network": request.network,
        "step": loaded.step,
        "sha256": loaded.sha256,
        "image_size": loaded.image_size,
        "data": train.name,
        "test_data": test.name,
        "images_sha256": [images.digest for images in (train, test)],
        "label": request.label,
        "seed": request.seed,
        # as before there were such: only where they are given
        **({"train_images": request.train_images} if request.train_images else {}),
        **({"test_images": request.test_images} if request.test_images else {}),
    }


def _asked(
    ranks: Ranks,
    request: Request,
    loaded: Loaded,
    train: ImageSet,
    test: ImageSet,
    folder: Path,
    say: Callable[[str], None],
) -> list[Asked]:
    """The tasks with their images and settings. ValueError for one that cannot be, and for wrong settings."""
    names = [request.task]
    if request.task == "all":
        names, reasons = askable(train, test, request.label)
        for reason in dict.fromkeys(reasons.values()):
            say(f"left out: {', '.join(name for name in reasons if reasons[name] == reason)}: {reason}")
        if not names:
            raise ValueError(f"{train.name} allows no task: give --label COLUMN")
    encoder: Any = loaded.network.to(ranks.device)
    asked = []
    for name in names:
        of_all = request.task == "all"
        label = "" if of_all and TASKS[name].column else request.label
        of_train, of_test, run = settled(name, train, test, label)
        evaluation = Evaluation(
            encoder=encoder,
            sha256=loaded.sha256,
            image_size=loaded.image_size,
            train=some_of(of_train, request.train_images, request.seed),
            test=some_of(of_test, request.test_images, request.seed),
            ranks=ranks,
            seed=request.seed,
            batch_size=request.batch_size,
            workers=request.workers,
            keep=cache_path(request.cache_dir or "~/.cache/ijepa-scale") / "features",
            out=folder,
            watch=watched if ranks.first else lambda _, batches: batches,
        )
        defaults = TASKS[name].defaults(evaluation)
        settings = over(defaults, _overrides(request, name, defaults))
        try:
            ranks.together(functools.partial(TASKS[name].check, evaluation, settings))
        except ValueError as error:
            if not of_all:
                raise
            say(f"left out: {name}: {error}")
        else:
            asked.append(Asked(name, evaluation, settings, run))
    _check_overrides(request, names)
    return asked


def _overrides(request: Request, name: str, defaults: Any) -> list[str]:
    """The words that are of a task: with "all" those that begin with its name."""
    has_features = any(item.name == "features" for item in fields(defaults))
    if request.features and not has_features and request.task != "all":
        raise ValueError(f"--features is of linear, count, distance and attentive, not of {name}; leave it out")
    start = f"{name}." if request.task == "all" else ""
    words = [word.removeprefix(start) for word in request.overrides if word.startswith(start)]
    return words + ["features=true"] * (request.features and has_features)


def _check_overrides(request: Request, names: list[str]) -> None:
    for word in request.overrides if request.task == "all" else ():
        if word.partition(".")[0] not in names:
            raise ValueError(f"{word!r} is of no task: with all give TASK.key=value, of {', '.join(names)}")


def _show(folder: Path, asked: Asked, outcome: Outcome, seconds: float) -> None:
    """A table on the terminal, and pictures."""
    test, measures = asked.evaluation.test, outcome.measures
    words = f"{len(asked.evaluation.train):,} images to fit on, {len(test):,} to judge by, {seconds:.0f} s"
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = 120  # a log file has no width; the names of heads do not fit into 80
    console.print(results_table(asked.name, measures, words))
    chance = measures[0].chance
    for key, along in (("k", "nearest neighbours asked, k"), ("images", "labelled images")):
        series: dict[str, list[tuple[float, float, float]]] = {}
        for measure in measures:
            if key in measure.settings:
                of = measure.name.rpartition(", ")[2] if key == "images" else measure.name.partition(",")[0]
                series.setdefault(of, []).append((measure.settings[key], measure.value, measure.error))
        if any(len(points) > 1 for points in series.values()):
            draw_accuracies(folder / f"{asked.name}.png", f"{asked.name} on {test.images.name}", along, series, chance)
    if outcome.predicted is not None and outcome.labels is not None and len(test.names) >= LEAST_CLASSES:
        title = f"{asked.name} on {test.images.name}, {next(m.value for m in measures if m.chosen):.1f}% right"
        draw_confusions(folder / f"{asked.name}-confusions.png", title, outcome.labels, outcome.predicted, test.names)
