"""What a comparison shows: results.json, a table on the terminal and in results.md, a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ijepa_scale.compare.curves import Curve, reached_by_all, read_off, shortest_run, spread, times_more
from ijepa_scale.compare.probing import Scores, probe_names, read_probes
from ijepa_scale.compare.runs import SPENT, Plan, Training, spent
from ijepa_scale.config import to_dict, without_secrets
from ijepa_scale.data.files import write_whole
from ijepa_scale.visualize.comparison import Line, draw_comparison

if TYPE_CHECKING:
    from rich.table import Table

ALONG = ("images", "seconds", "model_flops")  # what recipes are compared at equal amounts of
COSTS = {"seconds": "training seconds", "model_flops": "model FLOPs"}
FLOP_UNITS = {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9}
KINDS = {"images": "equal images", "seconds": "equal seconds", "flops": "equal FLOPs"}

Rows = list[list[str]]  # a heading, and rows of as many words


def curves_of(plan: Plan, asked: dict[str, Any], initial: dict[int, Scores]) -> list[Curve]:
    """Of all finished and probed runs. asked: as of probing.read_probes(). initial: scores to begin with, by seed.

    To each is added, for each probe, the mean over the labels, under the probe's own name.
    """
    curves = []
    for equal in plan.config.equal:
        runs = plan.runs(equal)
        for recipe in plan.recipes:
            of_recipe = [training for training in runs if training.recipe is recipe]
            if of_recipe:
                curves.append(_curve(of_recipe, asked, initial, probe_names(plan.config)))
    return curves


def _curve(runs: list[Training], asked: dict[str, Any], initial: dict[int, Scores], probes: list[str]) -> Curve:
    totals = np.stack([spent(training) for training in runs])  # (S, P, len(SPENT))
    found = [{0: initial[one.seed]} | read_probes(one.folder / "probes.jsonl", asked) for one in runs]
    # There may be more, of a comparison with more probes.
    asked_for = [[of_seed[step] for step in (0, *one.probed)] for one, of_seed in zip(runs, found, strict=True)]
    scores = {
        name: np.array([[of_step[name]["value"] for of_step in of_seed] for of_seed in asked_for])
        for name in initial[runs[0].seed]
    }
    for probe in probes:
        scores[probe] = np.mean([scores[f"{probe} {label}"] for label in asked["labels"]], axis=0)
    by_name = {name: totals[:, :, column] for column, name in enumerate(SPENT)}
    return Curve(recipe=runs[0].recipe.name, equal=runs[0].equal, spent=by_name, scores=scores)


def equal_rows(curves: Sequence[Curve], labels: list[str], probes: list[str]) -> list[dict[str, Any]]:
    """Of each recipe at the most images, seconds and FLOPs that all have reached: what it had spent, and its scores."""
    names = [f"{probe} {label}" for probe in probes for label in labels]
    rows = []
    for along in ALONG:
        amount = reached_by_all(curves, along)
        for recipe in dict.fromkeys(curve.recipe for curve in curves):
            of_recipe = [curve for curve in curves if curve.recipe == recipe]
            curve = shortest_run(of_recipe, along, amount)
            values = {name: read_off(curve, along, amount, curve.scores[name]) for name in names}
            rows.append(
                {
                    "equal": along,
                    "amount": amount,
                    "recipe": recipe,
                    "of_run": KINDS[curve.equal],
                    **{name: float(read_off(curve, along, amount, curve.spent[name]).mean()) for name in SPENT},
                    "scores": {name: {"mean": float(v.mean()), "std": spread(v)} for name, v in values.items()},
                }
            )
    return rows


def times_rows(curves: Sequence[Curve], probes: list[str]) -> list[dict[str, Any]]:
    """For each two recipes: how many times as much one needs for the other's accuracy, by probe and by cost."""
    recipes = list(dict.fromkeys(curve.recipe for curve in curves))
    of = {recipe: [curve for curve in curves if curve.recipe == recipe] for recipe in recipes}
    return [
        {
            "recipe": ours,
            "for_the_accuracy_of": theirs,
            "probe": probe,
            "of": along,
            **asdict(found),
            "words": found.words,
        }
        for ours in recipes
        for theirs in recipes
        if ours != theirs
        for probe in probes
        for along in COSTS
        for found in [times_more(of[ours], of[theirs], probe, along)]
    ]


def tables(
    plan: Plan, equal: list[dict[str, Any]], times: list[dict[str, Any]], initial: dict[int, Scores]
) -> list[tuple[str, Rows]]:
    """(title, rows) of the table of scores, and of that of times."""
    names, several = list(equal[0]["scores"]), len(plan.config.seeds) > 1
    unit, flops = flop_unit(max(row["model_flops"] for row in equal))
    head = ["at", "recipe", "images", "seconds", unit, *names]
    scores = {name: np.array([of_seed[name]["value"] for of_seed in initial.values()]) for name in names}
    start = [_score(float(values.mean()), spread(values), several) for values in scores.values()]
    rows = [head, ["the start", "all", "0", "0", "0", *start]]
    for row in equal:
        scale, what = {"model_flops": (flops, unit)}.get(row["equal"], (1.0, row["equal"]))
        costs = [f"{row['images']:,.0f}", _short(row["seconds"]), _short(row["model_flops"] / flops)]
        found = [_score(score["mean"], score["std"], several) for score in row["scores"].values()]
        rows.append([f"{_short(row['amount'] / scale)} {what}", row["recipe"], *costs, *found])
    seeds = f"{len(plan.config.seeds)} seed{'s' * several}"
    title = f"Top-1 accuracy (%) of frozen features, {seeds}{', ± one standard deviation' * several}"
    pairs = [(row["recipe"], row["for_the_accuracy_of"]) for row in times]
    columns = list(dict.fromkeys((row["probe"], row["of"]) for row in times))
    words = {(row["recipe"], row["for_the_accuracy_of"], row["probe"], row["of"]): row["words"] for row in times}
    of = {"seconds": "seconds", "model_flops": "FLOPs"}
    table = [["recipe", "for the accuracy of", *(f"{probe}, {of[along]}" for probe, along in columns)]]
    table += [[*pair, *(words[(*pair, *column)] for column in columns)] for pair in dict.fromkeys(pairs)]
    return [(title, rows), ("How many times as much it takes, of means over labels and seeds", table)]


def flop_unit(largest: float) -> tuple[str, float]:
    """The unit in which FLOPs up to the largest are read best, and how many FLOPs it is."""
    return next(((name, size) for name, size in FLOP_UNITS.items() if largest >= size), ("GFLOP", 1e9))


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _score(mean: float, std: float, several: bool) -> str:
    return f"{mean:.1f} ± {std:.1f}" if several else f"{mean:.1f}"


def markdown(parts: Sequence[tuple[str, Rows]]) -> str:
    """The tables as Markdown."""
    text = []
    for title, (head, *rows) in parts:
        lines = [head, ["---"] * len(head), *rows]
        text.append(f"{title}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(text)


def terminal_table(title: str, rows: Rows) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, heading in enumerate(rows[0]):
        table.add_column(Text(heading), justify="left" if place < 2 else "right")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def write_results(
    plan: Plan, curves: Sequence[Curve], initial: dict[int, Scores], labels: list[str]
) -> list[tuple[str, Rows]]:
    """results.json, results.md and results.png in the comparison's folder; the tables, to be shown."""
    probes = probe_names(plan.config)
    equal, times = equal_rows(curves, labels, probes), times_rows(curves, probes)
    parts = tables(plan, equal, times, initial)
    facts = {
        "config": asdict(plan.config),
        "ranks": plan.ranks,
        # of the first run: versions, revision, device
        "environment": json.loads((plan.runs("images")[0].folder / "environment.json").read_text()),
        "recipes": {r.name: {"flops_an_image": r.flops, "config": to_dict(r.config)} for r in plan.recipes},
        "initial": initial,
        "curves": [_plain(curve, plan.config.seeds) for curve in curves],
        "equal": equal,
        "times": times,
    }
    write_whole(plan.out / "results.json", json.dumps(without_secrets(facts), indent=1, allow_nan=False) + "\n")
    write_whole(plan.out / "results.md", markdown(parts))
    _draw(plan.out / "results.png", plan, curves, probes)
    return parts


def _plain(curve: Curve, seeds: Sequence[int]) -> dict[str, Any]:
    spent, scores = ({name: of.tolist() for name, of in part.items()} for part in (curve.spent, curve.scores))
    return {"recipe": curve.recipe, "equal": curve.equal, "seeds": list(seeds), "spent": spent, "scores": scores}


def _draw(path: Path, plan: Plan, curves: Sequence[Curve], probes: list[str]) -> None:
    unit, flops = flop_unit(max(float(curve.ends("model_flops").max()) for curve in curves))
    scale = {"seconds": 1.0, "model_flops": flops}
    rows = []
    for probe in probes:
        lines = []
        for curve in curves:
            scores = curve.scores[probe]
            lines.append(
                Line(
                    name=curve.recipe,
                    kind=KINDS[curve.equal],
                    spent=[curve.spent[along].mean(axis=0) / scale[along] for along in COSTS],
                    scores=scores.mean(axis=0),
                    spreads=np.array([spread(column) for column in scores.T]),
                )
            )
        rows.append((probe, lines))
    several = len(plan.config.seeds) > 1
    title = f"{plan.out.name}: accuracy of frozen features, mean over the labels{' and ' * several}" + (
        f"{len(plan.config.seeds)} seeds (± one standard deviation)" if several else ""
    )
    draw_comparison(path, title, [COSTS["seconds"], f"{COSTS['model_flops']} ({unit})"], rows)
