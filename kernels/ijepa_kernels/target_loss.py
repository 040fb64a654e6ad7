"""The loss against layer-normalized targets, gathered from outputs of the target encoder's blocks.

T predictions, U target tokens, D the encoder's width, L layers, F = L * D the width of a prediction: its columns
l * D .. (l + 1) * D - 1 answer layer l.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ijepa_kernels.dispatch import blocks, check_indices, check_tokens, jit, launch, tl, use_kernels

LOSSES: dict[str, Callable[..., torch.Tensor]] = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}
SCALED = 4096  # elements a program scales

# --- definition


def target_loss_definition(
    pred_TF: torch.Tensor,
    targets: torch.Tensor | Sequence[torch.Tensor],
    indices_T: torch.Tensor,
    kind: str = "smooth_l1",
    eps: float = 1e-5,
    norm: bool = True,
) -> torch.Tensor:
    compute = torch.float64 if pred_TF.dtype == torch.float64 else torch.float32
    targets = _listed(targets)
    losses = []
    for pred_TD, target_UD in zip(pred_TF.to(compute).chunk(len(targets), dim=1), targets, strict=True):
        rows_TD = target_UD.detach().index_select(0, indices_T).to(compute)
        if norm:
            rows_TD = F.layer_norm(rows_TD, rows_TD.shape[-1:], eps=eps)
        losses.append(LOSSES[kind](pred_TD, rows_TD))
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _listed(targets: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [targets] if isinstance(targets, torch.Tensor) else list(targets)


# --- kernels


@jit
def _power(rows, columns):
    """The largest power of two up to rows * columns, fp32."""
    return ((rows.to(tl.float32) * columns).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@jit
def _divided(a, b, FP64: tl.constexpr):
    """a / b, rounded once: in fp32 what `/` gives on a GPU is near it."""
    if FP64:
        return a / b
    else:
        return tl.div_rn(a, b)


@jit
def _target_loss_kernel(
    pred_ptr,  # (T, F) in, D columns of it from START
    target_ptr,  # (U, D) in, of one layer
    indices_ptr,  # (T,) in
    row_loss_ptr,  # (L, T) out, fp32 or fp64, mean over D; the layer's row
    grad_ptr,  # (T, F) out, as of pred: d(mean loss) / d(pred) times a power of two: fp16 does not hold it as it is
    D, F, START, EPS: tl.constexpr,  # as a number torch.compile would hand it over in fp64
    NORM: tl.constexpr, SMOOTH_L1: tl.constexpr, GRAD: tl.constexpr, FP64: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)  # one row a program; t * F may pass 2**31
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    accumulate: tl.constexpr = tl.float64 if FP64 else tl.float32
    row = tl.load(indices_ptr + t).to(tl.int64)
    pred = tl.load(pred_ptr + t * F + START + d, mask=mask, other=0.0).to(accumulate)
    target = tl.load(target_ptr + row * D + d, mask=mask, other=0.0).to(accumulate)
    width = tl.full([], D, accumulate)
    if NORM:
        mean = _divided(tl.sum(target, axis=0), width, FP64)
        centered = tl.where(mask, target - mean, 0.0)
        variance = _divided(tl.sum(centered * centered, axis=0), width, FP64) + EPS
        deviation = tl.sqrt(variance) if FP64 else tl.sqrt_rn(variance)
        target = centered * _divided(1.0, deviation, FP64)
    error = tl.where(mask, pred - target, 0.0)
    if SMOOTH_L1:  # beta 1
        size = tl.abs(error)
        loss = tl.where(size < 1, 0.5 * error * error, size - 0.5)
        slope = tl.minimum(tl.maximum(error, -1.0), 1.0)
    else:
        loss = error * error
        slope = 2 * error
    rows = tl.num_programs(0)
    layer = tl.full([], START, tl.int64) // D
    tl.store(row_loss_ptr + layer * rows + t, _divided(tl.sum(loss, axis=0), width, FP64))
    if GRAD:
        scale = _divided(_power(rows, F).to(accumulate), rows.to(accumulate) * F, FP64)
        tl.store(grad_ptr + t * F + START + d, (slope * scale).to(grad_ptr.dtype.element_ty), mask=mask)


@jit
def _scale_kernel(
    grad_ptr,  # (T, F) in, of _target_loss_kernel
    factor_ptr,  # () in, fp32 or fp64
    out_ptr,  # (T, F) out
    T, F, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.full([], T, tl.int64) * F
    factor = tl.load(factor_ptr)
    factor = factor * tl.div_rn(1.0, _power(tl.full([], T, tl.int32), F)).to(factor.dtype)  # a power of two: exact
    values = tl.load(grad_ptr + at, mask=mask, other=0.0).to(factor.dtype) * factor
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=mask)


# --- autograd


@torch.library.triton_op("ijepa::target_loss", mutates_args={})
def _target_loss(
    pred: torch.Tensor,
    targets: Sequence[torch.Tensor],
    indices: torch.Tensor,
    smooth_l1: bool,
    eps: float,
    norm: bool,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss, and its gradient times a power of two.

    A launch a layer, which reads and writes columns of its own: all tensors are passed over once.
    """
    (count, columns), width = pred.shape, targets[0].shape[1]
    fp64 = pred.dtype == torch.float64
    row_loss = pred.new_empty(len(targets) * count, dtype=torch.float64 if fp64 else torch.float32)
    grad = torch.empty_like(pred) if with_grad else pred.new_empty(0)
    block = 1 << max(4, (width - 1).bit_length())
    for layer, target in enumerate(targets):
        launch(
            _target_loss_kernel,
            (count,),
            *(pred, target, indices, row_loss, grad, width, columns, layer * width),
            EPS=eps,
            NORM=norm,
            SMOOTH_L1=smooth_l1,
            GRAD=with_grad,
            FP64=fp64,
            BLOCK_D=block,
            num_warps=max(1, min(8, block // 512)),  # 16 columns a thread: an SM holds more rows than with 8
        )
    return row_loss.mean(), grad


@torch.library.triton_op("ijepa::target_loss_grad", mutates_args={})
def _scaled(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The gradient for an upstream gradient, rounded once where that is a power of two, as in plain training."""
    count, width = grad.shape
    out = torch.empty_like(grad)
    launch(_scale_kernel, (blocks(count * width, SCALED),), grad, factor, out, count, width, BLOCK=SCALED)
    return out


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.layers = len(inputs[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
    (grad,) = ctx.saved_tensors
    return None if grad_loss is None else _scaled(grad, grad_loss), [None] * ctx.layers, None, None, None, None, None


_target_loss.register_autograd(_backward, setup_context=_setup)


# --- public


def target_loss(
    pred_TF: torch.Tensor,
    targets: torch.Tensor | Sequence[torch.Tensor],
    indices_T: torch.Tensor,
    kind: str = "smooth_l1",
    eps: float = 1e-5,
    *,
    norm: bool = True,
) -> torch.Tensor:
    """Mean smooth-L1 (beta 1) or squared error over the target tokens (I-JEPA, arXiv:2301.08243, section 3).

    pred_TF: (T, L * D), any float dtype. targets: L constants, (U, D) each, a tensor for one: outputs of as many of the
    target encoder's blocks (Bootleg, arXiv:2603.15553). Row indices_T[t] of layer l answers columns l * D to
    (l + 1) * D - 1 of prediction t; each layer's rows are layer-normalized over D without affine, unless norm
    is off. indices_T: (T,) int32 or int64. Returns a scalar, fp32 (fp64 for fp64 input); of no predictions it is NaN.
    Raises ValueError for another type, shape or device.
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}; choose one of {', '.join(LOSSES)}")
    targets = _listed(targets)
    if not targets:
        raise ValueError("targets holds no layer; give one (U, D) tensor or more")
    check_tokens(pred_TF=pred_TF)
    check_tokens(**{f"targets[{layer}]": target for layer, target in enumerate(targets)})
    rows, width = targets[0].shape
    if pred_TF.shape[1] != len(targets) * width or any(target.shape[0] != rows for target in targets):
        raise ValueError(
            f"targets must be (rows, D) each, all of as many rows, and pred_TF (T, {len(targets)} * D), got "
            f"{[tuple(target.shape) for target in targets]} and {tuple(pred_TF.shape)}"
        )
    check_indices(pred_TF.device, indices_T=(indices_T, rows))
    check_indices(targets[0].device, indices_T=(indices_T, rows))
    if indices_T.shape[0] != pred_TF.shape[0]:
        raise ValueError(f"indices_T must be ({pred_TF.shape[0]},), got {tuple(indices_T.shape)}")
    if not use_kernels(pred_TF):
        return target_loss_definition(pred_TF, targets, indices_T, kind, eps, norm)
    with_grad = pred_TF.requires_grad and torch.is_grad_enabled()
    loss, _ = _target_loss(
        pred_TF.contiguous(),
        [target.detach().contiguous() for target in targets],
        indices_T.contiguous(),
        kind == "smooth_l1",
        eps,
        norm,
        with_grad,
    )
    return loss
