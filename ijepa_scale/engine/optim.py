"""Parameter groups and AdamW."""

from typing import Any

import torch


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Context encoder and predictor, each with and without weight decay (none on biases and 1-D parameters).

    Keys besides params: name; decay, whether the weight-decay schedule applies; ema, whether the target encoder
    follows.
    """
    groups = []
    for part in ("context_encoder", "predictor"):
        parameters = list(getattr(model, part).parameters())
        for decay in (True, False):
            groups.append(
                {
                    "params": [p for p in parameters if (len(_shape(p)) > 1) == decay],
                    "name": f"{part}.{'decay' if decay else 'no_decay'}",
                    "decay": decay,
                    "ema": part == "context_encoder",
                    "weight_decay": 0.0,
                }
            )
    return groups


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # a parameter partitioned by ZeRO-3 is empty between uses


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """torch's fused AdamW: one launch a group, nothing compiled at run time, on CPU and CUDA."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_schedules(groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
    for group in groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decay"] else 0.0
