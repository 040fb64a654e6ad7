"""Runs inside ranks: steps with compiled and recomputed blocks beside the same steps without; facts go to JSON."""

import json
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from ijepa_scale.engine import distributed
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.optim import set_schedules
from ijepa_scale.models.blocks import _hooked
from tests.engine import tiny

WARM_UP, STEPS = 3, 23


def steps(ranks: Ranks, zero_stage: int, **options: Any) -> dict[str, Any]:
    """Losses and gradient norms of STEPS steps, each with its own numbers of tokens, and what was compiled in them."""
    torch._dynamo.reset()
    counters.clear()
    engine, ema = tiny.start_engine(ranks, zero_stage=zero_stage, precision="fp32", terms=options)
    losses, norms, warm = [], [], 0
    for step in range(STEPS):
        if step == WARM_UP:
            warm = counters["stats"]["unique_graphs"]
        set_schedules(engine.optimizer.optimizer.param_groups, lr=1e-3, weight_decay=0.05, ema_momentum=0.9)
        for batch in tiny.micro_batches(step, ranks, 1):
            loss = engine(*batch)["loss"]
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
        ema.update()
    return {
        "losses": losses,
        "norms": norms,
        "warm_graphs": warm,
        "later_graphs": counters["stats"]["unique_graphs"] - warm,
        "hooked": _hooked(engine.module.target_encoder.blocks),
        "breaks": sum(counters["graph_break"].values()),
    }


def run(result: str, cases: list[tuple[str, int, dict[str, Any]]]) -> None:
    """cases: (name, ZeRO stage, options of tiny.build_model); at each stage one of them is called plain."""
    ranks = distributed.start()
    facts = {f"{name} {stage}": steps(ranks, stage, **options) for name, stage, options in cases}
    for name, stage, _ in cases:
        plain = facts[f"plain {stage}"]
        facts[f"{name} {stage}"] |= {"plain losses": plain["losses"], "plain norms": plain["norms"]}
    if ranks.first:
        Path(result).write_text(json.dumps(facts))
    ranks.close()
