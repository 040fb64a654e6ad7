"""The end of a step in one pass over a flat shard: AdamW, the weights' copy, their average and its copy."""

from __future__ import annotations

import math
from typing import Any

import torch

from ijepa_kernels.dispatch import blocks, check_written, jit, launch, tl, use_kernels
from ijepa_kernels.ema import averaged, ema_update_definition

BLOCK = 2048  # elements a program updates: 8 a thread, as a bf16 load of 16 bytes holds

# --- definition


def adamw_ema_definition(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: torch.Tensor,
    grad_scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ema: torch.Tensor | None = None,
    momentum: float = 1.0,
    target: torch.Tensor | None = None,
) -> None:
    """torch's fused AdamW, as torch.optim.AdamW(fused=True) calls it, then the average's definition."""
    grad = grad.to(master.dtype)
    if grad_scale is not None:
        grad = grad * grad_scale.to(master.dtype)
    rates: dict[str, Any] = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay, "eps": eps}
    torch._fused_adamw_([master], [grad], [exp_avg], [exp_avg_sq], [], [step], **rates, amsgrad=False, maximize=False)
    if weight is not None:
        weight.copy_(master)
    if ema is not None:
        ema_update_definition(ema, master, momentum, target)


# --- kernel


@jit
def _adamw_ema_kernel(
    master_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr,  # (COUNT,) in and out, fp32; grad in alone, of any type
    step_ptr, scale_ptr,  # () in, fp32; the scale or not used
    weight_ptr, ema_ptr, target_ptr,  # (COUNT,) out; ema in and out, fp32; each or not used
    COUNT, lr, weight_decay,
    ema_weight,  # of averaged()
    # All bits of these, where an argument has those of fp32. They are one and the same throughout a run.
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, EPS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_EMA: tl.constexpr, HAS_TARGET: tl.constexpr,
    NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < COUNT
    # What all elements share is computed in fp64: 1 - beta2**step in fp32 would lose digits in the first steps.
    step = tl.load(step_ptr).to(tl.float64)
    one = tl.full([], 1.0, tl.float64)
    beta1, beta2 = tl.full([], BETA1, tl.float64), tl.full([], BETA2, tl.float64)
    correction1 = one - tl.exp2(step * tl.full([], LOG2_BETA1, tl.float64))
    correction2 = tl.sqrt(one - tl.exp2(step * tl.full([], LOG2_BETA2, tl.float64))).to(tl.float32)
    step_size = (one * lr / correction1).to(tl.float32)
    decay = (one - one * lr * weight_decay).to(tl.float32)
    take1, take2 = (one - beta1).to(tl.float32), (one - beta2).to(tl.float32)

    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(scale_ptr)
    master = tl.load(master_ptr + at, mask=mask, other=0.0) * decay
    exp_avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
    exp_avg += take1 * (grad - exp_avg)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0) * beta2.to(tl.float32) + take2 * grad * grad
    root = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction2) + EPS
    master -= tl.div_rn(step_size * exp_avg, root)
    tl.store(master_ptr + at, master, mask=mask)
    tl.store(exp_avg_ptr + at, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=mask)
    if HAS_WEIGHT:
        tl.store(weight_ptr + at, master.to(weight_ptr.dtype.element_ty), mask=mask)
    if HAS_EMA:
        ema = averaged(tl.load(ema_ptr + at, mask=mask, other=0.0), master, ema_weight, NEAR)
        tl.store(ema_ptr + at, ema, mask=mask)
        if HAS_TARGET:
            tl.store(target_ptr + at, ema.to(target_ptr.dtype.element_ty), mask=mask)


# --- operation


@torch.library.triton_op(
    "ijepa::adamw_ema", mutates_args={"master", "exp_avg", "exp_avg_sq", "weight", "ema", "target"}
)
def _adamw_ema(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    grad_scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    ema: torch.Tensor | None,
    target: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum: float,
) -> None:
    count = master.numel()
    launch(
        _adamw_ema_kernel,
        (blocks(count, BLOCK),),
        *(master, grad, exp_avg, exp_avg_sq, step, step if grad_scale is None else grad_scale),
        *(master if tensor is None else tensor for tensor in (weight, ema, target)),
        *(count, lr, weight_decay, min(momentum, 1.0 - momentum)),
        BETA1=beta1,
        BETA2=beta2,
        LOG2_BETA1=math.log2(beta1) if beta1 else -1e9,
        LOG2_BETA2=math.log2(beta2) if beta2 else -1e9,
        EPS=eps,
        HAS_SCALE=grad_scale is not None,
        HAS_WEIGHT=weight is not None,
        HAS_EMA=ema is not None,
        HAS_TARGET=target is not None,
        NEAR=momentum >= 0.5,
        BLOCK=BLOCK,
        num_warps=8,
    )


# --- public


@torch.no_grad()
def adamw_ema(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | torch.Tensor,
    grad_scale: float | torch.Tensor = 1.0,
    weight: torch.Tensor | None = None,
    ema: torch.Tensor | None = None,
    momentum: float = 1.0,
    target: torch.Tensor | None = None,
) -> None:
    """One step of AdamW on fp32 masters, in place; then weight = master, ema as by ema_update, and target = ema.

    master, exp_avg, exp_avg_sq: one shape, fp32 (or fp64, for the definition). grad: same shape, any float dtype, read
    as grad * grad_scale in fp32 and not written. step: of this update, the first being 1; a number, or what
    torch.optim.AdamW(fused=True) keeps as "step" once it has added 1: () fp32 on the device. grad_scale: a number, or
    one on the device in fp32, so that clipping by a norm waits for nothing. weight: same shape, any float dtype, or
    None. ema: as master, or None; momentum: in 0..1. target: any float dtype, or None. No lr, step, momentum or scale
    compiles anything anew. The kernel wants all but grad contiguous. Raises ValueError for another type, shape, device
    or range.

    AdamW is torch's: the decay decoupled, eps outside of the root (arXiv:1711.05101). On a CPU the bits are those of
    torch.optim.AdamW(fused=True) and then ema_update. The kernel computes what all elements share in fp64 (torch's for
    CUDA has the bias corrections from pow in fp32), and each element in fp32 in torch's order. It is within these
    distances of float64: exp_avg 2 ulp of the larger of itself and the gradient, exp_avg_sq 4, master 1 and 8 of the
    update that it takes. weight, ema and target have the bits of a copy of that master, of ema_update with it, and of a
    copy of that.

    Bytes a parameter, with bf16 copies: master, gradient, moments and ema are read, 20 (18 where the gradient is bf16);
    master, moments, weight, ema and target are written, 20. Apart, AdamW moves 28, the copy 6 and ema_update 14.
    """
    _check_numbers(betas, momentum, lr=lr, eps=eps, weight_decay=weight_decay)
    state: dict[str, Any] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    copies: dict[str, Any] = {"weight": weight, "target": target}
    _check_tensors(master, state, {"grad": grad, **copies})
    step = _on_device("step", step, master.device)
    scale = None if not isinstance(grad_scale, torch.Tensor) and grad_scale == 1 else grad_scale
    scale = None if scale is None else _on_device("grad_scale", scale, master.device)
    if not use_kernels(master) or master.dtype == torch.float64:
        rates: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "step": step,
            "grad_scale": scale,
        }
        adamw_ema_definition(master, grad, exp_avg, exp_avg_sq, **rates, ema=ema, momentum=momentum, **copies)
        return
    check_written(master=master, **state, **copies)
    tensors = (master, grad.contiguous(), exp_avg, exp_avg_sq, step, scale, weight, ema, target)
    _adamw_ema(*tensors, lr, *betas, eps, weight_decay, momentum)


def _check_numbers(betas: tuple[float, float], momentum: float, **others: float) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be 0 or more and below 1, got {betas}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in 0..1, got {momentum}")
    for name, value in others.items():
        if not value >= 0.0:
            raise ValueError(f"{name} must be 0 or more, got {value}")


def _check_tensors(master: torch.Tensor, state: dict[str, Any], others: dict[str, Any]) -> None:
    """That all are of master's shape and on its device, the state of its dtype, the others of a floating type."""
    if master.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"master must be float32, got {master.dtype}")
    if others["target"] is not None and state["ema"] is None:
        raise ValueError("target is a copy of ema, and ema is None; pass ema too, or no target")
    for name, tensor in {**state, **others}.items():
        if tensor is None:
            continue
        if tensor.shape != master.shape:
            raise ValueError(f"{name} must be {tuple(master.shape)} as master, got {tuple(tensor.shape)}")
        if tensor.device != master.device:
            raise ValueError(f"{name} must be on {master.device}, got {tensor.device}")
        if name in state and tensor.dtype != master.dtype:
            raise ValueError(f"{name} must be {master.dtype} as master, got {tensor.dtype}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating type, got {tensor.dtype}")


def _on_device(name: str, value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The number, () in fp32; where it is one of the host's, nobody waits for it either."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=torch.float32, device=device)
    if value.numel() != 1 or value.dtype != torch.float32 or value.device != device:
        got = f"{tuple(value.shape)}, {value.dtype}, {value.device}"
        raise ValueError(f"{name} must be a number, or one in float32 on {device}, got {got}")
    return value.reshape(())
