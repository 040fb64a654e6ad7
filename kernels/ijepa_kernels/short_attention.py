"""Attention within packed sequences of a few hundred tokens. T packed tokens, S sequences, H heads of width E."""

from __future__ import annotations

from itertools import pairwise

import torch

from ijepa_kernels.dispatch import jit, launch, tl, use_kernels

# Rows of a tile: what one group of four warps multiplies at once on H100. A program takes one head of one sequence.
FORWARD = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
BACKWARD = {"OWN": 64, "OTHER": 32, "num_warps": 4, "num_stages": 1}
LOG2_E = 1.4426950408889634

# --- definition


def short_attention_definition(qkv_T3HE: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    outputs = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        q, k, v = qkv_T3HE[start:stop].permute(1, 2, 0, 3)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


# --- kernels. Addresses: 64 bits up to a sequence's first row, 32 within it. A head's row is one part, or two: 80
# values are 64 and 16, not 128 of which 48 are zeros. What holds rows is a tuple of parts


@jit
def _mask(i, length, e, E: tl.constexpr):
    return (i < length)[:, None] & (e < E)[None, :]


@jit
def _load(ptr, i, length, STRIDE: tl.constexpr, E: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Rows i of a head, zeros past the sequence and past E."""
    e = tl.arange(0, FIRST)
    first = tl.load(ptr + (i[:, None] * STRIDE + e[None, :]), mask=_mask(i, length, e, E), other=0.0)
    if REST > 0:
        e = FIRST + tl.arange(0, REST)
        rest = tl.load(ptr + (i[:, None] * STRIDE + e[None, :]), mask=_mask(i, length, e, E), other=0.0)
        return first, rest
    else:
        return (first,)


@jit
def _store(ptr, rows, scale, i, length, STRIDE: tl.constexpr, E: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    kind: tl.constexpr = ptr.dtype.element_ty
    e = tl.arange(0, FIRST)
    tl.store(ptr + (i[:, None] * STRIDE + e[None, :]), (rows[0] * scale).to(kind), mask=_mask(i, length, e, E))
    if REST > 0:
        e = FIRST + tl.arange(0, REST)
        tl.store(ptr + (i[:, None] * STRIDE + e[None, :]), (rows[1] * scale).to(kind), mask=_mask(i, length, e, E))


@jit
def _zeros(ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    first = tl.zeros([ROWS, FIRST], dtype=tl.float32)
    return (first, tl.zeros([ROWS, REST], dtype=tl.float32)) if REST > 0 else (first,)


@jit
def _times(a, b, REST: tl.constexpr):
    """(rows of a, rows of b): all products of two rows."""
    products = tl.dot(a[0], b[0].T, input_precision="ieee")
    if REST > 0:
        products = tl.dot(a[1], b[1].T, products, input_precision="ieee")
    return products


@jit
def _sum(weights, rows, sums, shrink, REST: tl.constexpr):
    """shrink * sums + weights @ rows."""
    first = tl.dot(weights, rows[0], sums[0] * shrink, input_precision="ieee")
    if REST == 0:
        return (first,)
    else:
        return (first, tl.dot(weights, rows[1], sums[1] * shrink, input_precision="ieee"))


@jit
def _bounds(cu_seqlens_ptr, H: tl.constexpr):
    """Of this program's sequence the first row and the length; and the head."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    start = tl.load(cu_seqlens_ptr + sequence.to(tl.int64))
    length = tl.load(cu_seqlens_ptr + sequence.to(tl.int64) + 1) - start
    return start.to(tl.int64), length, head.to(tl.int64)


@jit
def _short_attention_kernel(
    qkv_ptr,  # (T, 3, H, E) in
    cu_seqlens_ptr,  # (S + 1,) in
    out_ptr,  # (T, H, E) out
    normalizers_ptr,  # (T * H,) out, fp32: log2 of the sum of 2**score; sequence by sequence, and in each head by head
    SCALE: tl.constexpr,  # of scores, to base 2; as a number torch.compile would hand it over in fp64
    H: tl.constexpr, E: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    start, length, head = _bounds(cu_seqlens_ptr, H)
    OUT: tl.constexpr = H * E
    IN: tl.constexpr = 3 * OUT
    q_ptr = qkv_ptr + (start * IN + head * E)
    out_ptr += start * OUT + head * E
    normalizers_ptr += start * H + head * length
    for query in range(0, length, BLOCK_Q):
        i = query + tl.arange(0, BLOCK_Q)
        q = _load(q_ptr, i, length, IN, E, FIRST, REST)
        top = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
        sums = _zeros(BLOCK_Q, FIRST, REST)
        for key in range(0, length, BLOCK_K):
            j = key + tl.arange(0, BLOCK_K)
            k = _load(q_ptr + OUT, j, length, IN, E, FIRST, REST)
            v = _load(q_ptr + 2 * OUT, j, length, IN, E, FIRST, REST)
            scores = tl.where((j < length)[None, :], _times(q, k, REST), float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1) * SCALE)
            weights = tl.exp2(scores * SCALE - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(weights, axis=1)
            sums = _sum(weights.to(v[0].dtype), v, sums, shrink[:, None], REST)
            top = higher
        _store(out_ptr, sums, 1.0 / total[:, None], i, length, OUT, E, FIRST, REST)
        tl.store(normalizers_ptr + i, top + tl.log2(total), mask=i < length)


@jit
def _store_deltas(
    grad_ptr, out_ptr, deltas_ptr, length,
    STRIDE: tl.constexpr, E: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each row the sum of out * its gradient, for what comes later in the same program."""
    for row in range(0, length, ROWS):
        i = row + tl.arange(0, ROWS)
        grad = _load(grad_ptr, i, length, STRIDE, E, FIRST, REST)
        out = _load(out_ptr, i, length, STRIDE, E, FIRST, REST)
        deltas = tl.sum(grad[0].to(tl.float32) * out[0].to(tl.float32), axis=1)
        if REST > 0:
            deltas += tl.sum(grad[1].to(tl.float32) * out[1].to(tl.float32), axis=1)
        tl.store(deltas_ptr + i, deltas, mask=i < length)
    tl.debug_barrier()  # what one thread has written others read


@jit
def _short_attention_grad_kernel(
    grad_ptr, out_ptr,  # (T, H, E) in
    qkv_ptr,  # (T, 3, H, E) in
    cu_seqlens_ptr,  # (S + 1,) in
    normalizers_ptr,  # (T * H,) in
    deltas_ptr,  # (T * H,) fp32, as the normalizers: written, and read again
    into_ptr,  # (T, 3, H, E) out
    SCALE: tl.constexpr, ROOT: tl.constexpr,  # ROOT: scale without the base
    H: tl.constexpr, E: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """For OWN keys after OWN keys over all queries, OTHER at a time; then for OWN queries over all keys."""
    start, length, head = _bounds(cu_seqlens_ptr, H)
    OUT: tl.constexpr = H * E
    IN: tl.constexpr = 3 * OUT
    q_ptr = qkv_ptr + (start * IN + head * E)
    into_ptr += start * IN + head * E
    grad_ptr += start * OUT + head * E
    out_ptr += start * OUT + head * E
    normalizers_ptr += start * H + head * length
    deltas_ptr += start * H + head * length
    _store_deltas(grad_ptr, out_ptr, deltas_ptr, length, OUT, E, FIRST, REST, OWN)
    for key in range(0, length, OWN):
        j = key + tl.arange(0, OWN)
        k = _load(q_ptr + OUT, j, length, IN, E, FIRST, REST)
        v = _load(q_ptr + 2 * OUT, j, length, IN, E, FIRST, REST)
        grad_k, grad_v = _zeros(OWN, FIRST, REST), _zeros(OWN, FIRST, REST)
        for query in range(0, length, OTHER):
            i = query + tl.arange(0, OTHER)
            q = _load(q_ptr, i, length, IN, E, FIRST, REST)
            grad = _load(grad_ptr, i, length, OUT, E, FIRST, REST)
            normalizers = tl.load(normalizers_ptr + i, mask=i < length, other=0.0)
            deltas = tl.load(deltas_ptr + i, mask=i < length, other=0.0)
            weights = tl.exp2(_times(k, q, REST) * SCALE - normalizers[None, :])
            # Past the sequence weights of keys may be infinite; rows of queries and gradients are zeros there.
            weights = tl.where((j < length)[:, None], weights, 0.0)
            grad_v = _sum(weights.to(q[0].dtype), grad, grad_v, 1.0, REST)
            slopes = weights * (_times(v, grad, REST) - deltas[None, :])
            grad_k = _sum(slopes.to(q[0].dtype), q, grad_k, 1.0, REST)
        _store(into_ptr + OUT, grad_k, ROOT, j, length, IN, E, FIRST, REST)
        _store(into_ptr + 2 * OUT, grad_v, 1.0, j, length, IN, E, FIRST, REST)
    for query in range(0, length, OWN):
        i = query + tl.arange(0, OWN)
        q = _load(q_ptr, i, length, IN, E, FIRST, REST)
        grad = _load(grad_ptr, i, length, OUT, E, FIRST, REST)
        normalizers = tl.load(normalizers_ptr + i, mask=i < length, other=0.0)
        deltas = tl.load(deltas_ptr + i, mask=i < length, other=0.0)
        grad_q = _zeros(OWN, FIRST, REST)
        for key in range(0, length, OTHER):
            j = key + tl.arange(0, OTHER)
            k = _load(q_ptr + OUT, j, length, IN, E, FIRST, REST)
            v = _load(q_ptr + 2 * OUT, j, length, IN, E, FIRST, REST)
            weights = tl.exp2(_times(q, k, REST) * SCALE - normalizers[:, None])
            weights = tl.where((j < length)[None, :], weights, 0.0)
            slopes = weights * (_times(grad, v, REST) - deltas[:, None])
            grad_q = _sum(slopes.to(k[0].dtype), k, grad_q, 1.0, REST)
        _store(into_ptr, grad_q, ROOT, i, length, IN, E, FIRST, REST)


# --- autograd


def _widths(width: int) -> dict[str, int]:
    """The parts of a head's row, powers of two: of two the second, of 16 and more, takes up what the first leaves."""
    whole = 1 << max(4, (width - 1).bit_length())
    half = whole // 2
    rest = 1 << max(4, (width - half - 1).bit_length())
    return {"FIRST": half, "REST": rest} if half >= 64 and half + rest < whole else {"FIRST": whole, "REST": 0}


@torch.library.triton_op("ijepa::short_attention", mutates_args={})
def _short_attention(qkv: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(tokens, heads, width)
    normalizers = qkv.new_empty(tokens * heads, dtype=torch.float32)
    grid = ((cu_seqlens.shape[0] - 1) * heads,)
    options = {"SCALE": LOG2_E * width**-0.5, "H": heads, "E": width, **_widths(width), **FORWARD}
    launch(_short_attention_kernel, grid, qkv, cu_seqlens, out, normalizers, **options)
    return out, normalizers


@torch.library.triton_op("ijepa::short_attention_grad", mutates_args={})
def _grad(
    grad: torch.Tensor, out: torch.Tensor, qkv: torch.Tensor, cu_seqlens: torch.Tensor, normalizers: torch.Tensor
) -> torch.Tensor:
    _, _, heads, width = qkv.shape
    into, deltas = torch.empty_like(qkv), torch.empty_like(normalizers)
    grid = ((cu_seqlens.shape[0] - 1) * heads,)
    options = {"SCALE": LOG2_E * width**-0.5, "ROOT": width**-0.5, "H": heads, "E": width}
    options |= {**_widths(width), **BACKWARD}
    tensors = (grad, out, qkv, cu_seqlens, normalizers, deltas, into)
    launch(_short_attention_grad_kernel, grid, *tensors, **options)
    return into


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else zeros are written for the normalizers in every backward
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    qkv, cu_seqlens, out, normalizers = ctx.saved_tensors
    return _grad(grad.contiguous(), out, qkv, cu_seqlens, normalizers), None


_short_attention.register_autograd(_backward, setup_context=_setup)


# --- public


def short_attention(qkv_T3HE: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Softmax attention within each packed sequence, none across, (T, H, E) in the dtype of qkv_T3HE.

    qkv_T3HE: (T, 3, H, E), any float dtype; fp64 goes to the definition. cu_seqlens: (S + 1,) int32 on its device:
    sequence s is rows cu_seqlens[s]:cu_seqlens[s + 1], of any length. Rows of no sequence stay as they were in memory.
    Raises ValueError for another type, shape or device.

    FlashAttention-2 (arXiv:2307.08691) for sequences of a few hundred tokens: a program takes one head of one sequence
    from its first row to its last, so what it reads again is still in the cache. The backward sums the products of rows
    of out and its gradient where it needs them, and writes the gradients of q, k and v into one tensor, in a fixed
    order, without atomics: seven products of two tiles, where adding up q's in memory would need five.
    """
    if qkv_T3HE.ndim != 4 or qkv_T3HE.shape[1] != 3:
        raise ValueError(f"qkv_T3HE must be (tokens, 3, heads, head width), got {tuple(qkv_T3HE.shape)}")
    if not qkv_T3HE.is_floating_point():
        raise ValueError(f"qkv_T3HE must be of a floating type, got {qkv_T3HE.dtype}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
        raise ValueError(f"cu_seqlens must be int32, (S + 1,), got {cu_seqlens.dtype}, {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != qkv_T3HE.device:
        raise ValueError(f"cu_seqlens must be on {qkv_T3HE.device}, got {cu_seqlens.device}")
    if qkv_T3HE.dtype == torch.float64 or not use_kernels(qkv_T3HE):
        return short_attention_definition(qkv_T3HE, cu_seqlens)
    return _short_attention(qkv_T3HE.contiguous(), cu_seqlens.contiguous())[0]
