"""What a config alone shows, before anything is opened: the same for a run and for --dry-run."""

from typing import Any

import torch

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.engine import zero
from ijepa_scale.objectives.objective import Objective


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
