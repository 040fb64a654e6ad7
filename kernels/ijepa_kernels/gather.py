"""Rows of a token matrix by packed indices. T rows of tokens, K rows wanted, D their width."""

from __future__ import annotations

import torch

from ijepa_kernels.dispatch import CHECK, check_indices, check_tokens, jit, launch_tiles, tl, use_kernels

# --- definition


def gather_rows_definition(tokens_TD: torch.Tensor, indices_K: torch.Tensor) -> torch.Tensor:
    return tokens_TD.index_select(0, indices_K)


# --- kernels: a program moves BLOCK_ROWS rows by BLOCK_COLUMNS columns


@jit
def _gather_kernel(
    tokens_ptr,  # (T, D) in
    indices_ptr,  # (R,) in
    out_ptr,  # (R, D) out
    R, D, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (k < R)[:, None] & (d < D)[None, :]
    row = tl.load(indices_ptr + k, mask=k < R, other=0).to(tl.int64)  # row * D may pass 2**31
    values = tl.load(tokens_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + k[:, None] * D + d[None, :], values, mask=mask)


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


# --- autograd


@torch.library.triton_op("ijepa::gather_rows", mutates_args={})
def _gather(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    count, width = indices.shape[0], tokens.shape[1]
    out = tokens.new_empty(count, width)
    launch_tiles(_gather_kernel, count, width, tokens, indices, out, count, width)
    return out


@torch.library.triton_op("ijepa::scatter_rows", mutates_args={})
def _scatter(grad: torch.Tensor, indices: torch.Tensor, num_rows: int) -> torch.Tensor:
    count, width = grad.shape
    out = grad.new_zeros(num_rows, width)
    launch_tiles(_scatter_kernel, count, width, grad, indices, out, count, width)
    return out


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tokens, indices = inputs
    ctx.num_rows = tokens.shape[0]
    ctx.save_for_backward(indices)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (indices,) = ctx.saved_tensors
    return _scatter(grad.contiguous(), indices, ctx.num_rows), None


_gather.register_autograd(_backward, setup_context=_setup)


# --- public


def gather_rows(tokens_TD: torch.Tensor, indices_K: torch.Tensor) -> torch.Tensor:
    """tokens_TD[indices_K], each row once: the backward stores their gradients, and adds nothing up.

    tokens_TD: (T, D), any float dtype. indices_K: (K,) int32 or int64; where a row came twice its gradient would be
    silently wrong, which IJEPA_KERNELS_CHECK finds. Returns (K, D) in the dtype of tokens_TD. Raises ValueError for
    another type, shape or device.
    """
    check_tokens(tokens_TD=tokens_TD)
    check_indices(tokens_TD.device, indices_K=(indices_K, tokens_TD.shape[0]))
    if CHECK and len(indices_K.unique()) < len(indices_K):
        raise ValueError("indices_K must name each row once; gradients would be wrong")
    if not use_kernels(tokens_TD):
        return gather_rows_definition(tokens_TD, indices_K)
    return _gather(tokens_TD.contiguous(), indices_K.contiguous())
