"""What a benchmark found -> tables on the terminal; and where it is written to."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ijepa_scale.benchmark import timing

MEMORY = ("state_bytes", "step_bytes")


def writable(path: Path | None, *, keep: bool) -> list[Path]:
    """The files that results go to, less those that keep brings about. keep: they go to docs/measurements, too.

    Raises ValueError where results could not be written once all is timed.
    """
    if keep and not timing.MEASUREMENTS.is_dir():
        raise ValueError(f"--keep writes to a checkout, and there is no {timing.MEASUREMENTS}; use --json FILE")
    if path is None:
        return []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json {path} cannot be written: it is a folder, or in one that is read-only")
    return [path]


def show_steps(found: dict[str, Any]) -> None:
    """Print what benchmark() of benchmark/step.py found."""
    console, gpu = _console(), "gpu" in found["machine"]
    unit, giga = units(found)
    rates = {what.removeprefix("matmul "): _spread(rate, ".0f", giga) for what, rate in found["matmuls"].items()}
    listed = "; ".join(f"{what}: {rate}" for what, rate in rates.items())
    console.print(steps_table(found))
    console.print(f"Matrix products, {unit}FLOP/s, the best of which the shares are of: {listed}.")
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


def units(found: dict[str, Any]) -> tuple[str, float]:
    """What counts are in: (letter, how many billions it is): billions on a CPU, trillions on a GPU."""
    return ("T", 1000.0) if "gpu" in found["machine"] else ("G", 1.0)


def steps_table(found: dict[str, Any]) -> Table:
    """A column for each way of training, a row for each number."""
    machine, gpu = found["machine"], "gpu" in found["machine"]
    unit, giga = units(found)
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
    return table


def show_data(found: dict[str, Any]) -> None:
    """Print what benchmark_data() of benchmark/data.py found."""
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


def show_profile(found: dict[str, Any]) -> None:
    """Print what benchmark/profiling.py found: what a step's time goes to, its costliest operations, and its gaps."""
    console, gaps, of = _console(), found["gaps"], found["of"]
    table = Table("", title=f"{found['run']}: what a step's time goes to")
    for column in ("ms a step", "of the step", "calls a step"):
        table.add_column(column, justify="right")
    for row in found["categories"]:
        table.add_row(row["name"], f"{row['milliseconds']:,.2f}", f"{100 * row['share']:.1f}%", f"{row['calls']:,.0f}")
    console.print(table)
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


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, emoji=False, markup=False)


def _spread(value: dict[str, float], form: str, unit: float = 1.0) -> str:
    low, median, high = (value[key] / unit for key in ("low", "median", "high"))
    return f"{median:{form}} ({low:{form}}-{high:{form}})"
