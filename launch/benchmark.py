"""Time the training step on this machine's CPU against a dense baseline, one process, no launcher.

python launch/benchmark.py --config configs/tiny.yaml
python launch/benchmark.py --config configs/vits16.yaml optimization.micro_batch_size=32 --steps 5 --json vits16.json

Exit codes: 0 done, 2 wrong input.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config values over the file's")
    parser.add_argument("--steps", type=int, default=10, help="rounds timed, after four of warm-up (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    from ijepa_scale.benchmark import benchmark
    from ijepa_scale.config import load_config

    try:
        if options.steps < 1:
            raise ValueError(f"--steps must be 1 or more, got {options.steps}")
        config = load_config(options.config, options.overrides)
        found = benchmark(config, steps=options.steps, say=lambda text: print(text, file=sys.stderr, flush=True))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(Path(options.config).stem, found)
    return 0


def show(name: str, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = found["machine"]
    table = Table(
        title=f"{name}, {found['batch']} images a step, fp32, median (quartiles) of {found['rounds']} rounds in turns\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"
    )
    for column in ("step", "images/s", "tokens/s", "GFLOP a step", "GFLOP/s", "of matmul", "speed-up", "in CPU time"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in found["steps"]:
        table.add_row(
            row["name"],
            _spread(row["images_per_second"], ".1f"),
            f"{row['tokens_per_second']['median']:,.0f}",
            f"{row['gflop_per_step']:.1f}",
            _spread(row["gflop_per_second"], ".1f"),
            f"{100 * row['share_of_matmul']:.0f}%",
            _spread(row["speedup"], ".2f"),
            _spread(row["cpu_speedup"], ".2f"),
        )
    for matmul, rate in found["matmuls"].items():
        table.add_row(matmul, "", "", "", _spread(rate, ".1f"), "", "", "")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(
        "GFLOP are those each step needs: no padding, no recomputation. With all context a step does more work on the "
        "same images. Timed without loss.variance and loss.covariance. These are CPU numbers: they say nothing about "
        "GPUs."
    )


def _spread(value: dict[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['low']:{form}}-{value['high']:{form}})"


if __name__ == "__main__":
    sys.exit(main())
