"""How exact an operation is, beside its definition."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import triton
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETED = bool(triton.knobs.runtime.interpret)
# The interpreter cuts fp32 off where it makes bf16 of it, and hardware rounds.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
loads_its_bounds = pytest.mark.skipif(
    INTERPRETED and Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="a loop with loaded bounds in Triton 3.6's interpreter wants NumPy before 2.4: int() of one-number arrays",
)
WIDTHS = [1, 16, 37, 384, 1280, 1408, 1664]


def values(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Normal float64 numbers."""
    return shift + scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_grads(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    """The value, and the gradients of all inputs for an upstream gradient, in float64 on the CPU."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, upstream.to(out.device, out.dtype))
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    return [tensor.detach().cpu().double() for tensor in (out, *grads)]


def assert_as_exact_as_definition(
    function: Callable[..., torch.Tensor],
    definition: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
    device: str,
    upstream: torch.Tensor,
) -> None:
    """function's value and every gradient err at most twice as much as the definition's, of the same rounded inputs."""
    rounded = [tensor.to(device, dtype) for tensor, dtype in zip(inputs, dtypes, strict=True)]
    actual = value_and_grads(function, rounded, upstream)
    eager = value_and_grads(definition, rounded, upstream)
    # What the low precision rounds the upstream gradient to is part of the inputs.
    rounded_upstream = upstream.to(definition(*rounded).dtype).double()
    exact = value_and_grads(definition, [tensor.double() for tensor in rounded], rounded_upstream)
    for place, (ours, theirs, true) in enumerate(zip(actual, eager, exact, strict=True)):
        assert ours.shape == true.shape
        if true.numel():
            allowed = 2 * (theirs - true).abs().max() + 4 * torch.finfo(torch.float32).eps * true.abs().max()
            assert (ours - true).abs().max() <= allowed, f"{'value' if place == 0 else f'gradient {place - 1}'}"


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """actual is within half a unit in the last place of exact, which is float64 and not near 0."""
    unit = torch.finfo(actual.dtype).eps * 2 ** exact.abs().log2().floor()
    assert ((actual.double() - exact).abs() <= 0.51 * unit).all()


class Filled(TorchDispatchMode):
    """Counts tensors that are made of zeros: of what nobody reads they cost a kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "zeros" in func.name()
        return func(*args, **(kwargs or {}))
