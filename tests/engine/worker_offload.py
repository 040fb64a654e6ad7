"""Runs inside ranks: training with the optimizer's state on the host beside training without; the facts go to JSON."""

import json
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.engine import distributed, zero
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.optim import set_schedules
from tests.engine import tiny
from tests.engine.worker_zero_parity import schedule

STEPS = 6
BAD_STEP = 3  # one rank's loss is NaN here
KINDS = ("masters", "ema", "exp_avg", "exp_avg_sq", "weights")


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def apart(engine: Any, ema: Any) -> bool:
    """Whether no master or average is at once what the forward uses, as they are in fp32 without offload."""
    optimizer = engine.optimizer
    used = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    own = [*zero.masters(optimizer), *(shard for shard in ema.shards if shard is not None)]
    return not any(shares_memory(a.detach(), b.detach()) for a in own for b in used)


def train(ranks: Ranks, *, accumulation: int, **options: Any) -> dict[str, Any]:
    engine, ema = tiny.start_engine(ranks, accumulation=accumulation, **options)
    device = torch.device(engine.device)
    losses, norms, applied = [], [], []
    for step in range(STEPS):
        lr, weight_decay, momentum = schedule(step)
        set_schedules(engine.optimizer.optimizer.param_groups, lr=lr, weight_decay=weight_decay, ema_momentum=momentum)
        for images, masks in tiny.micro_batches(step, ranks, accumulation):
            loss = engine(images.to(device), masks.to(device))["loss"]
            if step == BAD_STEP and ranks.rank + 1 == ranks.world_size:
                loss = loss * torch.nan
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        applied.append(engine.was_step_applied())
        norms.append(float(engine.get_global_grad_norm()))
        if applied[-1]:
            ema.update()
    ema.wait()
    flats = {"masters": zero.masters(engine.optimizer), "ema": ema.shards}
    flats |= {kind: tiny.moments(engine, kind) for kind in ("exp_avg", "exp_avg_sq")}
    state = {kind: tiny.gathered(engine, ranks, one) for kind, one in flats.items()}
    state["weights"] = tiny.weights_of(engine, "")
    everything = [one for kind in flats.values() for one in kind if one is not None]
    travelling = getattr(engine.optimizer, "_travelling", {})
    if zero.is_stage3(engine.optimizer):
        travelling = {"gradients": engine.optimizer.grad_partitions_flat_buffer}
    return {
        "losses": losses,
        "norms": norms,
        "applied": applied,
        "state": state,
        "apart": apart(engine, ema),
        "on": sorted({one.device.type for one in everything}),
        "travelling": sorted(travelling),
        "pinned": all(one.is_pinned() for one in travelling.values()),
    }


def compare(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    usual, offloaded = (train(ranks, offload=offload, **case) for offload in (False, True))
    differences = {kind: tiny.largest_difference(usual["state"][kind], offloaded["state"][kind]) for kind in KINDS}
    good = [(a, b) for a, b in zip(usual["norms"], offloaded["norms"], strict=True) if a < float("inf")]
    return {
        "differences": differences,
        "moved": float(max(v.abs().max() for v in usual["state"]["exp_avg"].values())),
        "losses": max(abs(a - b) for a, b in zip(usual["losses"], offloaded["losses"], strict=True) if a == a),
        "norms": max(abs(a / b - 1) for a, b in good),
        "applied": [usual["applied"], offloaded["applied"], [step != BAD_STEP for step in range(STEPS)]],
        **{f"usual_{key}": usual[key] for key in ("apart", "on", "travelling")},
        **{key: offloaded[key] for key in ("apart", "on", "travelling", "pinned")},
    }


def run(result: str, cases: list[dict[str, Any]]) -> None:
    """cases: arguments of tiny.start_engine(). Writes what rank 0 found of each."""
    ranks = distributed.start()
    facts = [compare(ranks, case) for case in cases]
    if ranks.first:
        Path(result).write_text(json.dumps(facts))
    ranks.close()
