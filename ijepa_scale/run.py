"""What a run is made of, and everything that happens before its first step."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig, changed_keys, to_dict, to_yaml
from ijepa_scale.data.collate import MicroBatches
from ijepa_scale.data.images import ImageSet
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine import zero
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.masking.multiblock import MultiBlock
from ijepa_scale.metrics import read_records
from ijepa_scale.models.ijepa import initial_weight
from ijepa_scale.optim import adamw, parameter_groups
from ijepa_scale.run_folder import BadImages, RunFolder


class InputError(Exception):
    """What the user gave cannot be trained on; found before training starts."""


@dataclass
class Run:
    """All that one process of a run holds."""

    config: PretrainConfig
    ranks: Ranks
    folder: RunFolder
    images: ImageSet
    evaluation: build.EvalImages
    dataset: MicroBatches
    horizon: build.Horizon
    engine: Any
    ema: ShardedEMA
    bad: BadImages
    start_step: int = 0
    wandb_id: str | None = None
    notes: list[str] = field(default_factory=list)  # to be shown once there is a progress line


def check(config: PretrainConfig) -> MultiBlock:
    """What can be seen from the config alone, before any process group: the same on every rank."""
    build.check_source_given(config)
    build.vit_size(config.model)
    return build.build_blocks(config)


def set_up(config: PretrainConfig, blocks: MultiBlock, ranks: Ranks, *, resume: str, allow_changes: bool) -> Run:
    """Everything else that can fail for a user's reason, in the order of its cost."""
    folder = RunFolder(config.run_dir)
    micro_batch_size = build.build_micro_batch_size(config, ranks.world_size)
    cuda = ranks.device.type == "cuda"
    precision = config.engine.precision if config.engine.precision != "auto" else "bf16" if cuda else "fp32"
    settings = zero.deepspeed_config(
        zero_stage=config.engine.zero_stage,
        precision=precision,
        micro_batch_size=micro_batch_size,
        accumulation_steps=config.optimization.global_batch_size // (micro_batch_size * ranks.world_size),
        clip_grad_norm=config.optimization.clip_grad_norm,
        extra=config.engine.deepspeed,
    )
    ranks.together(lambda: folder.lock() if ranks.first else None)
    images = ranks.together(lambda: build.build_images(config), on="node")
    evaluation = ranks.together(lambda: build.build_eval_images(config), on="node")
    horizon = build.build_horizon(config, len(images))
    found = find_checkpoint(config, folder, ranks, len(images), resume=resume, allow_changes=allow_changes)

    with zero.building_context(settings):
        model = build.build_model(config, initialize=False)
    engine = zero.initialize(
        model,
        settings,
        lambda name, shape: initial_weight(name, shape, config.seed),
        lambda module: adamw(parameter_groups(module), config.optimization.betas),
    )
    ema = ShardedEMA(engine, model.twins())
    dataset = build.build_micro_batches(
        config, images, blocks, micro_batch_size=micro_batch_size, rank=ranks.rank, ranks=ranks.world_size
    )
    run = Run(config, ranks, folder, images, evaluation, dataset, horizon, engine, ema, BadImages())
    if found:
        checkpoints.restore(found, engine, ema)
        run.start_step = found.step
        run.wandb_id = found.manifest.get("wandb_id")
        earlier = read_records(folder.metrics) if ranks.first and folder.metrics.exists() else []
        run.bad = BadImages(ranks.from_first([r for r in earlier if r["step"] < found.step]))
        run.notes.append(f"resumed from {found.path}, step {found.step}")
    if ranks.first:
        folder.describe(
            to_yaml(config), world_size=ranks.world_size, precision=precision, images=len(images), source=images.name
        )
    return run


def find_checkpoint(
    config: PretrainConfig, folder: RunFolder, ranks: Ranks, num_images: int, *, resume: str, allow_changes: bool
) -> Checkpoint | None:
    """The checkpoint to go on from, verified by all ranks; None for a fresh start. ValueError if it does not fit."""
    if resume == "never":
        there = ranks.from_first(checkpoints.candidates(folder.checkpoints))
        if there:
            raise ValueError(
                f"{folder.path} holds checkpoints up to {there[0].name}; for a fresh start choose another run_dir "
                "or delete that folder, to go on leave --resume at auto"
            )
        return None
    if resume == "auto":
        found, skipped = checkpoints.newest_good(folder.checkpoints, ranks)
        if skipped and ranks.first:
            print("warning: skipped checkpoints that are not whole:\n  " + "\n  ".join(skipped), flush=True)
    else:
        found, complaint = checkpoints.verify(Path(resume), ranks)
        if found is None:
            raise ValueError(f"--resume {resume} cannot be used: {complaint}")
    if found is None:
        return None
    theirs, ours = found.manifest["architecture"], build.architecture(config)
    if theirs != ours:
        differing = ", ".join(
            f"{key} {theirs.get(key)} there, {ours[key]} here" for key in ours if theirs.get(key) != ours[key]
        )
        raise ValueError(f"{found.path} holds another architecture: {differing}; choose another run_dir or its config")
    changed = changed_keys(found.manifest["config"], to_dict(config))
    if found.manifest["images"] != num_images:
        changed["images in the source"] = (found.manifest["images"], num_images)
    if changed and not allow_changes:
        listed = "\n  ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"these settings alter training and differ from {found.path}:\n  {listed}\n"
            "restore them, pass --allow-changes to go on all the same, or choose another run_dir"
        )
    return found
