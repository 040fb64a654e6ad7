"""Writes README.md's table of kernels from docs/measurements/*/kernels.json: python kernels/benchmarks/tables.py"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NONE = "No kernel has been timed on a GPU yet."
OURS = ("ours", "definition", "definition (index_select)", "compiled")


def table(result: dict[str, Any]) -> str:
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


def _percent(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['share_of_copy']:.0f}%"


def _text(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3f}"


def write(readme: Path, measurements: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted(measurements.glob("*/kernels.json"))]
    text = "\n\n".join(map(table, results)) or NONE
    found = re.sub(
        r"(?<=<!-- kernels -->\n).*(?=\n<!-- /kernels -->)", lambda _: text, readme.read_text(), flags=re.DOTALL
    )
    readme.write_text(found)


if __name__ == "__main__":
    write(ROOT / "README.md", ROOT / "docs" / "measurements")
    sys.exit(0)
