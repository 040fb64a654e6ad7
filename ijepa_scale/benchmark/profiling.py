"""Where the time of a step goes: a torch-profiler trace, the costliest kernels in it, and the gaps between them."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "ijepa-scale step"  # the mark of a step in the trace
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # the trace's categories of what runs on a GPU
START, END = "start of the step", "end of the step"
SHOWN = 10


class Interval(NamedTuple):
    """Something that ran from start to end, in microseconds."""

    start: float
    end: float
    name: str


class Gap(NamedTuple):
    """A time in which nothing ran, in microseconds, between what ran before and after."""

    duration: float
    before: str
    after: str


def profile_steps(run: Callable[[int], None], folder: Path, *, device: torch.device, steps: int = 3) -> dict[str, Any]:
    """Trace run(0), run(1), ... to folder/trace.json.gz, to be opened in Perfetto, and sum it up (summary() below).

    Raises ValueError where the trace holds nothing that ran on the GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        run(0)  # unmarked: the first step under the profiler is slower
        if cuda:
            torch.cuda.synchronize(device)
        for step in range(steps):
            with record_function(STEP):
                run(step)
                if cuda:
                    torch.cuda.synchronize(device)
    path = folder / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return {"trace": str(path), **summary(events, cuda=cuda)}


def summary(events: Iterable[dict[str, Any]], *, cuda: bool) -> dict[str, Any]:
    """Means over a trace's steps, times in milliseconds a step.

    events: the trace's. costliest: kernels by their time on a GPU; on a CPU operations by their own time, without the
    operations within them. gaps: the time in which no kernel runs on a GPU; on a CPU no operation.
    """
    events = [event for event in events if event.get("ph") == "X"]
    marks = [interval(event) for event in events if event.get("cat") == "user_annotation" and event["name"] == STEP]
    wanted = ON_GPU if cuda else ("cpu_op",)
    ran = [event for event in events if event.get("cat") in wanted and _within(interval(event), marks)]
    if not ran:
        raise ValueError(
            "nothing ran according to the trace: on a GPU the profiler needs CUPTI and the right to use it"
        )
    threads = defaultdict(list)
    for event in ran:
        threads[event["tid"]].append(interval(event))  # of a GPU: its streams
    own: dict[str, list[float]] = defaultdict(list)
    for intervals in threads.values():
        for name, microseconds in own_times(intervals):
            own[name].append(microseconds)
    between = [gap for mark in marks for gap in gaps(map(interval, ran), mark)]
    per_step = 1e-3 / len(marks)
    step = per_step * sum(mark.end - mark.start for mark in marks)
    total = {name: per_step * sum(times) for name, times in own.items()}
    idle = per_step * sum(gap.duration for gap in between)
    return {
        "steps": len(marks),
        "of": "kernels" if cuda else "operations",
        "step_milliseconds": step,
        "costliest": [
            {
                "name": name,
                "milliseconds": total[name],
                "calls": len(own[name]) / len(marks),
                "share": total[name] / step,
            }
            for name in sorted(total, key=total.__getitem__, reverse=True)[:SHOWN]
        ],
        "gaps": {
            "milliseconds": idle,
            "share": idle / step,
            "count": len(between) / len(marks),
            "largest": [
                {"milliseconds": gap.duration / 1e3, "before": gap.before, "after": gap.after}
                for gap in sorted(between, reverse=True)[:SHOWN]
            ],
        },
    }


def interval(event: dict[str, Any]) -> Interval:
    name = event["name"].removeprefix("autograd::engine::evaluate_function: ")
    return Interval(event["ts"], event["ts"] + event["dur"], name)


def _within(one: Interval, marks: list[Interval]) -> bool:
    return any(mark.start <= one.start < mark.end for mark in marks)


def own_times(intervals: list[Interval]) -> list[tuple[str, float]]:
    """(name, microseconds) of each interval of one thread, without those nested in it."""
    own: list[tuple[str, float]] = []
    open_: list[tuple[int, float]] = []  # those around the next: place in own, end
    for start, end, name in sorted(intervals, key=lambda one: (one.start, -one.end)):
        while open_ and open_[-1][1] <= start:
            open_.pop()
        if open_:
            outer = open_[-1][0]
            own[outer] = (own[outer][0], own[outer][1] - (end - start))
        open_.append((len(own), end))
        own.append((name, end - start))
    return own


def gaps(busy: Iterable[Interval], step: Interval) -> list[Gap]:
    """The times within a step in which none of the intervals, which may overlap, runs."""
    found, end, before = [], step.start, START
    for one in sorted(busy):
        if one.end <= step.start or one.start >= step.end:
            continue
        if one.start > end:
            found.append(Gap(one.start - end, before, one.name))
        if one.end > end:
            end, before = one.end, one.name
    if end < step.end:
        found.append(Gap(step.end - end, before, END))
    return found
