"""The predictor's packed input. T tokens of context, R rows of the predictor, K of them mask tokens, M blocks an image,
P the predictor's width, N patches an image."""

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
    tile,
    tl,
    use_kernels,
)

MASK_ROWS = 256  # rows of mask tokens whose gradients one program adds up

# --- definition


def assemble_definition(
    context_TP: torch.Tensor,
    mask_token_P: torch.Tensor,
    pos_embed_NP: torch.Tensor,
    source_R: torch.Tensor,
    indices_R: torch.Tensor,
) -> torch.Tensor:
    any_TP = context_TP if len(context_TP) else mask_token_P[None].to(context_TP.dtype)
    rows_RP = any_TP.index_select(0, source_R.clamp(min=0))
    rows_RP = torch.where((source_R < 0)[:, None], mask_token_P.to(rows_RP.dtype), rows_RP)
    return rows_RP + pos_embed_NP.detach().to(rows_RP.dtype).index_select(0, indices_R % pos_embed_NP.shape[0])


# --- kernels


@jit
def _assemble_kernel(
    context_ptr,  # (T, P) in
    mask_token_ptr,  # (P,) in
    pos_ptr,  # (N, P) in
    source_ptr, indices_ptr,  # (R,) in
    out_ptr,  # (R, P) out
    R, P, N,
    FP64: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    p = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside, mask = r < R, (r < R)[:, None] & (p < P)[None, :]
    source = tl.load(source_ptr + r, mask=inside, other=0).to(tl.int64)
    patch = (tl.load(indices_ptr + r, mask=inside, other=0).to(tl.int32) % N).to(tl.int64)
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    visible = mask & (source >= 0)[:, None]
    rows = tl.load(context_ptr + source[:, None] * P + p[None, :], mask=visible, other=0.0).to(accumulate)
    mask_token = tl.load(mask_token_ptr + p, mask=p < P, other=0.0).to(accumulate)
    pos = tl.load(pos_ptr + patch[:, None] * P + p[None, :], mask=mask, other=0.0).to(accumulate)
    rows = tl.where((source >= 0)[:, None], rows, mask_token[None, :]) + pos
    tl.store(out_ptr + r[:, None] * P + p[None, :], rows.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _context_grad_kernel(
    grad_ptr,  # (R, P) in
    copies_ptr,  # (T, M) in: the rows that hold each token
    out_ptr,  # (T, P) out
    T, P, M: tl.constexpr,
    FP64: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    p = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (t < T)[:, None] & (p < P)[None, :]
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=accumulate)
    for m in tl.static_range(M):
        row = tl.load(copies_ptr + t * M + m, mask=t < T, other=0).to(tl.int64)
        total += tl.load(grad_ptr + row[:, None] * P + p[None, :], mask=mask, other=0.0).to(accumulate)
    tl.store(out_ptr + t[:, None] * P + p[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _mask_grad_kernel(
    grad_ptr,  # (tokens, P) in
    rows_ptr,  # (R,) in: the rows of mask tokens
    out_ptr,  # (number of programs, P) out, fp32 or fp64
    R, P,
    FP64: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    total = tl.zeros([BLOCK_K, BLOCK_P], dtype=accumulate)
    for start in range(0, ROWS, BLOCK_K):
        k = part * ROWS + start + tl.arange(0, BLOCK_K)
        row = tl.load(rows_ptr + k, mask=k < R, other=0).to(tl.int64)
        mask = (k < R)[:, None] & (p < P)[None, :]
        total += tl.load(grad_ptr + row[:, None] * P + p[None, :], mask=mask, other=0.0).to(accumulate)
    tl.store(out_ptr + part * P + p, tl.sum(total, axis=0), mask=p < P)


# --- autograd


@torch.library.triton_op("ijepa::assemble", mutates_args={})
def _assemble(
    context: torch.Tensor,
    mask_token: torch.Tensor,
    pos: torch.Tensor,
    source: torch.Tensor,
    indices: torch.Tensor,
    copies: torch.Tensor,
    mask_rows: torch.Tensor,
) -> torch.Tensor:
    count, width = source.shape[0], context.shape[1]
    out = context.new_empty(count, width)
    launch_tiles(
        _assemble_kernel,
        *(count, width),
        *(context, mask_token, pos, source, indices, out, count, width, pos.shape[0]),
        FP64=context.dtype == torch.float64,
    )
    return out


@torch.library.triton_op("ijepa::assemble_context_grad", mutates_args={})
def _context_grad(grad: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    (count, num_copies), width = copies.shape, grad.shape[1]
    out = grad.new_empty(count, width)
    fp64 = grad.dtype == torch.float64
    launch_tiles(_context_grad_kernel, count, width, grad, copies, out, count, width, M=num_copies, FP64=fp64)
    return out


@torch.library.triton_op("ijepa::assemble_mask_grad", mutates_args={})
def _mask_grad(grad: torch.Tensor, mask_rows: torch.Tensor) -> torch.Tensor:
    count, width = mask_rows.shape[0], grad.shape[1]
    fp64 = grad.dtype == torch.float64
    rows, columns = tile(width)
    parts = blocks(count, MASK_ROWS)
    partial = grad.new_empty(parts, width, dtype=torch.float64 if fp64 else torch.float32)
    launch(
        _mask_grad_kernel,
        (parts, blocks(width, columns)),
        *(grad, mask_rows, partial, count, width),
        FP64=fp64,
        ROWS=MASK_ROWS,
        BLOCK_K=min(rows, MASK_ROWS),
        BLOCK_P=columns,
    )
    return partial.sum(dim=0)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, mask_token, _, _, _, copies, mask_rows = inputs
    ctx.mask_dtype = mask_token.dtype
    ctx.save_for_backward(copies, mask_rows)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    copies, mask_rows = ctx.saved_tensors
    grad = grad.contiguous()
    context_grad = _context_grad(grad, copies) if ctx.needs_input_grad[0] else None
    mask_grad = _mask_grad(grad, mask_rows).to(ctx.mask_dtype) if ctx.needs_input_grad[1] else None
    return context_grad, mask_grad, None, None, None, None, None


_assemble.register_autograd(_backward, setup_context=_setup)


# --- public


def assemble(
    context_TP: torch.Tensor,
    mask_token_P: torch.Tensor,
    pos_embed_NP: torch.Tensor,
    *,
    source_R: torch.Tensor,
    indices_R: torch.Tensor,
    copies_TM: torch.Tensor,
    mask_rows_K: torch.Tensor,
) -> torch.Tensor:
    """Context tokens and mask tokens, each with the position embedding of its patch (arXiv:2301.08243, section 3).

    context_TP: (T, P), any float dtype. mask_token_P: (P,). pos_embed_NP: (N, P), a constant. Indices are int32 or
    int64. source_R: (R,), a row of context_TP, or -1 for the mask token. indices_R: (R,), image * N + patch. What the
    backward adds up: copies_TM: (T, M), the rows whose source is each token, all of them; mask_rows_K: (K,), the rows
    whose source is -1. Returns (R, P) in the dtype of context_TP. Raises ValueError for another type, shape or device.
    """
    check_tokens(context_TP=context_TP, pos_embed_NP=pos_embed_NP, mask_token_P=mask_token_P[None])
    device, tokens, count = context_TP.device, context_TP.shape[0], source_R.shape[0]
    check_indices(device, low=-1, source_R=(source_R, tokens))
    check_indices(device, indices_R=(indices_R, 2**31), mask_rows_K=(mask_rows_K, count))
    check_indices(device, ndim=2, copies_TM=(copies_TM, count))
    if indices_R.shape[0] != count:
        raise ValueError(f"indices_R must be ({count},), got {tuple(indices_R.shape)}")
    if copies_TM.shape[0] != tokens:
        raise ValueError(f"copies_TM must have a row for each of {tokens} tokens, got {tuple(copies_TM.shape)}")
    if copies_TM.shape[0] * copies_TM.shape[1] + mask_rows_K.shape[0] != count:
        raise ValueError(
            f"copies_TM and mask_rows_K must name {count} rows between them, got {copies_TM.numel()} and "
            f"{mask_rows_K.numel()}"
        )
    if CHECK:
        expected = torch.full_like(source_R, -2).index_fill(0, mask_rows_K.long(), -1)
        owners = torch.arange(tokens, device=device, dtype=source_R.dtype)
        expected[copies_TM.long()] = owners[:, None].expand_as(copies_TM)
        wrong = (expected != source_R).nonzero()
        if len(wrong):
            raise ValueError(f"copies_TM and mask_rows_K do not agree with source_R at row {wrong[0].item()}")
    if not use_kernels(context_TP):
        return assemble_definition(context_TP, mask_token_P, pos_embed_NP, source_R, indices_R)
    return _assemble(
        context_TP.contiguous(),
        mask_token_P.contiguous(),
        pos_embed_NP.detach().contiguous(),
        source_R.contiguous(),
        indices_R.contiguous(),
        copies_TM.contiguous(),
        mask_rows_K.contiguous(),
    )
