"""Sections of the config -> objects, one build_* function a part. The public Python API: no launcher is needed."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ijepa_scale.build_objectives import OBJECTIVES as OBJECTIVES
from ijepa_scale.build_objectives import build_blocks as build_blocks
from ijepa_scale.build_objectives import build_ijepa as build_ijepa
from ijepa_scale.build_objectives import build_objective as build_objective
from ijepa_scale.build_objectives import predictor_size as predictor_size
from ijepa_scale.build_objectives import vit_size as vit_size
from ijepa_scale.config import OptimizationConfig, PretrainConfig, check_source_given
from ijepa_scale.data.collate import MicroBatches
from ijepa_scale.data.files import cache_path
from ijepa_scale.data.images import ImageSet, check_images, open_file, open_images, splits_of
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.order import whole_weights
from ijepa_scale.data.scenes.prepare import prepare_scenes
from ijepa_scale.data.sources.folders import judging_split
from ijepa_scale.data.sources.inspection import is_mapped
from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.data.streams.opening import open_shards, shard_locations
from ijepa_scale.data.streams.samples import sample_images
from ijepa_scale.engine import zero
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.engine.optim import make_optimizer, parameter_groups
from ijepa_scale.engine.schedules import Schedules
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.attention_backends import Choices
from ijepa_scale.models.attention_self_test import tested_attention
from ijepa_scale.models.blocks import Block
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.objective import Objective, Total

Opener = Callable[..., ImageSet]  # as open_images
SCENES_SEED = 0  # the rendered scenes are one fixed data set, whatever the run's seed
DEFAULT_SCENES, VALIDATION_SCENES = 20_000, 4000
START_RETRY_SECONDS = 30.0
PICTURED = 64  # images that are looked at for pictures while training goes on


def training_precision(config: PretrainConfig, device: torch.device) -> str:
    """bf16 or fp32."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "bf16" if device.type == "cuda" else "fp32"


def build_attention(config: PretrainConfig, *, device: torch.device, objective: Objective | None = None) -> Choices:
    """What attends over packed tokens in each network, tested on the device at its heads and longest sequence.

    objective: None: what objective.name asks for.
    Raises ValueError for a kernel that the config asks for and that is absent, and for one that is wrong.
    """
    dtype = torch.bfloat16 if training_precision(config, device) == "bf16" else torch.float32
    objective = objective or build_objective(config)
    heads = objective.attention_heads()
    asked = dict.fromkeys(heads, ("model.attention", config.model.attention))
    if "predictor" in heads:
        asked["predictor"] = ("predictor.attention", config.predictor.attention or config.model.attention)
    # No sequence holds a patch twice, so none is longer than the grid.
    return tested_attention(asked, heads, longest=objective.grid.num_patches, device=device, dtype=dtype)


def build_encoder(config: PretrainConfig) -> VisionTransformer:
    """A vision transformer of the config's size, with PyTorch's own initial weights."""
    return VisionTransformer(
        vit_size(config.model), image_size=config.data.image_size, patch_size=config.model.patch_size
    )


def build_model(config: PretrainConfig, *, attend: Mapping[str, Attend | None] | None = None) -> nn.Module:
    """The objective's networks, whole, with their initial weights; the module's forward(images, masks) gives the loss.

    attend: each network's kernel for packed tokens, as build_attention().attend; None: PyTorch's own attention.
    """
    objective = build_objective(config)
    module = objective.build(attend=attend)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(objective.initial_weight(name, parameter.shape))
    return module


def build_engine(
    objective: Objective,
    settings: dict[str, Any],
    *,
    optimization: OptimizationConfig,
    attend: Mapping[str, Attend | None] | None = None,
    total: Total | None = None,
    initial: Callable[[str, torch.Size], torch.Tensor] | None = None,
) -> tuple[Any, ShardedEMA]:
    """The objective's module under DeepSpeed, and the EMA of what it averages.

    settings: DeepSpeed's, as plan.checks.settings() gives them. initial: weights by name; None: the objective's.
    """
    muon: Any = Block if optimization.optimizer == "muon" else ()
    with zero.building_context(settings):
        module = objective.build(attend=attend, total=total)
    engine = zero.initialize(
        module,
        settings,
        initial or objective.initial_weight,
        lambda module: make_optimizer(
            parameter_groups(objective.trained(module), objective.averaged(module), muon), optimization.betas
        ),
        whole=Block,
    )
    return engine, ShardedEMA(engine, objective.averaged(module))


def _prepared_sources(config: PretrainConfig) -> list[tuple[str, float]]:
    """The folders, files, URLs and hub ids to open, with their weights; scenes are rendered first, once."""
    check_source_given(config)
    return [(_scenes(config) if path == "scenes" else path, weight) for path, weight in config.data.mixed_sources]


def _scenes(config: PretrainConfig) -> str:
    return scenes(config.data.cache_dir, image_size=config.data.image_size, num_train=config.data.num_images)


def scenes(cache_dir: str, *, image_size: int, num_train: int = 0) -> str:
    """The folder of the rendered scenes, which are made first, once. num_train: 0: as many as is usual."""
    folder = cache_path(cache_dir or "~/.cache/ijepa-scale") / "scenes"
    return str(
        prepare_scenes(
            folder,
            num_train=num_train or DEFAULT_SCENES,
            num_validation=VALIDATION_SCENES,
            image_size=image_size,
            seed=SCENES_SEED,
        )
    )


def reading(config: PretrainConfig) -> dict[str, Any]:
    """How sources are read, whichever and whatever for: arguments of what opens them."""
    data = config.data
    return {"cache_dir": data.cache_dir or None, "column": data.column, "config": data.config}


def build_images(config: PretrainConfig, open_images: Opener = open_images) -> ImageSet | Mixture | Streams:
    """The images to train on; ValueError for a source that cannot be. open_images: opens what is not streamed."""
    images = open_sources(config, open_images)
    check_enough(config, images.name, len(images))
    check_opened(config, images)
    return images


def check_enough(config: PretrainConfig, name: str, num_images: int) -> None:
    """ValueError where they fill no global batch. num_images: 0 where that is not known, as of a stream it may be."""
    if 0 < num_images < config.optimization.global_batch_size:
        raise ValueError(
            f"{name} has {num_images} images, fewer than optimization.global_batch_size "
            f"{config.optimization.global_batch_size}; use more images or a smaller global batch"
        )


def open_sources(config: PretrainConfig, open_images: Opener = open_images) -> ImageSet | Mixture | Streams:
    """The images of all sources, however few they are."""
    data = config.data
    sources = _prepared_sources(config)
    weights = whole_weights([weight for _, weight in sources])
    if data.streaming:
        return _build_streams(config, [path for path, _ in sources], weights)
    options = {"min_side": config.model.patch_size, "max_pixels": data.max_pixels, **reading(config)}
    parts = [open_images(path, split=data.split, **options) for path, _ in sources]
    return parts[0] if len(parts) == 1 else Mixture(tuple(parts), weights)


def check_opened(config: PretrainConfig, images: ImageSet | Mixture | Streams) -> None:
    """ValueError where most images of a source cannot be opened or are too small. Of streams their samples tell."""
    if not isinstance(images, Streams):
        for part in images.parts if isinstance(images, Mixture) else [images]:
            check_images(part, min_side=config.model.patch_size)


def _build_streams(config: PretrainConfig, paths: list[str], weights: tuple[int, ...]) -> Streams:
    """The streams of one rank alone, not dealt yet."""
    data = config.data
    opened = [
        open_shards(path, split=data.split, patience=_start_patience(config), **reading(config)) for path in paths
    ]
    return Streams(
        sources=tuple(opened),
        weights=weights,
        seed=config.seed,
        shuffle_buffer=data.shuffle_buffer,
        min_side=config.model.patch_size,
        max_pixels=data.max_pixels,
        num_images=data.num_images,
        patience=Patience(data.retry_seconds),
    )


def _start_patience(config: PretrainConfig) -> Patience:
    """Shorter: what fails before the first step is more likely an address than the network."""
    return Patience(min(START_RETRY_SECONDS, config.data.retry_seconds))


@dataclass(frozen=True)
class EvalImages:
    """Labelled images for probes: fit on train, score on test. held_out: test images are no training images."""

    train: ImageSet
    test: ImageSet
    held_out: bool


def build_eval_images(config: PretrainConfig, open_images: Opener = open_images) -> EvalImages:
    """Of the first source that has labels, else of the first: its training split and, if any, validation or test."""
    found = []
    for path, _ in _prepared_sources(config):
        found.append(_eval_images(config, path, open_images))
        if found[-1].train.label_columns():
            return found[-1]
    return found[0]


def _eval_images(config: PretrainConfig, source: str, open_images: Opener) -> EvalImages:
    data = config.data
    sampled = data.streaming and not is_mapped(source, column=data.column)
    splits = list((shard_locations if sampled else splits_of)(source, **reading(config)))
    named = data.eval_split or judging_split(splits)
    if sampled:
        report, logging = config.report, config.logging
        fit = max(1, report.train_images, logging.health_images if logging.health_every_steps else 0)
        score = report.test_images if report.train_images else 0
        shown = PICTURED if logging.pictures_every_steps else 1
        train = _sampled_images(config, source, data.split, fit if named else max(fit + score, shown))
        test = _sampled_images(config, source, named, max(shown, score)) if named else train
    else:
        opened = functools.partial(open_images, source, max_pixels=data.max_pixels, **reading(config))
        train = opened(split=data.split)
        test = opened(split=named) if named else train
        if data.streaming:
            check_images(train, min_side=config.model.patch_size)
        if config.report.train_images and test is not train:
            check_images(test, min_side=1)
    return EvalImages(train, test, held_out=test.split != train.split)


def _sampled_images(config: PretrainConfig, source: str, split: str, count: int) -> ImageSet:
    """Some images of a source that is streamed, kept in the run's folder."""
    patience = _start_patience(config)
    shards = open_shards(source, split=split, patience=patience, **reading(config))
    chosen = [text for text in (config.data.column, config.data.config) if text]
    name = hashlib.blake2b(repr((source, split, count, *chosen)).encode(), digest_size=6).hexdigest()
    file = Path(config.run_dir) / "samples" / f"{shards.name.rpartition(':')[2]}-{name}.arrow"
    path = str(sample_images(shards, file, count=count, patience=patience))
    images = open_file(path, name=shards.name, max_pixels=config.data.max_pixels)
    check_images(images, min_side=config.model.patch_size)
    return images


def build_micro_batches(
    config: PretrainConfig,
    images: ImageSet | Mixture | Streams,
    objective: Objective,
    *,
    micro_batch_size: int,
    rank: int,
    ranks: int,
) -> MicroBatches:
    return MicroBatches(
        images=images,
        draw_masks=objective.draw_masks,
        seed=config.seed,
        image_size=config.data.image_size,
        crop_scale=config.data.crop_scale,
        horizontal_flip=config.data.horizontal_flip,
        global_batch_size=config.optimization.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        ranks=ranks,
    )


@dataclass(frozen=True)
class Horizon:
    """How long a run is, in steps. total: the schedules' end; stop: where this run ends."""

    steps_per_epoch: int
    total: int
    stop: int
    warmup: int


def build_horizon(config: PretrainConfig, num_images: int) -> Horizon:
    """num_images: of an epoch; 0 for a stream of unknown length: its epoch is then max_steps / epochs steps."""
    options = config.optimization
    if not num_images and not options.max_steps:
        raise ValueError(
            "how long the stream is cannot be known without reading it: set optimization.max_steps, or data.num_images "
            "to the number of images of an epoch"
        )
    of_stream = max(1, options.max_steps // options.epochs)
    steps_per_epoch = num_images // options.global_batch_size if num_images else of_stream
    total = options.max_steps or options.epochs * steps_per_epoch
    stop = min(options.stop_at_step or total, total)
    return Horizon(steps_per_epoch, total, stop, round(total * options.warmup_epochs / options.epochs))


def build_schedules(config: PretrainConfig, horizon: Horizon) -> Schedules:
    options = config.optimization
    return Schedules(
        total=horizon.total,
        warmup=horizon.warmup,
        start_lr=options.start_lr,
        lr=options.lr,
        final_lr=options.final_lr,
        weight_decay=options.weight_decay,
        ema=options.ema,
    )


def build_micro_batch_size(config: PretrainConfig, ranks: int) -> int:
    """Images a rank runs at once. Raises ValueError where the global batch cannot be cut evenly."""
    whole = config.optimization.global_batch_size
    micro = config.optimization.micro_batch_size or whole // ranks
    if micro == 0 or whole % (micro * ranks):
        least = max(micro, 1)
        near = max(1, round(whole / (least * ranks))) * least * ranks
        raise ValueError(
            f"optimization.global_batch_size {whole} is not a multiple of optimization.micro_batch_size {least} x "
            f"{ranks} ranks; use optimization.global_batch_size={near} or another micro_batch_size"
        )
    return micro
