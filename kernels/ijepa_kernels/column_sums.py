"""What programs summed over their rows, added up: gradients of biases and of LayerNorm's weights, without atomics."""

from __future__ import annotations

import torch

from ijepa_kernels.dispatch import blocks, jit, launch, tl

COLUMNS = 32  # that a program adds up: 128 bytes of each row

# --- definition


def column_sums_definition(sums_KPD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return sums_KPD.sum(1).to(dtype)


# --- kernel


@jit
def _column_sums_kernel(
    sums_ptr,  # (K, R, D) in, fp32 or fp64
    out_ptr,  # (K, D) out
    R, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=sums_ptr.dtype.element_ty)
    for first in range(0, R, ROWS):
        p = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (p < R)[:, None] & (d < D)[None, :]
        total += tl.load(sums_ptr + (k * R + p)[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + k * D + d, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=d < D)


def column_sums(sums_KPD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(K, P, D) sums of P programs, fp32 or fp64, contiguous, to their sums over P in a fixed order, (K, D) of a dtype.

    To be called where kernels run.
    """
    kinds, programs, width = sums_KPD.shape
    out = sums_KPD.new_empty(kinds, width, dtype=dtype)
    grid = (blocks(width, COLUMNS), kinds)
    launch(_column_sums_kernel, grid, sums_KPD, out, programs, width, ROWS=64, COLUMNS=COLUMNS)
    return out
