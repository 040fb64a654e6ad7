"""Runs inside ranks: the bytes that each hands to collectives in a step, by operation."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_scale.engine import distributed
from ijepa_scale.engine.optim import set_schedules
from tests.engine import tiny


def flat(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)] if isinstance(values, list | tuple) else []


class Traffic(TorchDispatchMode):
    """Sums what the backends are asked for: bytes that a rank sends at the least, over a ring."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.sent = ranks, defaultdict(float)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::") and "barrier" not in name:
            # their first two arguments: in-out; or output, input
            first, second = (sum(t.nbytes for t in flat(value)) for value in args[:2])
            most = max(first, second)
            share = (self.ranks - 1) / self.ranks
            self.sent[name.removeprefix("c10d::").strip("_")] += (2 if "allreduce" in name else 1) * share * most
        return func(*args, **(kwargs or {}))


def run(result: str, cases: list[tuple[int, str, str, int]]) -> None:
    """cases: (ZeRO stage, precision, gradient dtype, accumulation steps)."""
    ranks = distributed.start()
    found = {}
    for zero_stage, precision, gradient_dtype, accumulation in cases:
        engine, ema = tiny.start_engine(
            ranks, zero_stage=zero_stage, precision=precision, accumulation=accumulation, gradient_dtype=gradient_dtype
        )
        for step in range(3):
            set_schedules(engine.optimizer.optimizer.param_groups, lr=1e-3, weight_decay=0.1, ema_momentum=0.9)
            with Traffic(ranks.world_size) as traffic:
                for batch in tiny.micro_batches(step, ranks, accumulation):
                    engine.backward(engine(*batch)["loss"])
                    engine.step()
                ema.update()
        count = [sum(getattr(p, "ds_numel", p.numel()) for p in part.parameters()) for part in engine.module.children()]
        key = f"{zero_stage} {precision} {gradient_dtype} {accumulation}"
        found[key] = {"sent": traffic.sent, "trained": count[0] + count[1], "averaged": count[0]}
    if ranks.first:
        Path(result).write_text(json.dumps(found))
    ranks.close()
