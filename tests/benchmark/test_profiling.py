"""The sums over a trace: by hand on a made-up one, and on a real one of a CPU."""

import gzip
import json

import pytest
import torch

from ijepa_scale.benchmark.profiling import END, START, STEP, Gap, Interval, gaps, own_times, profile_steps, summary


def event(category, name, start, duration, thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}


def test_gaps_lie_where_nothing_runs():
    step = Interval(100.0, 200.0, "step")
    busy = [
        Interval(90, 105, "early"),  # began before the step
        Interval(110, 120, "a"),
        Interval(112, 118, "inside a"),
        Interval(115, 130, "b"),  # overlaps a
        Interval(130, 140, "c"),  # follows at once
        Interval(180, 230, "late"),
        Interval(300, 310, "next step"),
    ]
    assert gaps(reversed(busy), step) == [Gap(5, "early", "a"), Gap(40, "c", "late")]
    assert gaps([], step) == [Gap(100, START, END)]
    assert gaps([Interval(150, 160, "a")], step) == [Gap(50, START, "a"), Gap(40, "a", END)]
    assert gaps([Interval(0, 500, "a")], step) == []


def test_own_time_leaves_out_what_is_nested():
    nested = [Interval(0, 100, "a"), Interval(10, 40, "b"), Interval(20, 30, "c"), Interval(40, 50, "b")]
    nested += [Interval(100, 110, "d")]
    assert own_times(nested[::-1]) == [("a", 60), ("b", 20), ("c", 10), ("b", 10), ("d", 10)]


def test_two_steps_on_a_gpu():
    events = [
        event("user_annotation", STEP, 1000, 1000),
        event("user_annotation", STEP, 3000, 2000),
        event("gpu_user_annotation", STEP, 1100, 900),
        event("cpu_op", "aten::mm", 1000, 900),
        event("kernel", "gemm", 500, 100),  # before the steps
        event("kernel", "gemm", 1100, 300, thread=7),
        event("kernel", "gelu", 1300, 200, thread=8),  # on another stream, beside it
        event("gpu_memcpy", "Memcpy HtoD", 1900, 100),
        event("kernel", "gemm", 3000, 1500, thread=7),
        {"ph": "M", "name": "process_name"},
    ]
    found = summary(events, cuda=True)
    assert (found["steps"], found["of"], found["step_milliseconds"]) == (2, "kernels", 1.5)
    assert [(row["name"], row["milliseconds"], row["calls"]) for row in found["costliest"]] == [
        ("gemm", pytest.approx(0.9), 1.0),
        ("gelu", pytest.approx(0.1), 0.5),
        ("Memcpy HtoD", pytest.approx(0.05), 0.5),
    ]
    assert found["costliest"][0]["share"] == pytest.approx(0.6)
    assert found["gaps"] == {
        "milliseconds": pytest.approx(0.5),  # 100 before, 400 between, and 500 at the end of the second, over two steps
        "share": pytest.approx(1 / 3),
        "count": 1.5,
        "largest": [
            {"milliseconds": 0.5, "before": "gemm", "after": END},
            {"milliseconds": 0.4, "before": "gelu", "after": "Memcpy HtoD"},
            {"milliseconds": 0.1, "before": START, "after": "gemm"},
        ],
    }


def test_a_trace_without_kernels_is_an_error():
    with pytest.raises(ValueError, match="CUPTI"):
        summary([event("user_annotation", STEP, 0, 10), event("cpu_op", "aten::mm", 1, 2)], cuda=True)


def test_a_real_trace(tmp_path):
    weight = torch.randn(512, 512, requires_grad=True)
    found = profile_steps(
        lambda step: (weight @ weight).sum().backward(), tmp_path / "a", device=torch.device("cpu"), steps=2
    )
    with gzip.open(found["trace"], "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"] == STEP for event in events) == 2 == found["steps"]
    rows = {row["name"]: row for row in found["costliest"]}
    assert rows["aten::mm"]["calls"] == 3 and found["costliest"][0] == rows["aten::mm"]
    own = sum(row["milliseconds"] for row in found["costliest"])
    assert 0 < own <= found["step_milliseconds"] - found["gaps"]["milliseconds"] + 1e-6
