"""Where the time of a step goes: a trace by torch's profiler, what its kernels do, and the gaps between them."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ijepa_scale.benchmark.categories import EVALUATE, Phases, category_in
from ijepa_scale.plan.step_model import IDLE

STEP = "ijepa-scale step"  # the mark of a step in the trace
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # the trace's categories of what runs on a GPU
START, END = "start of the step", "end of the step"
SHOWN = 10


class Interval(NamedTuple):
    """Something that ran from start to end, in microseconds."""

    start: float
    end: float
    name: str
    category: str = ""
    phase: str = ""


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
    operations within them. categories: the same by what they do (categories.py), each with its costliest, and the time
    in which none runs. phases: by when in the step they were launched. gaps: the times in which none runs.
    """
    events = [event for event in events if event.get("ph") == "X"]
    marks = [interval(event) for event in events if event.get("cat") == "user_annotation" and event["name"] == STEP]
    wanted = ON_GPU if cuda else ("cpu_op",)
    ran = [event for event in events if event.get("cat") in wanted and _within(interval(event), marks)]
    if not ran:
        raise ValueError(
            "nothing ran according to the trace: on a GPU the profiler needs CUPTI and the right to use it"
        )
    phases = Phases(events)
    threads = defaultdict(list)
    for event in ran:
        threads[event["tid"]].append(classified(event, phases, marks))  # of a GPU: its streams
    own = [pair for intervals in threads.values() for pair in own_times(intervals)]
    between = [gap for mark in marks for gap in gaps(map(interval, ran), mark)]
    per_step = 1e-3 / len(marks)
    step = per_step * sum(mark.end - mark.start for mark in marks)
    idle = per_step * sum(gap.duration for gap in between)
    categories = _sums(own, "category", len(marks), step)

    def inside(row: dict[str, Any]) -> list[tuple[Interval, float]]:
        return [pair for pair in own if pair[0].category == row["name"]]

    return {
        "steps": len(marks),
        "of": "kernels" if cuda else "operations",
        "step_milliseconds": step,
        "costliest": _sums(own, "name", len(marks), step)[:SHOWN],
        "categories": [
            *({**row, "kernels": _sums(inside(row), "name", len(marks), step)[:SHOWN]} for row in categories),
            {"name": IDLE, "milliseconds": idle, "calls": len(between) / len(marks), "share": idle / step},
        ],
        "phases": _sums(own, "phase", len(marks), step),
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


def _sums(own: list[tuple[Interval, float]], of: str, steps: int, step: float) -> list[dict[str, Any]]:
    """Of each name, category or phase: milliseconds and calls a step, share of a step's ms; the costliest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for one, microseconds in own:
        times[getattr(one, of)].append(microseconds)
    rows = [
        {
            "name": name,
            "milliseconds": 1e-3 * sum(each) / steps,
            "calls": len(each) / steps,
            "share": 1e-3 * sum(each) / steps / step,
        }
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: row["milliseconds"], reverse=True)


def interval(event: dict[str, Any]) -> Interval:
    return Interval(event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(EVALUATE))


def classified(event: dict[str, Any], phases: Phases, marks: list[Interval]) -> Interval:
    one = interval(event)
    step = next(mark for mark in marks if mark.start <= one.start < mark.end)
    phase = phases.of(event, (step.start, step.end))
    return one._replace(category=category_in(phase, one.name), phase=phase)


def _within(one: Interval, marks: list[Interval]) -> bool:
    return any(mark.start <= one.start < mark.end for mark in marks)


def own_times(intervals: list[Interval]) -> list[tuple[Interval, float]]:
    """Each interval of one thread with its microseconds less those of what is nested in it."""
    own: list[tuple[Interval, float]] = []
    open_: list[tuple[int, float]] = []  # those around the next: place in own, end
    for one in sorted(intervals, key=lambda one: (one.start, -one.end)):
        while open_ and open_[-1][1] <= one.start:
            open_.pop()
        if open_:
            outer = open_[-1][0]
            own[outer] = (own[outer][0], own[outer][1] - (one.end - one.start))
        open_.append((len(own), one.end))
        own.append((one, one.end - one.start))
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
