"""The loss against layer-normalized targets, gathered from the target encoder's dense output."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

LOSSES: dict[str, Callable[..., torch.Tensor]] = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}


def target_loss(
    pred_TD: torch.Tensor, target_MD: torch.Tensor, indices_T: torch.Tensor, kind: str = "smooth_l1", eps: float = 1e-5
) -> torch.Tensor:
    """Mean smooth-L1 (beta 1) or squared error over the target tokens (I-JEPA, arXiv:2301.08243, section 3).

    pred_TD: (T, D). target_MD: (M, D) target encoder output, a constant; row indices_T[t] answers prediction t; its
    rows are layer-normalized over D without affine. Returns a scalar, fp32 (fp64 for fp64 input).
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}; choose one of {', '.join(LOSSES)}")
    compute = torch.float64 if pred_TD.dtype == torch.float64 else torch.float32
    rows_TD = target_MD.detach().index_select(0, indices_T).to(compute)
    normalized_TD = F.layer_norm(rows_TD, rows_TD.shape[-1:], eps=eps)
    return LOSSES[kind](pred_TD.to(compute), normalized_TD)
