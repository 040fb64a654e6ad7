"""The numbers of evaluations as a table, and as JSON that grows by a task at a time."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijepa_scale.data.files import write_whole
from ijepa_scale.evals.evaluation import Measure, Outcome

if TYPE_CHECKING:
    from rich.console import Group

RESULTS = "results.json"


def results_table(task: str, measures: list[Measure], words: str) -> "Group":
    """The measures of a task, the result marked; print it with Console.print. words: of what they are, in a line."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("measure")
    for heading in ("value", "±", "chance", "images"):
        table.add_column(heading, justify="right")
    for measure in measures:
        digits = 1 if measure.unit == "%" else 3
        unit = "%" if measure.unit == "%" else f" {measure.unit}"
        chance = "" if measure.chance is None else f"{measure.chance:.{digits}f}"
        name = Text(f"{measure.name}{' *' if measure.chosen and len(measures) > 1 else ''}")
        value, error = f"{measure.value:.{digits}f}{unit}", f"{measure.error:.{digits}f}"
        style = "bold" if measure.chosen and len(measures) > 1 else None
        table.add_row(name, value, error, chance, f"{measure.count:,}", style=style)
    note = "± one standard error, of the choice of test images alone" + "; *: the result" * (len(measures) > 1)
    # Not the table's own title and caption, which are wrapped to its width.
    return Group(Text(f"{task}: {words}"), table, Text(note, style="italic"))


def read_results(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What a folder of results holds already; without one, the facts alone.

    facts: what the results are of. Raises ValueError where they are of something else: two networks' never mix.
    """
    path = out / RESULTS
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {**facts, "tasks": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        tasks = dict(results.pop("tasks"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of results: {error}; remove it, or give another --out") from error
    said = json.loads(json.dumps(facts))
    said.pop("checkpoint", None)  # a folder may be moved: sha256 tells networks apart
    if differing := [key for key, value in said.items() if results.get(key) != value]:
        key = differing[0]
        raise ValueError(
            f"{path} is of another evaluation: its {key} is {results.get(key)!r}, not {facts[key]!r}; give another "
            "--out, or remove it"
        )
    return {**facts, "tasks": tasks}


def write_results(out: Path, facts: dict[str, Any], task: str, settings: Any, outcome: Outcome, seconds: float) -> None:
    """Put a task's outcome beside those of others, in place of an earlier one of its own.

    {**facts, "tasks": {task: {result, seconds, settings, measures: [{name, value, error, ...}], ...}}}.
    """
    results = read_results(out, facts)
    results["tasks"][task] = {
        "result": next((measure.value for measure in outcome.measures if measure.chosen), None),
        "seconds": round(seconds, 1),
        "settings": asdict(settings),
        "measures": [asdict(measure) for measure in outcome.measures],
        **outcome.facts,
    }
    write_whole(out / RESULTS, json.dumps(results, indent=2, allow_nan=False) + "\n")
