"""The products that are timed are those that autograd makes of the model's linear layers."""

import pytest
import torch
import torch.nn.functional as F

from ijepa_scale.benchmark.matmuls import operands, seconds_of, time_products
from ijepa_scale.config import load_config
from ijepa_scale.plan.step_model import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Product, Rates

CPU = torch.device("cpu")
SMALL = ["model.depth=2", "model.width=24", "predictor.width=24", "predictor.depth=2", "predictor.heads=1"]


@pytest.mark.parametrize("kind", [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT])
def test_operands_have_the_layouts_of_autograd(kind, monkeypatch):
    """Shapes and strides are those of the arguments of a linear layer's own products."""
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                seen.append([(tuple(one.shape), one.stride()) for one in args])
            return function(*args, **(kwargs or {}))

    inputs, weight = torch.randn(7, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    with Seen():
        F.linear(inputs, weight).backward(torch.randn(7, 3))
    assert len(seen) == 3
    left, right = operands(Product("", "", kind, 7, 5, 3, 1), CPU, torch.float32)
    wanted = [(tuple(one.shape), one.stride()) for one in (left, right)]
    if kind == WEIGHT_GRADIENT:  # autograd may ask for the transposed product of the same matrices
        turned = [(tuple(one.shape), one.stride()) for one in (right.t(), left.t())]
        assert wanted in seen or turned in seen
    else:
        assert wanted in seen


def test_all_products_of_a_step_are_timed_and_summed():
    config = load_config("tiny", [*SMALL, "optimization.micro_batch_size=2"])
    found = time_products(config, CPU, rates=Rates(matrix=1e12, copy=1.0), say=lambda text: None)
    rows = found["products"]
    assert {row["layer"] for row in rows} == {"patches", "qkv", "proj", "fc1", "fc2", "embed", "proj out"}
    total = found["of_a_step"]["all"]
    assert total["milliseconds"] == pytest.approx(sum(row["count"] * row["milliseconds"] for row in rows))
    for row in rows:
        flops = 2 * row["rows"] * row["k"] * row["n"]
        assert row["tflop_per_second"] == pytest.approx(1e-9 * flops / row["milliseconds"])
        assert row["share_of_sustained"] == pytest.approx(row["tflop_per_second"])
        assert 0 < row["share_assumed"] < 1
    assert seconds_of(Product("", "", FORWARD, 4, 4, 4, 1), CPU, torch.float32) > 0
