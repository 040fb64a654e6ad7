"""LayerNorm of the residual stream, and the stream with the next bias, in one pass. T tokens, D width, P programs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ijepa_kernels.column_sums import column_sums
from ijepa_kernels.dispatch import blocks, check_tokens, jit, launch, tl, use_kernels

LOOPS = 32  # tiles that a program of the backward takes, one after the other: so many times fewer sums to add up

# --- definition


def norm_residual_definition(
    tokens_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    shift_D: torch.Tensor,
    eps: float,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    normalized_TD = F.layer_norm(tokens_TD, tokens_TD.shape[-1:], weight_D, bias_D, eps)
    alone = overwrite and not torch.is_grad_enabled()
    return normalized_TD, tokens_TD.add_(shift_D) if alone else tokens_TD + shift_D


# --- kernels: a program takes a tile of ROWS whole rows, in the backward LOOPS of them; columns in registers


@jit
def _norm_residual_kernel(
    tokens_ptr,  # (T, D) in
    weight_ptr, bias_ptr, shift_ptr,  # (D,) in
    normalized_ptr, sum_ptr,  # (T, D) out; the sum may be the tokens
    stats_ptr,  # (2, T) out, fp32 or fp64: mean and 1 / standard deviation; or not used
    T, D, EPS: tl.constexpr,  # as a number torch.compile would hand it over in fp64
    KEPT: tl.constexpr, FP64: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    d = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(accumulate)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(accumulate)
    shift = tl.load(shift_ptr + d, mask=d < D, other=0.0).to(accumulate)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # t * D may pass 2**31
    at, mask = t[:, None] * D + d, (t < T)[:, None] & (d < D)
    tokens = tl.load(tokens_ptr + at, mask=mask, other=0.0).to(accumulate)
    mean = tl.sum(tokens, axis=1) / D
    centered = tl.where(mask, tokens - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / D + EPS
    scale = 1.0 / tl.sqrt(variance)
    normalized = centered * scale[:, None] * weight + bias
    tl.store(normalized_ptr + at, normalized.to(normalized_ptr.dtype.element_ty), mask=mask)
    tl.store(sum_ptr + at, (tokens + shift).to(sum_ptr.dtype.element_ty), mask=mask)
    if KEPT:
        tl.store(stats_ptr + t, mean, mask=t < T)
        tl.store(stats_ptr + (T + t), scale, mask=t < T)


@jit
def _norm_residual_grad_kernel(
    grad_ptr, grad_sum_ptr,  # (T, D) in, of the normalized tokens and of the sum
    tokens_ptr,  # (T, D) in
    weight_ptr,  # (D,) in
    stats_ptr,  # (2, T) in
    out_ptr,  # (T, D) out, of the tokens
    sums_ptr,  # (3, P, D) out, fp32 or fp64: of weight, bias and shift, over a program's tokens
    T, D,
    FP64: tl.constexpr, LOOPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    columns = tl.arange(0, BLOCK_D)
    d = columns[None, :]
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(accumulate)
    grad_weight = tl.zeros([ROWS, BLOCK_D], dtype=accumulate)
    grad_bias = tl.zeros([ROWS, BLOCK_D], dtype=accumulate)
    grad_shift = tl.zeros([ROWS, BLOCK_D], dtype=accumulate)
    program = tl.program_id(0).to(tl.int64)
    for loop in range(LOOPS):
        t = program * LOOPS * ROWS + loop * ROWS + tl.arange(0, ROWS)
        at, mask = t[:, None] * D + d, (t < T)[:, None] & (d < D)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(accumulate)
        grad_sum = tl.load(grad_sum_ptr + at, mask=mask, other=0.0).to(accumulate)
        mean = tl.load(stats_ptr + t, mask=t < T, other=0.0)[:, None]
        scale = tl.load(stats_ptr + (T + t), mask=t < T, other=0.0)[:, None]
        tokens = tl.load(tokens_ptr + at, mask=mask, other=0.0).to(accumulate)
        plain = tl.where(mask, (tokens - mean) * scale, 0.0)  # without weight and bias
        slope = grad * weight
        along = tl.sum(slope * plain, axis=1)[:, None] / D
        across = tl.sum(slope, axis=1)[:, None] / D
        out = (slope - across - plain * along) * scale + grad_sum
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        grad_weight += grad * plain
        grad_bias += grad
        grad_shift += grad_sum
    place = program * D + columns
    stride = tl.num_programs(0).to(tl.int64) * D
    tl.store(sums_ptr + place, tl.sum(grad_weight, axis=0), mask=columns < D)
    tl.store(sums_ptr + stride + place, tl.sum(grad_bias, axis=0), mask=columns < D)
    tl.store(sums_ptr + 2 * stride + place, tl.sum(grad_shift, axis=0), mask=columns < D)


# --- autograd


def _tiles(count: int, width: int, loops: int = 1) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the sizes of a tile: 16 columns a thread. loops: tiles a program."""
    columns = 1 << max(4, (width - 1).bit_length())
    rows = max(1, 2048 // columns)
    sizes = {"ROWS": rows, "BLOCK_D": columns, "num_warps": max(4, min(16, columns // 512))}
    return (blocks(count, loops * rows),), sizes


def _forward(tokens, weight, bias, shift, out, eps: float, kept: bool):  # type: ignore[no-untyped-def]
    """Normalized tokens, and what the backward needs of each where it is kept; the sum goes to out."""
    count, width = tokens.shape
    fp64 = tokens.dtype == torch.float64
    normalized = torch.empty_like(tokens)
    stats = tokens.new_empty(2, count if kept else 0, dtype=torch.float64 if fp64 else torch.float32)
    grid, sizes = _tiles(count, width)
    tensors = (tokens, weight, bias, shift, normalized, out, stats)
    launch(_norm_residual_kernel, grid, *tensors, count, width, EPS=eps, KEPT=kept, FP64=fp64, **sizes)
    return normalized, stats


@torch.library.triton_op("ijepa::norm_residual", mutates_args={})
def _norm_residual(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shift: torch.Tensor, eps: float, kept: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.empty_like(tokens)
    normalized, stats = _forward(tokens, weight, bias, shift, out, eps, kept)
    return normalized, out, stats


@torch.library.triton_op("ijepa::norm_residual_", mutates_args={"tokens"})
def _norm_residual_(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    return _forward(tokens, weight, bias, shift, tokens, eps, False)[0]


@torch.library.triton_op("ijepa::norm_residual_grad", mutates_args={})
def _grad(
    grad: torch.Tensor,
    grad_sum: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the tokens, (T, D), and of weight, bias and shift, (3, D)."""
    count, width = tokens.shape
    out = torch.empty_like(tokens)
    grid, sizes = _tiles(count, width, LOOPS)
    sums = stats.new_empty(3, *grid, width)
    tensors = (grad, grad_sum, tokens, weight, stats, out, sums)
    fp64 = tokens.dtype == torch.float64
    launch(_norm_residual_grad_kernel, grid, *tensors, count, width, FP64=fp64, LOOPS=LOOPS, **sizes)
    return out, column_sums(sums, weight.dtype)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tokens, weight, *_ = inputs
    ctx.set_materialize_grads(False)  # else zeros are written for the statistics in every backward
    ctx.save_for_backward(tokens, weight, output[2])


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    tokens, weight, stats = ctx.saved_tensors  # once: what is computed again is there for one look
    grad, grad_sum = (torch.zeros_like(tokens) if one is None else one.contiguous() for one in grads[:2])
    grad_tokens, sums = _grad(grad, grad_sum, tokens, weight, stats)
    return grad_tokens, *sums.unbind(), None, None


_norm_residual.register_autograd(_backward, setup_context=_setup)


# --- public


def norm_residual(
    tokens_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    shift_D: torch.Tensor,
    eps: float,
    *,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(LayerNorm(tokens) * weight + bias, tokens + shift), both (T, D) in the dtype of tokens_TD.

    What a pre-norm block does to its residual stream: it goes on from the normalized tokens, and adds the product of a
    last matrix, whose bias is the shift, onto the sum. tokens_TD: (T, D), any float dtype; weight_D, bias_D, shift_D:
    (D,) of one dtype. overwrite: the sum takes the place of tokens_TD, where no gradient is kept. Raises ValueError for
    another type, shape or device.

    Bytes a value in bf16: the forward reads the tokens and writes two, 6; the product reads the sum, 2. The backward
    reads the gradients of both outputs and the tokens, and writes their gradient, 8. On the way it adds that of the
    residual stream, and sums those of weight, bias and shift, in a fixed order, without atomics.
    """
    check_tokens(tokens_TD=tokens_TD)
    for name, tensor in (("weight_D", weight_D), ("bias_D", bias_D), ("shift_D", shift_D)):
        if tensor.shape != tokens_TD.shape[1:]:
            raise ValueError(f"{name} must be ({tokens_TD.shape[1]},), got {tuple(tensor.shape)}")
        if tensor.dtype != weight_D.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be of a floating type, that of weight_D, {weight_D.dtype}, got {tensor.dtype}"
            )
        if tensor.device != tokens_TD.device:
            raise ValueError(f"{name} must be on {tokens_TD.device}, got {tensor.device}")
    if not use_kernels(tokens_TD):
        return norm_residual_definition(tokens_TD, weight_D, bias_D, shift_D, eps, overwrite=overwrite)
    vectors = (weight_D.contiguous(), bias_D.contiguous(), shift_D.contiguous())
    if overwrite and not torch.is_grad_enabled() and tokens_TD.is_contiguous():
        return _norm_residual_(tokens_TD, *vectors, eps), tokens_TD
    kept = torch.is_grad_enabled()
    normalized, out, _ = _norm_residual(tokens_TD.contiguous(), *vectors, eps, kept)
    return normalized, out
