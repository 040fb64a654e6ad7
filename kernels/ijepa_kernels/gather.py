"""Rows of a token matrix by packed indices. T rows of tokens, K rows wanted, D their width, N patches an image."""

from __future__ import annotations

import torch

from ijepa_kernels.dispatch import (
    CHECK,
    blocks,
    check_indices,
    check_tokens,
    jit,
    launch,
    launch_tiles,
    tl,
    use_kernels,
)

# --- definition


def gather_rows_definition(
    tokens_TD: torch.Tensor, indices_K: torch.Tensor, pos_embed_ND: torch.Tensor | None = None
) -> torch.Tensor:
    rows_KD = tokens_TD.index_select(0, indices_K)
    if pos_embed_ND is None:
        return rows_KD
    return rows_KD + pos_embed_ND.detach().to(rows_KD.dtype).index_select(0, indices_K % pos_embed_ND.shape[0])


# --- kernels: a program moves BLOCK_ROWS rows by BLOCK_COLUMNS columns


@jit
def _gather_kernel(
    tokens_ptr,  # (T, D) in
    indices_ptr,  # (R,) in
    pos_ptr,  # (N, D) in, or not used
    out_ptr,  # (R, D) out
    R, D, N,
    HAS_POS: tl.constexpr, FP64: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (k < R)[:, None] & (d < D)[None, :]
    row = tl.load(indices_ptr + k, mask=k < R, other=0).to(tl.int64)  # row * D may pass 2**31
    values = tl.load(tokens_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0)
    if HAS_POS:
        accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
        pos = tl.load(pos_ptr + (row.to(tl.int32) % N).to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        values = values.to(accumulate) + pos.to(accumulate)
    tl.store(out_ptr + k[:, None] * D + d[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _scatter_kernel(
    grad_ptr,  # (R, D) in
    indices_ptr,  # (R,) in, each row once
    out_ptr,  # (T, D) out, zeros
    R, D, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (k < R)[:, None] & (d < D)[None, :]
    row = tl.load(indices_ptr + k, mask=k < R, other=0).to(tl.int64)
    values = tl.load(grad_ptr + k[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + row[:, None] * D + d[None, :], values, mask=mask)


@jit
def _segment_sum_kernel(
    grad_ptr,  # (K, D) in
    order_ptr,  # (K,) in, places of the indices in ascending order of the index
    bounds_ptr,  # (T + 1,) in; row t has order[bounds[t]:bounds[t + 1]]
    out_ptr,  # (T, D) out
    D, FP64: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    total = tl.zeros([BLOCK_D], dtype=accumulate)
    for place in range(tl.load(bounds_ptr + row), tl.load(bounds_ptr + row + 1)):
        k = tl.load(order_ptr + place).to(tl.int64)
        total += tl.load(grad_ptr + k * D + d, mask=d < D, other=0.0).to(accumulate)
    tl.store(out_ptr + row * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


# --- autograd


@torch.library.triton_op("ijepa::gather_rows", mutates_args={})
def _gather(tokens: torch.Tensor, indices: torch.Tensor, pos: torch.Tensor | None, unique: bool) -> torch.Tensor:
    count, width = indices.shape[0], tokens.shape[1]
    out = tokens.new_empty(count, width)
    launch_tiles(
        _gather_kernel,
        *(count, width),
        *(tokens, indices, tokens if pos is None else pos, out),
        *(count, width, 1 if pos is None else pos.shape[0]),
        HAS_POS=pos is not None,
        FP64=tokens.dtype == torch.float64,
    )
    return out


@torch.library.triton_op("ijepa::scatter_rows", mutates_args={})
def _scatter(grad: torch.Tensor, indices: torch.Tensor, num_rows: int) -> torch.Tensor:
    count, width = grad.shape
    out = grad.new_zeros(num_rows, width)
    launch_tiles(_scatter_kernel, count, width, grad, indices, out, count, width)
    return out


@torch.library.triton_op("ijepa::sum_rows", mutates_args={})
def _segment_sum(grad: torch.Tensor, indices: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Adds in the order of the indices' places: the same bits every time, without atomics."""
    sorted_indices, order = torch.sort(indices, stable=True)
    starts = torch.arange(num_rows + 1, device=indices.device, dtype=indices.dtype)
    bounds = torch.searchsorted(sorted_indices, starts)
    width = grad.shape[1]
    out = grad.new_empty(num_rows, width)
    columns = min(1024, 1 << max(4, (width - 1).bit_length()))
    launch(
        _segment_sum_kernel,
        (num_rows, blocks(width, columns)),
        *(grad, order, bounds, out, width),
        FP64=grad.dtype == torch.float64,
        BLOCK_D=columns,
        num_warps=max(1, columns // 256),  # 8 columns a thread
    )
    return out


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tokens, indices, _, ctx.unique = inputs
    ctx.num_rows = tokens.shape[0]
    ctx.save_for_backward(indices)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (indices,) = ctx.saved_tensors
    back = _scatter if ctx.unique else _segment_sum
    return back(grad.contiguous(), indices, ctx.num_rows), None, None, None


_gather.register_autograd(_backward, setup_context=_setup)


# --- public


def gather_rows(
    tokens_TD: torch.Tensor,
    indices_K: torch.Tensor,
    *,
    pos_embed_ND: torch.Tensor | None = None,
    unique: bool = False,
) -> torch.Tensor:
    """tokens_TD[indices_K], and with pos_embed_ND the position embedding of patch indices_K % N added.

    tokens_TD: (T, D), any float dtype, or (B, N, D), taken as (B * N, D). indices_K: (K,) int32 or int64. unique: the
    caller's word that no index comes twice; then the backward stores rows instead of adding them up, and were it
    untrue, gradients would be silently wrong. pos_embed_ND: (N, D), a constant. Returns (K, D) in the dtype of
    tokens_TD. Raises ValueError for another type, shape or device.
    """
    if tokens_TD.ndim == 3:
        tokens_TD = tokens_TD.flatten(0, 1)
    check_tokens(tokens_TD=tokens_TD, **({} if pos_embed_ND is None else {"pos_embed_ND": pos_embed_ND}))
    check_indices(tokens_TD.device, indices_K=(indices_K, tokens_TD.shape[0]))
    if CHECK and unique and len(indices_K.unique()) < len(indices_K):
        raise ValueError("indices_K must name each row once where unique=True; gradients would be wrong")
    if not use_kernels(tokens_TD):
        return gather_rows_definition(tokens_TD, indices_K, pos_embed_ND)
    pos = None if pos_embed_ND is None else pos_embed_ND.detach().contiguous()
    return _gather(tokens_TD.contiguous(), indices_K.contiguous(), pos, unique)
