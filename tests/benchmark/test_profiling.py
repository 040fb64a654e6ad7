"""The sums over a trace: by hand on a made-up one, and on a real one of a CPU."""

import gzip
import json

import pytest
import torch

from ijepa_scale.benchmark.categories import EVALUATE
from ijepa_scale.benchmark.profiling import END, START, STEP, Gap, Interval, gaps, own_times, profile_steps, summary
from ijepa_scale.plan.step_model import ATTENTION, ELEMENTWISE, IDLE, MATRIX, TAIL


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
    own = [(one.name, microseconds) for one, microseconds in own_times(nested[::-1])]
    assert own == [("a", 60), ("b", 20), ("c", 10), ("b", 10), ("d", 10)]


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


def launched(category, name, start, duration, launch, number):
    """What the host launched at a time, and the launch."""
    return [
        event(category, name, start, duration, thread=7) | {"args": {"correlation": number}},
        event("cuda_runtime", "cudaLaunchKernel", launch, 5) | {"args": {"correlation": number}},
    ]


def test_what_is_launched_after_the_backward_is_the_optimizers():
    """By when the host launched it, not by when it ran: the GPU lags behind."""
    add = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
    events = [
        event("user_annotation", STEP, 0, 1000),
        event("cpu_op", EVALUATE + "AddmmBackward0", 100, 50),
        event("cpu_op", EVALUATE + "torch::autograd::AccumulateGrad", 160, 20),
        event("cpu_op", EVALUATE + "AddBackward0", 190, 10),
        *launched("kernel", "sm90_xmma_gemm_bf16bf16", 300, 100, 50, 1),
        *launched("kernel", "pytorch_flash::flash_bwd_kernel", 400, 200, 120, 2),
        *launched("kernel", add, 600, 50, 170, 3),  # in a hook on a gradient
        *launched("kernel", add, 650, 30, 195, 4),
        *launched("kernel", add, 700, 40, 300, 5),
    ]
    found = summary(events, cuda=True)
    times = {row["name"]: row["milliseconds"] for row in found["categories"]}
    assert times == {MATRIX: 0.1, ATTENTION: 0.2, TAIL: pytest.approx(0.09), ELEMENTWISE: 0.03, IDLE: 0.58}
    assert {row["name"]: row["milliseconds"] for row in found["phases"]} == {
        "forward": 0.1,
        "backward": pytest.approx(0.23),
        "after the backward": pytest.approx(0.09),
    }
    shares = sum(row["share"] for row in found["categories"])
    assert shares == pytest.approx(1.0), "one stream, so that all adds up"


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
    categories = {row["name"]: row for row in found["categories"]}
    assert rows["aten::mm"] in categories[MATRIX]["kernels"]
    assert categories[IDLE]["milliseconds"] == found["gaps"]["milliseconds"]
    assert {row["name"] for row in found["phases"]} >= {"forward", "backward"}
