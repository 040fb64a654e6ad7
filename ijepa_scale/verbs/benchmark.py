"""Time the training step on this machine's GPU or CPU against a dense baseline, or the input pipeline; no launcher.

python launch/benchmark.py --config configs/tiny.yaml
python launch/benchmark.py --config configs/vits16.yaml optimization.micro_batch_size=32 --steps 5 --json vits16.json
python launch/benchmark.py --config configs/vith14.yaml --keep --profile traces/vith14
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

# As launch/pretrain.py does: memory and time are to be training's.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

MEMORY = ("state_bytes", "step_bytes")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--config", help="a YAML file of configs/: time its training step against a dense baseline")
    subject.add_argument(
        "--data", metavar="SOURCE", help="time reading and cropping a source's images (as data.source, not scenes)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config values over the file's")
    parser.add_argument("--steps", type=int, default=10, help="rounds timed, after warm-up (default 10)")
    parser.add_argument("--size", type=int, default=224, help="of --data: pixels a side of a crop (default 224)")
    parser.add_argument("--split", default="train", help="of --data (default train)")
    parser.add_argument("--column", default="", help="of --data: as data.column")
    parser.add_argument("--data-config", default="", metavar="NAME", help="of --data: as data.config")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="of --data: loader processes (default: cores, up to 8)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="of --config: write them to docs/measurements/DEVICE/step-CONFIG.json, for docs/speed.md",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="of --config: then trace a few steps there and show what they spend time on",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's own log is between our lines
    try:
        if options.steps < 1:
            raise ValueError(f"--steps must be 1 or more, got {options.steps}")
        written = [options.json] if options.json else []
        if options.json:
            make_room(options.json)
        found = time_data(options) if options.data is not None else time_steps(options)
        if options.keep:
            from ijepa_scale.benchmark.timing import measurements

            written.append(measurements(found["machine"]) / f"step-{found['config']}.json")
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.data is not None:
        show_data(found)
    else:
        show(found)
    if "profile" in found:
        show_profile(found["profile"])
    for path in written:
        print(f"written: {os.path.relpath(path)}")
    if "no_profile" in found:
        print(f"error: no profile: {found['no_profile']}", file=sys.stderr)
        return 2
    return 0


def make_room(path: Path) -> None:
    """Raises ValueError where results could not be written once all is timed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json {path} cannot be written: it is a folder, or in one that is read-only")


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    from ijepa_scale.benchmark.step import benchmark
    from ijepa_scale.config import load_config

    config = load_config(options.config, options.overrides)
    found = benchmark(config, steps=options.steps, say=_say, profile=options.profile)
    return {"config": Path(options.config).stem, "overrides": options.overrides, **found}


def time_data(options: argparse.Namespace) -> dict[str, Any]:
    from ijepa_scale.benchmark.data import benchmark_data

    if options.keep or options.profile:
        raise ValueError("--keep and --profile go with --config")
    if options.overrides:
        raise ValueError(f"--data takes no config values, got {options.overrides[0]!r}; use --size, --split, --workers")
    if options.size < 1:
        raise ValueError(f"--size must be 1 or more, got {options.size}")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers must be 0 or more, got {options.workers}")
    workers = min(8, os.cpu_count() or 1) if options.workers is None else options.workers
    return benchmark_data(
        options.data,
        size=options.size,
        rounds=options.steps,
        workers=workers,
        split=options.split,
        say=_say,
        column=options.column,
        config=options.data_config,
    )


def show_data(found: dict[str, Any]) -> None:
    from rich.table import Table

    machine, ours = found["machine"], found["pipelines"][0]
    width, height = found["median_width_height"]
    console = _console()
    size = found["size"]
    console.print(
        f"{found['source']}: {found['images']} images of {found['mean_bytes'] / 1e3:.0f} kB, "
        f"{width:.0f} x {height:.0f} pixels -> {size} x {size}\n"
        f"{machine['cpu']}, {machine['cores']} cores; one thread, CPU time, median (quartiles) of {found['rounds']} "
        "rounds in turns"
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


def show(found: dict[str, Any]) -> None:
    from rich.table import Table

    machine, rates, gpu = found["machine"], found["matmuls"], "gpu" in found["machine"]
    unit, giga = ("T", 1000.0) if gpu else ("G", 1.0)
    where = (
        f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}; {found['operations']}"
        if gpu
        else f"{machine['cpu']}, {machine['cores']} cores, threads used: {machine['threads']}, torch {machine['torch']}"
    )
    table = Table(
        "",
        title=f"{found['config']}, {found['batch']} images a step, {found['precision']}, ZeRO-{found['zero_stage']}, "
        f"attention: {found['attention']}, activation checkpointing {found['activation_checkpointing']}\n"
        f"median (quartiles) of {found['rounds']} rounds in turns; {where}",
    )
    rows = found["steps"]
    for row in rows:
        table.add_column(row["name"], justify="right")

    def line(what: str, text: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(what, *map(text, rows))

    line("context tokens/image", lambda row: f"{row['context_tokens_per_image']:.1f}")
    line(f"{unit}FLOP a step", lambda row: f"{row['gflop_per_step'] / giga:,.2f}")
    line("images/s", lambda row: _spread(row["images_per_second"], ",.1f"))
    line("speed-up", lambda row: _spread(row["speedup"], ".2f"))
    if not gpu:
        line("speed-up in CPU time", lambda row: _spread(row["cpu_speedup"], ".2f"))
    line("tokens/s", lambda row: f"{row['tokens_per_second']['median']:,.0f}")
    line(f"{unit}FLOP/s", lambda row: _spread(row["gflop_per_second"], ",.1f", giga))
    line("of matmul", lambda row: f"{100 * row['share_of_matmul']:.0f}%")
    if gpu:
        line("MFU", lambda row: f"{100 * row['mfu']:.1f}%" if "mfu" in row else "peak unknown")
        line("memory: state + step, GiB", lambda row: " + ".join(f"{row[k] / 2**30:.1f}" for k in MEMORY))
    console = _console()
    console.print(table)
    console.print(
        f"Matrix products, {unit}FLOP/s, the best of which the shares are of: "
        + "; ".join(f"{what.removeprefix('matmul ')}: {_spread(rate, '.0f', giga)}" for what, rate in rates.items())
        + "."
    )
    console.print(
        "FLOP are those each step needs: no padding, no recomputation. With all context a step does more work on the "
        "same images. Timed without loss.variance and loss.covariance."
    )
    if not gpu:
        console.print("These are CPU numbers: they say nothing about GPUs.")
        return
    console.print(
        "MFU is of the device's published dense peak. Memory: what a model holds between its steps (weights, optimizer "
        "state, EMA) + the most that a step takes on top. Both models are there, ijepa-scale's once for both columns."
    )
    if found["batch"] != found["batch_asked"]:
        console.print(f"{found['batch_asked']} images did not fit beside both models: all runs had {found['batch']}.")
    if found["allocator_retries"]:
        console.print(
            f"The memory was nearly full and was given back and fetched anew {found['allocator_retries']} times, which "
            "takes time: lower optimization.micro_batch_size."
        )


def show_profile(found: dict[str, Any]) -> None:
    from rich.table import Table

    console, gaps, of = _console(), found["gaps"], found["of"]
    table = Table(
        title=f"{found['run']}: a step takes {found['step_milliseconds']:,.1f} ms under the profiler; costliest {of}"
    )
    table.add_column(of[:-1], no_wrap=True, max_width=console.width - 45)
    for column in ("ms a step", "of the step", "calls a step"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for row in found["costliest"]:
        table.add_row(row["name"], f"{row['milliseconds']:,.2f}", f"{100 * row['share']:.1f}%", f"{row['calls']:,.0f}")
    console.print(table)
    table = Table(
        title=f"No {of[:-1]} runs for {gaps['milliseconds']:,.1f} ms of a step ({100 * gaps['share']:.1f}%), in "
        f"{gaps['count']:,.0f} gaps; the largest"
    )
    table.add_column("ms", justify="right", no_wrap=True, min_width=6)
    for column in ("after", "before"):
        table.add_column(column, no_wrap=True, max_width=(console.width - 17) // 2)
    for row in gaps["largest"]:
        table.add_row(f"{row['milliseconds']:,.3f}", row["before"], row["after"])
    console.print(table)
    print(f"trace, for https://ui.perfetto.dev: {found['trace']}")


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, emoji=False, markup=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _spread(value: dict[str, float], form: str, unit: float = 1.0) -> str:
    low, median, high = (value[key] / unit for key in ("low", "median", "high"))
    return f"{median:{form}} ({low:{form}}-{high:{form}})"
