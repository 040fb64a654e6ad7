"""Time the training step, or the input pipeline, on this machine's CPU: one process, no launcher.

python launch/benchmark.py --config configs/tiny.yaml
python launch/benchmark.py --config configs/vits16.yaml optimization.micro_batch_size=32 --steps 5 --json vits16.json
python launch/benchmark.py --data /data/my_images --size 224    # from stored images to crops, images/s per core

Exit codes: 0 done, 2 wrong input.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--config", help="a YAML file of configs/: time its training step against a dense baseline")
    subject.add_argument(
        "--data", metavar="SOURCE", help="time reading and cropping a source's images (as data.source)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config values over the file's")
    parser.add_argument("--steps", type=int, default=10, help="rounds timed, after warm-up (default 10)")
    parser.add_argument("--size", type=int, default=224, help="of --data: pixels a side of a crop (default 224)")
    parser.add_argument("--split", default="train", help="of --data (default train)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="of --data: loader processes (default: cores, up to 8)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        if options.steps < 1:
            raise ValueError(f"--steps must be 1 or more, got {options.steps}")
        if options.data:
            found = time_data(options, say)
        else:
            from ijepa_scale.benchmark import benchmark
            from ijepa_scale.config import load_config

            found = benchmark(load_config(options.config, options.overrides), steps=options.steps, say=say)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.data:
        show_data(found)
    else:
        show(Path(options.config).stem, found)
    return 0


def time_data(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    from ijepa_scale.benchmark_data import benchmark_data

    if options.overrides:
        raise ValueError(f"--data takes no config values, got {options.overrides[0]!r}; use --size, --split, --workers")
    if options.size < 1:
        raise ValueError(f"--size must be 1 or more, got {options.size}")
    workers = min(8, os.cpu_count() or 1) if options.workers is None else options.workers
    return benchmark_data(
        options.data, size=options.size, rounds=options.steps, workers=workers, split=options.split, say=say
    )


def show_data(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine, ours = found["machine"], found["pipelines"][0]
    width, height = found["median_width_height"]
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, emoji=False)
    size = found["size"]
    console.print(
        f"{found['source']}: {found['images']} images of {found['mean_bytes'] / 1e3:.0f} kB, "
        f"{width:.0f} x {height:.0f} pixels -> {size} x {size}\n"
        f"{machine['cpu']}, {machine['cores']} cores; one thread, CPU time, median (quartiles) of {found['rounds']} "
        "rounds in turns",
        markup=False,
    )
    table = Table()
    table.add_column("pipeline")
    table.add_column("images/s per core", justify="right")
    table.add_column("of the limit", justify="right")
    for row in found["pipelines"]:
        name = row["name"] + (" (the limit)" if row["name"] == found["limit"] else "")
        share = {key: 100 * value for key, value in row["of_limit"].items()}
        table.add_row(name, _spread(row["images_per_second"], ".0f"), _spread(share, ".0f") + " %")
    console.print(table)
    rate = ours["images_per_second"]["median"]
    console.print(f"Training at 1,000 images/s keeps {1000 / rate:.1f} such cores busy with it.")
    if found["loader"]:
        loader = found["loader"]
        console.print(
            f"The whole loader, {loader['workers']} worker(s): {loader['images_per_second']:.0f} images/s elapsed."
        )
    if found["left_out"]:
        count = found["left_out"]
        console.print(f"Left out {'is 1 image' if count == 1 else f'are {count} images'} that not every decoder reads.")


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
