"""A bias and GELU, and their gradients in one pass. T tokens, K width of the MLP, P programs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ijepa_kernels.column_sums import column_sums
from ijepa_kernels.dispatch import blocks, check_tokens, jit, launch, tl, use_kernels

COLUMNS, ROWS = 256, 8  # of a tile: 16 bytes of bf16 a thread and load
LOOPS = 16  # tiles that a program of the backward takes, one below the other: so many times fewer sums to add up
FORWARD_LOOPS = 4  # and of the forward, for one load of the bias: on an H100 a sixth faster than 16

# --- definition


def bias_gelu_definition(x_TK: torch.Tensor, bias_K: torch.Tensor) -> torch.Tensor:
    return F.gelu(x_TK + bias_K.to(x_TK.dtype))


# --- kernels: a program takes LOOPS tiles of ROWS x COLUMNS


@jit
def _bias_gelu_kernel(
    x_ptr,  # (T, K) in
    bias_ptr,  # (K,) in
    out_ptr,  # (T, K) out
    T, K,
    FP64: tl.constexpr, LOOPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(accumulate)
    for loop in range(LOOPS):
        t = (tl.program_id(0).to(tl.int64) * LOOPS + loop) * ROWS + tl.arange(0, ROWS)[:, None]
        x = tl.load(x_ptr + t * K + k, mask=(t < T) & (k < K), other=0.0).to(accumulate) + bias
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        tl.store(out_ptr + t * K + k, out.to(out_ptr.dtype.element_ty), mask=(t < T) & (k < K))


@jit
def _bias_gelu_grad_kernel(
    grad_ptr,  # (T, K) in, of the output
    x_ptr,  # (T, K) in
    bias_ptr,  # (K,) in
    out_ptr,  # (T, K) out, of x
    sums_ptr,  # (P, K) out, fp32 or fp64: of the bias, over a program's tokens
    T, K,
    FP64: tl.constexpr, LOOPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = columns[None, :]
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(accumulate)
    total = tl.zeros([ROWS, COLUMNS], dtype=accumulate)
    program = tl.program_id(0).to(tl.int64)
    for loop in range(LOOPS):
        t = (program * LOOPS + loop) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (t < T) & (k < K)
        grad = tl.load(grad_ptr + t * K + k, mask=mask, other=0.0).to(accumulate)
        x = tl.load(x_ptr + t * K + k, mask=mask, other=0.0).to(accumulate) + bias
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # of the normal distribution
        out = grad * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
        tl.store(out_ptr + t * K + k, out.to(out_ptr.dtype.element_ty), mask=mask)
        total += out
    tl.store(sums_ptr + program * K + columns, tl.sum(total, axis=0), mask=columns < K)


# --- autograd


def _launch(kernel, loops: int, x: torch.Tensor, *tensors: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    count, width = x.shape
    grid = (blocks(count, loops * ROWS), blocks(width, COLUMNS))
    sizes = {"LOOPS": loops, "ROWS": ROWS, "COLUMNS": COLUMNS}
    launch(kernel, grid, *tensors, count, width, FP64=x.dtype == torch.float64, **sizes)


@torch.library.triton_op("ijepa::bias_gelu", mutates_args={})
def _bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _launch(_bias_gelu_kernel, FORWARD_LOOPS, x, x, bias, out)
    return out


@torch.library.triton_op("ijepa::bias_gelu_grad", mutates_args={})
def _grad(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count, width = x.shape
    out = torch.empty_like(x)
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty(1, blocks(count, LOOPS * ROWS), width, dtype=precision)
    _launch(_bias_gelu_grad_kernel, LOOPS, x, grad, x, bias, out, sums)
    return out, column_sums(sums, bias.dtype)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x, sums = _grad(grad.contiguous(), *ctx.saved_tensors)
    return grad_x, sums[0]


_bias_gelu.register_autograd(_backward, setup_context=_setup)


# --- public


def bias_gelu(x_TK: torch.Tensor, bias_K: torch.Tensor) -> torch.Tensor:
    """Exact GELU (arXiv:1606.08415) of x + bias, (T, K) in the dtype of x_TK.

    x_TK: (T, K), any float dtype, a product without its bias. bias_K: (K,), any float dtype. Raises ValueError for
    another type, shape or device.

    Bytes a value in bf16: the forward moves 4. The backward reads the gradient and x, and writes x's gradient, 6; the
    bias's is summed on the way, in a fixed order, without atomics, which saves reading it once more, 2.
    """
    check_tokens(x_TK=x_TK)
    if bias_K.shape != x_TK.shape[1:] or not bias_K.is_floating_point() or bias_K.device != x_TK.device:
        got = f"{tuple(bias_K.shape)}, {bias_K.dtype}, {bias_K.device}"
        raise ValueError(f"bias_K must be ({x_TK.shape[1]},), of a floating type and on {x_TK.device}, got {got}")
    if not use_kernels(x_TK):
        return bias_gelu_definition(x_TK, bias_K)
    return _bias_gelu(x_TK.contiguous(), bias_K.contiguous())
