"""Things timed in turns, on an idle device, and what is said of the machine they ran on."""

import gc
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

MEASUREMENTS = Path(__file__).resolve().parents[2] / "docs" / "measurements"
WARM_UP = 4  # rounds; each round has masks of its own, as each step of a run

T = TypeVar("T")
Say = Callable[[str], None]


class GpuMoment:
    """A moment on the GPU's clock: when it has done what it was given so far. later - earlier: seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "GpuMoment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def moment(device: torch.device) -> Any:
    """Now, by the device's clock; the difference of two is in seconds."""
    return GpuMoment() if device.type == "cuda" else time.perf_counter()


@dataclass
class Timed:
    """Something run in turns with the others. run: one step, or products of each shape, by the round's number."""

    name: str
    run: Callable[[int], None]
    flops: list[float]  # of one run, by round
    tokens: list[int] = field(default_factory=list)  # context, target and predictor tokens of one run, by round
    context: float = 0.0  # context tokens an image
    state: int = 0  # bytes that it holds on a GPU between its runs
    wall: list[float] = field(default_factory=list)  # seconds, by round
    cpu: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # the most bytes on a GPU above those at its start, by round

    def once(self, index: int, *, keep: bool, device: torch.device) -> None:
        """From an idle device to an idle device."""
        before = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        wall, cpu = time.perf_counter(), time.process_time()
        self.run(index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if keep:
            self.wall.append(wall)
            self.cpu.append(cpu)
            if device.type == "cuda":
                self.memory.append(torch.cuda.max_memory_allocated(device) - before)

    def gflops(self) -> list[float]:
        """GFLOP/s, by round."""
        return [self.flops[i % len(self.flops)] / seconds / 1e9 for i, seconds in enumerate(self.wall)]


def turns(runs: list[Timed], steps: int, say: Say, device: torch.device) -> int:
    """Rounds in the order A B C, C B A, ...; the first WARM_UP, numbered -WARM_UP to -1, are not kept.

    Returns how often a GPU's allocator had to give memory back in the timed rounds, which slows them down.
    """
    retries = 0
    for index in range(-WARM_UP, steps):
        if index == 0:
            retries = allocator_retries(device)
        for run in runs if index % 2 == 0 else runs[::-1]:
            run.once(index, keep=index >= 0, device=device)
        say(f"warm-up {index + WARM_UP + 1} of {WARM_UP}" if index < 0 else f"round {index + 1} of {steps}")
    return allocator_retries(device) - retries


def allocator_retries(device: torch.device) -> int:
    """How often a GPU's memory was so full that the allocator gave some back and fetched it anew, so far."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0


def until_it_fits(run: Callable[[int], T], batch: int, device: torch.device, say: Say) -> T:
    """run(batch), with half the batch as often as a GPU's memory runs out in it. ValueError where 1 does not fit."""
    while True:
        try:
            return run(batch)
        except RuntimeError as error:
            if not any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__cause__)):
                raise
            short = str(error.__cause__ or error).splitlines()[0]
        if batch == 1:
            raise ValueError(f"no step fits into {device}, not even of one image: {short}")
        batch //= 2
        say(f"out of memory: to begin again with {batch} images a step")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def machine(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return {
        **gpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measurements(machine: dict[str, Any]) -> Path:
    """docs/measurements/DEVICE, where what was measured on one kind of device is kept."""
    device = machine.get("gpu") or f"{machine['cpu']} {machine['cores']} cores"
    plain = re.sub(r"\((R|TM)\)", "", device).lower()
    return MEASUREMENTS / re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
