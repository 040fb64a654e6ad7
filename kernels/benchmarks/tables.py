"""Writes tables into the docs from docs/measurements/*/: python kernels/benchmarks/tables.py

A page has a table between <!-- NAME --> and <!-- /NAME -->. kernels: of kernels.json. step: of step-*.json, which
launch/benchmark.py --keep writes. gpu: the step alone, of alone*.json, and gpu-categories: where its time goes, of
trace*.json, which launch/gpu_check.py writes.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NONE = "No kernel has been timed on a GPU yet."
NO_STEP = "No step has been timed yet."
NO_GPU = "Nothing has been timed on a GPU yet."
WAYS = {"eager": "", "compiled": "-compiled"}  # of running the step alone, and how the names of their files end
FILES = ("alone", "trace")
OURS = ("ours", "definition", "definition (index_select)", "compiled")


def keep(result: dict[str, Any], path: Path) -> None:
    """Writes a file of measurements, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def kernel_table(result: dict[str, Any]) -> str:
    """One device: a line for each operation at each shape."""
    lines = [
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}: milliseconds, medians; shares are of "
        f"a copy of as many bytes, which reads and writes up to {result['copy_gigabytes_per_second']:,.0f} GB/s.",
        "",
        "| operation | shape | ours | of a copy | definition | compiled | best peer |",
        "|---|---|---|---|---|---|---|",
    ]
    places = dict.fromkeys((row["op"], row["shape"]) for row in result["rows"])
    for op, shape in places:
        rows = {row["provider"]: row for row in result["rows"] if (row["op"], row["shape"]) == (op, shape)}
        times = {provider: row["milliseconds"]["median"] for provider, row in rows.items()}
        definition = next((times[name] for name in OURS[1:3] if name in times), None)
        peers = {provider: time for provider, time in times.items() if provider not in OURS}
        best = min(peers, key=peers.__getitem__) if peers else None
        lines.append(
            f"| {op} | {shape} | {_text(times.get('ours'))} | {_percent(rows.get('ours'))} "
            f"| {_text(definition)} | {_text(times.get('compiled'))} | "
            f"{f'{peers[best]:.3f} ({best})' if best else ''} |"
        )
    return "\n".join(lines)


def step_table(results: list[dict[str, Any]]) -> str:
    """One device: for each config the baseline's step and ours, like for like and on all context."""
    machine = results[0]["machine"]
    gpu = machine.get("gpu")
    device = gpu or f"{machine['cpu']}, {machine['cores']} cores"
    columns = ["config, images a step", "step", "context tokens an image", "GFLOP an image", "images/s", "speed-up"]
    columns += ["TFLOP/s", "of matmul", *(["MFU", "state + step, GiB"] if gpu else [])]
    lines = [
        f"{device}: medians (quartiles) of steps in turns in one process; "
        "shares are of the best matrix product of the same run.",
        "",
        _line(columns),
        _line(["---"] * len(columns)),
    ]
    for result in sorted(results, key=lambda result: result["steps"][0]["gflop_per_step"] / result["batch"]):
        name = f"{result['config']}, {result['batch']}; {result['precision']}, torch {result['machine']['torch']}"
        if not gpu:
            name += f", {result['machine']['threads']} threads"
        for row in result["steps"]:
            speedup = row["speedup"]
            cells = [
                name if row is result["steps"][0] else "",
                row["name"],
                f"{row['context_tokens_per_image']:.0f}",
                _number(row["gflop_per_step"] / result["batch"]),
                f"{row['images_per_second']['median']:,.1f}",
                f"{speedup['median']:.2f} ({speedup['low']:.2f}-{speedup['high']:.2f})",
                _number(row["gflop_per_second"]["median"] / 1000),
                f"{100 * row['share_of_matmul']:.0f}%",
            ]
            if gpu:
                cells.append(f"{100 * row['mfu']:.1f}%" if "mfu" in row else "peak unknown")
                cells.append(f"{row['state_bytes'] / 2**30:.1f} + {row['step_bytes'] / 2**30:.1f}")
            lines.append(_line(cells))
    return "\n".join(lines)


def gpu_table(folder: dict[str, dict[str, Any]]) -> str:
    """One device: the step alone, beside what arithmetic expected of it. folder: its files by name."""
    runs = {way: folder[f"alone{end}"] for way, end in WAYS.items() if f"alone{end}" in folder}
    machine = next(iter(runs.values()))["machine"]
    said = f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}"
    if "device" in folder:
        device = folder["device"]
        said += (
            f": {device['matrix_flop_per_second'] / 1e12:,.0f} TFLOP/s sustained in large matrix products, a copy "
            f"reads and writes {device['copy_bytes_per_second'] / 1e9:,.0f} GB/s"
        )
    columns = ["step", "images", "images/s", "ms", "ms by arithmetic", "of the sustained rate", "memory, GiB"]
    lines = [f"{said}.", "", _line(columns), _line(["---"] * len(columns))]
    for way, run in runs.items():
        share, expected = run["share_of_sustained"], run["estimate"].get("milliseconds")
        cells = [f"{run['model']}, {way}", str(run["batch"]), f"{run['images_per_second']['median']:,.0f}"]
        cells += [f"{1e3 * run['step_seconds']['median']:,.1f}", "" if expected is None else f"{expected:,.1f}"]
        cells += ["" if share is None else f"{100 * share:.0f}%", f"{run['peak_memory_bytes'] / 2**30:.1f}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def category_table(folder: dict[str, dict[str, Any]]) -> str:
    """One device: milliseconds of the step alone by category, from traces, and what was achieved in each."""
    runs = {way: folder[f"trace{end}"] for way, end in WAYS.items() if f"trace{end}" in folder}
    of = {way: {row["name"]: row["milliseconds"] for row in run["categories"]} for way, run in runs.items()}
    columns = ["of a step", *(f"{way}, ms" for way in runs), *(f"{way}, achieved" for way in runs)]
    machine = next(iter(runs.values()))["machine"]
    lines = [f"{machine.get('gpu') or machine['cpu']}:", "", _line(columns), _line(["---"] * len(columns))]
    for name in dict.fromkeys(name for times in of.values() for name in times):
        cells = [name, *(f"{of[way][name]:,.1f}" if name in of[way] else "" for way in runs)]
        lines.append(_line([*cells, *(_achieved(run["achieved"].get(name, {})) for run in runs.values())]))
    return "\n".join(lines)


def _achieved(rate: dict[str, float]) -> str:
    if "tflop_per_second" in rate:
        return f"{rate['tflop_per_second']:,.0f} TFLOP/s"
    return f"{rate['gigabytes_per_second']:,.0f} GB/s" if rate else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['share_of_copy']:.0f}%"


def _text(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3f}"


def write(page: Path, measurements: Path) -> None:
    """Replaces whichever of the tables the page has."""
    devices = [_files(path) for path in sorted(measurements.glob("*/")) if path.is_dir()]
    kernels = [folder["kernels"] for folder in devices if "kernels" in folder]
    steps = [[one for name, one in folder.items() if name.startswith("step-")] for folder in devices]
    alone, traced = ([one for one in devices if any(f"{what}{end}" in one for end in WAYS.values())] for what in FILES)
    text = page.read_text()
    for mark, tables in (
        ("kernels", [kernel_table(result) for result in kernels] or [NONE]),
        ("step", [step_table(results) for results in steps if results] or [NO_STEP]),
        ("gpu", [gpu_table(folder) for folder in alone] or [NO_GPU]),
        ("gpu-categories", [category_table(folder) for folder in traced] or [NO_GPU]),
    ):
        pattern = rf"(?<=<!-- {mark} -->\n).*(?=\n<!-- /{mark} -->)"
        text = re.sub(pattern, lambda _, tables=tables: "\n\n".join(tables), text, flags=re.DOTALL)
    page.write_text(text)


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured on one device, by the files' names; not those of parts that failed."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: one for name, one in found.items() if "error" not in one}


if __name__ == "__main__":
    for page in ("README.md", "docs/kernels.md", "docs/speed.md"):
        write(ROOT / page, ROOT / "docs" / "measurements")
    sys.exit(0)
