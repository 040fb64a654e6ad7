"""What a config alone shows, before anything is opened: the same for a run and for --dry-run."""

import os
from typing import Any

import torch

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.engine import launchers, zero
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.plan import memory


def settings(
    config: PretrainConfig, objective: Objective, *, ranks: int, device: torch.device
) -> tuple[int, str, dict[str, Any]]:
    """(images a rank runs at once, precision, DeepSpeed's config). ValueError where these contradict one another."""
    micro_batch_size = build.build_micro_batch_size(config, ranks)
    objective.check_micro_step(micro_batch_size * ranks)
    precision = build.training_precision(config, device)
    deepspeed = zero.deepspeed_config(
        zero_stage=config.engine.zero_stage,
        precision=precision,
        micro_batch_size=micro_batch_size,
        accumulation_steps=config.optimization.global_batch_size // (micro_batch_size * ranks),
        clip_grad_norm=config.optimization.clip_grad_norm,
        gradient_dtype=config.engine.gradient_dtype,
        offload=config.engine.offload_optimizer == "cpu",
        extra=config.engine.deepspeed,
    )
    return micro_batch_size, precision, deepspeed


def check_memory(
    config: PretrainConfig, objective: Objective, settings: dict[str, Any], *, ranks: int, device: torch.device
) -> float:
    """Bytes of a rank's weights and optimizer's state, counted in bf16. ValueError where that is more than there is.

    settings: as settings() gives them. device: of this rank; on a CPU the ranks of a machine share its memory.
    """
    model = memory.model_of(objective, config.optimization.optimizer)
    need = memory.state(model, memory.sharding_of(settings, ranks=ranks)).total
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // launchers.ranks_here()
    if need > there:
        raise ValueError(
            f"the weights and their optimizer's state take {need / 2**30:,.0f} GiB of each process, and it has "
            f"{there / 2**30:,.0f} GiB: use a smaller model.name, model.width or model.depth (predictor.*, mae.* and "
            "cae.*, too), more processes, or engine.zero_stage=3; launch/plan.py says what fits where"
        )
    return need
