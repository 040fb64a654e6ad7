"""Parameter groups, and the optimizer of them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ijepa_scale.engine.muon import MuonAndAdamW


def parameter_groups(
    networks: dict[str, nn.Module],
    averaged: Iterable[tuple[nn.Parameter, nn.Parameter]],
    muon: type[nn.Module] | tuple[()] = (),
) -> list[dict[str, Any]]:
    """Each network's parameters with and without weight decay (none on biases and 1-D parameters).

    averaged: pairs of a parameter and its EMA. muon: matrices in modules of this class are a group of their own, whose
    optimizer is Muon. Keys besides params: name; decay, whether the weight-decay schedule applies; muon; ema, whether
    there is an EMA of them all; ema_momentum. ValueError for a network that is averaged in part.
    """
    followed = {id(parameter) for parameter, _ in averaged}
    groups = []
    for name, network in networks.items():
        parameters = list(network.parameters())
        ema = {id(parameter) in followed for parameter in parameters}
        if len(ema) > 1:
            raise ValueError(f"an EMA follows some parameters of {name} and not the others; give these apart")
        blocks = [module for module in network.modules() if isinstance(module, muon)]
        matrices = {p for block in blocks for p in block.parameters() if len(_shape(p)) == 2}
        decay = [p for p in parameters if len(_shape(p)) > 1 and p not in matrices]
        no_decay = [p for p in parameters if len(_shape(p)) <= 1]
        kinds = {"muon": [p for p in parameters if p in matrices], "decay": decay, "no_decay": no_decay}
        for kind, chosen in kinds.items():
            if kind != "muon" or chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": f"{name}.{kind}",
                        "decay": kind != "no_decay",
                        "muon": kind == "muon",
                        "ema": True in ema,
                        "ema_momentum": 1.0,
                        "weight_decay": 0.0,
                    }
                )
    return groups


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # a parameter partitioned by ZeRO-3 is empty between uses


def make_optimizer(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """torch's fused AdamW: one launch a group, nothing compiled at run time, on CPU and CUDA; and Muon where asked."""
    kind = MuonAndAdamW if any(group["muon"] for group in groups) else torch.optim.AdamW
    return kind(groups, lr=0.0, betas=betas, fused=True)


def set_schedules(groups: list[dict[str, Any]], *, lr: float, weight_decay: float, ema_momentum: float = 1.0) -> None:
    """What the next step goes by. ema_momentum: of the EMA of what has one."""
    for group in groups:
        group["ema_momentum"] = ema_momentum
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decay"] else 0.0
