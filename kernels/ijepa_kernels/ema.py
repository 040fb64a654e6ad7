"""The exponential moving average of weights."""

from __future__ import annotations

import torch

from ijepa_kernels.dispatch import blocks, check_written, jit, launch, tl, use_kernels

BLOCK = 4096  # elements a program averages

# --- definition


def ema_update_definition(
    ema: torch.Tensor, source: torch.Tensor, momentum: float, target: torch.Tensor | None = None
) -> torch.Tensor:
    ema.lerp_(source.to(ema.dtype), 1.0 - momentum)
    if target is not None:
        target.copy_(ema)
    return ema


# --- kernel: 14 bytes an element with an fp32 source and a bf16 target


@jit
def averaged(ema, source, weight, NEAR: tl.constexpr):
    """The average in fp32: in fp64, as memory is what this waits for, rounded once.

    weight: of the source where NEAR, else of ema; fp32: being at most 1/2, it adds little error.
    """
    ema, source = ema.to(tl.float64), source.to(tl.float64)
    if NEAR:
        ema += weight * (source - ema)
    else:
        ema = source + weight * (ema - source)
    return ema.to(tl.float32)


@jit
def _ema_kernel(
    ema_ptr,  # (COUNT,) in and out, fp32
    source_ptr,  # (COUNT,) in
    target_ptr,  # (COUNT,) out, or not used
    COUNT,
    weight,  # of averaged()
    NEAR: tl.constexpr, HAS_TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < COUNT
    ema = tl.load(ema_ptr + at, mask=mask, other=0.0)
    source = tl.load(source_ptr + at, mask=mask, other=0.0)
    ema = averaged(ema, source, weight, NEAR)
    tl.store(ema_ptr + at, ema, mask=mask)
    if HAS_TARGET:
        tl.store(target_ptr + at, ema.to(target_ptr.dtype.element_ty), mask=mask)


# --- operation


@torch.library.triton_op("ijepa::ema_update", mutates_args={"ema", "target"})
def _ema(ema: torch.Tensor, source: torch.Tensor, target: torch.Tensor | None, momentum: float) -> None:
    count = ema.numel()
    launch(
        _ema_kernel,
        (blocks(count, BLOCK),),
        *(ema, source, ema if target is None else target, count, min(momentum, 1.0 - momentum)),
        NEAR=momentum >= 0.5,
        HAS_TARGET=target is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )


# --- public


@torch.no_grad()
def ema_update(
    ema: torch.Tensor, source: torch.Tensor, momentum: float, target: torch.Tensor | None = None
) -> torch.Tensor:
    """ema = momentum * ema + (1 - momentum) * source, in place; its copy goes to target.

    ema: any shape, fp32 (or fp64, for the definition): in bf16 an average loses nearly all of its small updates.
    source: same shape, any float dtype. target: same shape, bf16, fp16 or fp32, or None. Momentum 1 leaves finite
    averages as they are, and momentum 0 makes them the source, exactly. The kernel wants ema and target contiguous.
    Returns ema. Raises ValueError for another type, shape, device or momentum.
    """
    if ema.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"ema must be float32, got {ema.dtype}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in 0..1, got {momentum}")
    for name, tensor in (("source", source), ("target", target)):
        if tensor is None:
            continue
        if tensor.shape != ema.shape:
            raise ValueError(f"{name} must be {tuple(ema.shape)} as ema, got {tuple(tensor.shape)}")
        if tensor.device != ema.device:
            raise ValueError(f"{name} must be on {ema.device}, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating type, got {tensor.dtype}")
    if not use_kernels(ema) or ema.dtype == torch.float64:
        return ema_update_definition(ema, source, momentum, target)
    check_written(ema=ema, target=target)
    _ema(ema, source.contiguous(), target, momentum)
    return ema
