"""Runs inside ranks: what a step of a config sends, collective by collective, and what lies in memory meanwhile."""

import gc
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.engine import distributed, zero
from ijepa_scale.engine.optim import set_schedules
from ijepa_scale.plan import checks

LEAST = 16  # bytes of a storage that is counted: scalars as a step's number are not
STEPS = 3  # at ZeRO-3 the third is the first that goes by the recorded order of modules


def tensors_in(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in tensors_in(value)] if isinstance(values, list | tuple) else []


class Collectives(TorchDispatchMode):
    """Bytes of each call's larger side, by operation: of what is put in or comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::") and "barrier" not in name:
            most = max(sum(tensor.nbytes for tensor in tensors_in(value)) for value in args[:2])
            self.sizes[name.removeprefix("c10d::").strip("_")].append(most)
        return func(*args, **(kwargs or {}))


def storages() -> dict[int, torch.UntypedStorage]:
    """Of all tensors there are, by address. Who holds them keeps their addresses from being given away again."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    found += [one.grad for one in found if one.is_leaf and one.grad is not None]
    found += [one.ds_tensor for one in found if hasattr(one, "ds_tensor")]
    return {one.untyped_storage().data_ptr(): one.untyped_storage() for one in found}


def held(engine: Any, ema: Any) -> dict[str, int]:
    """Bytes of what is trained and of its state, by what it is: of the tensors that the optimizer itself uses."""
    optimizer, module = engine.optimizer, engine.module
    constants = sum(buffer.nbytes for buffer in module.buffers())
    moments = [value for state in optimizer.optimizer.state.values() for value in state.values() if value.numel() > 1]
    averages = {one.data_ptr(): one.nbytes for one in (*ema.shards, *ema.targets) if one is not None}
    state = sum(one.nbytes for one in [*zero.masters(optimizer), *moments])
    if zero.is_stage3(optimizer):
        trained = [p for p in module.parameters() if p.requires_grad]
        # A rank alone has no second copy of a small parameter that is gathered always: it is a view of its piece.
        weights = sum({one.data_ptr(): one.nbytes for p in trained for one in (p.ds_tensor, p) if one.nbytes}.values())
        gradients = optimizer.grad_partitions_flat_buffer.nbytes
    else:
        weights = sum(bucket.weights.nbytes for bucket in optimizer.buckets)
        parts = [one for bucket in optimizer.buckets for one in (bucket.gradient, bucket.gradients)]
        gradients = sum({one.data_ptr(): one.nbytes for one in parts if one is not None}.values())
    found = {"weights": weights + constants, "gradients": gradients}
    if not zero.is_offloaded(optimizer):
        return found | {"optimizer": state, "ema": sum(averages.values()), "host": 0}
    host = state + sum(one.nbytes for one in ema.shards if one is not None)
    if zero.is_stage3(optimizer):
        found["gradients"] = 0
        host += gradients + sum(one.grad.nbytes for one in zero.masters(optimizer))
    else:
        host += sum(one.nbytes for one in optimizer._travelling.values())
    return found | {"optimizer": 0, "ema": sum(one.nbytes for one in ema.targets if one is not None), "host": host}


def count(config: Any, ranks: distributed.Ranks) -> dict[str, Any]:
    """Of the last of some steps: collectives, and state when gradients are at their most."""
    objective = build.build_objective(config)
    micro_batch, _, settings = checks.settings(config, objective, ranks=ranks.world_size, device=ranks.device)
    micro_steps, side = settings["gradient_accumulation_steps"], config.data.image_size
    before = storages()
    engine, ema = build.build_engine(
        objective,
        settings,
        optimization=config.optimization,
        initial=lambda name, shape: 0.02 * torch.randn(shape),
        total=ranks.total,
    )
    found: dict[str, Any] = {}
    for step in range(STEPS):
        set_schedules(engine.optimizer.optimizer.param_groups, lr=1e-3, weight_decay=0.1, ema_momentum=0.9)
        with Collectives() as seen:
            for micro_step in range(micro_steps):
                images = torch.randint(256, (micro_batch, 3, side, side)).to(torch.uint8)
                engine.backward(engine(images, objective.draw_masks(step, range(micro_batch)))["loss"])
                del images
                if step + 1 == STEPS and not micro_step:
                    time.sleep(0.2)  # a thread of gloo's may hold what it sent for a moment longer
                    there = [one.nbytes() for at, one in storages().items() if at not in before]
                    found = {"state": held(engine, ema), "everything": sum(size for size in there if size > LEAST)}
                engine.step()
            ema.update()
        ema.wait()
    strangers = [name for name, one in engine.module.named_modules() if getattr(one, "_external_params", None)]
    assert not strangers, f"modules that read weights of others outside their forward: {strangers}"
    return {"collectives": seen.sizes, **found}


def run(result: str, config_path: str, cases: list[list[str]]) -> None:
    """cases: overrides of the config. Writes what rank 0 found of each."""
    ranks = distributed.start()
    found = []
    for overrides in cases:
        found.append(count(load_config(config_path, overrides), ranks))
    if ranks.first:
        Path(result).write_text(json.dumps(found))
    ranks.close()
