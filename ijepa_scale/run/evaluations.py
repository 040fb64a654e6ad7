"""What `evaluate` has found of a run's checkpoints, read again for its page: RUN/evaluations/*/results.json."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from ijepa_scale.run.history import read_json
from ijepa_scale.visualize.page import Block, Details, Table

CAPTION = (
    "What evaluate has found: the result of each task (results.json has other measures, too). ±: one standard error, "
    "of the choice of test images alone. Chance: what answering without looking gets"
)
HEAD = ["task", "step", "score", "chance", "protocol", "fitted on", "judged by"]


class Row(NamedTuple):
    """One task's result: of which images, task and step it is, cells as in HEAD, and what it was made by."""

    order: tuple[str, str, int]
    cells: list[str]
    made_by: str


def evaluation_blocks(path: Path, command: str) -> tuple[list[Block], list[str]]:
    """A table of the results of all tasks, with their commands; and why some files are left out.

    path: of the run. command: the words by which evaluate is called.
    """
    rows: list[Row] = []
    left_out = []
    for file in sorted((path / "evaluations").glob("*/results.json")):
        try:
            results = read_json(file)
            rows += [_row(name, task, results, command) for name, task in results["tasks"].items()]
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            left_out.append(f"{file.relative_to(path)}: no results as evaluate writes them: {error!r}")
    if not rows:
        return [], left_out
    rows.sort(key=lambda row: row.order)
    made_by = "\n\n".join(f"# {row.order[1]}, step {row.order[2]:,}\n{row.made_by}" for row in rows)
    return [
        Table(CAPTION, HEAD, [row.cells for row in rows]),
        Details("Commands and settings of these", made_by),
    ], left_out


def _row(name: str, task: dict[str, Any], results: dict[str, Any], command: str) -> Row:
    best = next(measure for measure in task["measures"] if measure["chosen"])
    step, settings, digits = int(results["step"]), task["settings"], 1 if best["unit"] == "%" else 3
    unit = "%" if best["unit"] == "%" else f" {best['unit']}"
    label = f", {results['label']}" if results.get("label") else ""
    protocol = [best["name"], *(["features computed once"] if settings.get("features") else [])]
    protocol += [f"{results['network']} encoder"] if results["network"] != "target" else []
    fitted = [f"{results['data']}{label}"]
    if "train_images" in task:
        fitted.append(f"{task['train_images']:,} images")
    elif results.get("train_images"):  # that were asked for
        fitted.append(f"up to {results['train_images']:,} images")
    cells = [
        name,
        f"{step:,}",
        f"{best['value']:.{digits}f} ± {best['error']:.{digits}f}{unit}",
        "" if best["chance"] is None else f"{best['chance']:.{digits}f}{unit}",
        ", ".join(protocol),
        ", ".join(fitted),
        f"{results['test_data']}, {best['count']:,} images",
    ]
    made_by = [f"{command} {shlex.join(task['arguments'])}"] if task.get("arguments") else []
    made_by.append("settings: " + " ".join(f"{key}={value}" for key, value in settings.items()))
    return Row((f"{results['test_data']}{label}", name, step), cells, "\n".join(made_by))
