"""Runs alone: steps on the device that training would take, as train.py takes them; what came of them goes to JSON."""

import json
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.data.collate import Batch
from ijepa_scale.engine import distributed
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.feed import Feed, HostCopy
from ijepa_scale.engine.optim import set_schedules
from ijepa_scale.models.attention_backends import choose_attention
from tests.engine import tiny
from tests.engine.worker_zero_parity import Plain, schedule

STEPS = 7  # before the step that Plain takes for a bad one
BLOCKS = {"compiled": True, "recompute_every": (2, 1)}


def batches(pinned: bool):
    for step in range(STEPS):
        batch = Batch(*tiny.whole_batch(step), (step,))
        yield batch.pin_memory() if pinned else batch


def steps(ranks: Ranks, zero_stage: int, precision: str, **options: Any) -> dict[str, Any]:
    engine, ema = tiny.start_engine(ranks, zero_stage=zero_stage, precision=precision, terms=options)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for network, width in ((engine.module.context_encoder, 16), (engine.module.predictor, 8)):
        attention = choose_attention("auto", device=ranks.device, dtype=dtype, head_width=width)
        network.attend = attention.attend
    feed = Feed(batches(ranks.device.type == "cuda"), ranks.device)
    copies, applied = [], []
    for step in range(STEPS):
        lr, weight_decay, momentum = schedule(step)
        set_schedules(engine.optimizer.optimizer.param_groups, lr=lr, weight_decay=weight_decay, ema_momentum=momentum)
        batch = feed.take()
        loss = engine(batch.images, batch.masks)["loss"]
        engine.backward(loss)
        if step + 1 < STEPS:
            feed.load()
        engine.step()
        applied.append(engine.was_step_applied())
        ema.update()
        copies.append(HostCopy([loss, engine.get_global_grad_norm()]))
    ema.wait()
    own, used = tiny.gathered(engine, ranks, ema.shards), tiny.weights_of(engine, "target_encoder.")
    targets = {name.replace("target_encoder.", "context_encoder."): values for name, values in used.items()}
    losses, norms = zip(*(copy.numbers() for copy in copies), strict=True)
    return {
        "attention": attention.name,
        "losses": losses,
        "norms": norms,
        "applied": all(applied),
        "target_is_ema": tiny.bits_equal(targets, {name: values.to(dtype) for name, values in own.items()}),
        "on": sorted({str(tensor.device) for tensor in (*engine.module.parameters(), *engine.module.buffers())}),
    }


def run(result: str) -> None:
    ranks = distributed.start()
    facts: dict[str, Any] = {
        f"{stage} {precision}{' blocks' if options else ''}": steps(ranks, stage, precision, **options)
        for stage in (1, 2, 3)
        for precision, options in (("fp32", {}), ("bf16", {}), ("bf16", BLOCKS))
    }
    plain = Plain(0.0, {})
    facts["plain"] = [plain.step(step) for step in range(STEPS)]
    Path(result).write_text(json.dumps(facts))
    ranks.close()
