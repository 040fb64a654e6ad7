"""Writes tables into the docs from docs/measurements/*/: python kernels/benchmarks/tables.py

Between <!-- kernels --> and <!-- /kernels --> of docs/kernels.md that of kernels.json, between <!-- step --> and
<!-- /step --> of docs/speed.md that of step-*.json, which launch/benchmark.py --keep writes.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NONE = "No kernel has been timed on a GPU yet."
NO_STEP = "No step has been timed yet."
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
    kernels = [json.loads(path.read_text()) for path in sorted(measurements.glob("*/kernels.json"))]
    devices: dict[Path, list[dict[str, Any]]] = {}
    for path in sorted(measurements.glob("*/step-*.json")):
        devices.setdefault(path.parent, []).append(json.loads(path.read_text()))
    text = page.read_text()
    for mark, tables in (
        ("kernels", [kernel_table(result) for result in kernels] or [NONE]),
        ("step", [step_table(results) for results in devices.values()] or [NO_STEP]),
    ):
        pattern = rf"(?<=<!-- {mark} -->\n).*(?=\n<!-- /{mark} -->)"
        text = re.sub(pattern, lambda _, tables=tables: "\n\n".join(tables), text, flags=re.DOTALL)
    page.write_text(text)


if __name__ == "__main__":
    for name in ("kernels.md", "speed.md"):
        write(ROOT / "docs" / name, ROOT / "docs" / "measurements")
    sys.exit(0)
