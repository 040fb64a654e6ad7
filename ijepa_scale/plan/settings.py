"""A recipe on a cluster: what each ZeRO stage, activation checkpointing and micro-batch takes of memory and of time."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.objectives.ijepa import IJepaObjective
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.plan import checks, memory, times
from ijepa_scale.plan.clusters import USABLE, Cluster
from ijepa_scale.plan.collectives import Collective, collectives
from ijepa_scale.plan.memory import Memory, Model, Sharding
from ijepa_scale.plan.partitioned import gathers
from ijepa_scale.plan.sampling import Sampled, is_fixed, sample
from ijepa_scale.plan.times import Assumed, Flops, Step

STAGES, CHECKPOINTING = (1, 2, 3), ("none", "predictor", "every_2", "full")
ALIKE = 0.01  # of a step's time: differences below are none, and the simpler setting is taken


@dataclass(frozen=True, kw_only=True)
class Setting:
    """zero_stage, checkpointing, micro_batch: what is set. flops: an image's. sent: a step's collectives."""

    zero_stage: int
    checkpointing: str
    micro_batch: int
    micro_steps: int
    memory: Memory
    usable: float
    flops: Flops
    sent: list[Collective]
    step: Step

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable


@dataclass(frozen=True, kw_only=True)
class Planned:
    """steps: of the whole recipe."""

    config: PretrainConfig
    cluster: Cluster
    steps: int
    settings: list[Setting]

    @property
    def images(self) -> int:
        """Of a step."""
        return self.config.optimization.global_batch_size

    def images_per_second(self, setting: Setting) -> float:
        return self.images / setting.step.seconds

    def hours(self, setting: Setting) -> float:
        return self.steps * setting.step.seconds / 3600

    @property
    def fastest(self) -> Setting | None:
        """None: nothing fits."""
        return fastest_of(self.settings)


def fastest_of(settings: Sequence[Setting]) -> Setting | None:
    """Of those that fit; of some that are as fast the simplest, which comes first. None: nothing fits."""
    fitting = [one for one in settings if one.fits]
    least = min((one.step.seconds for one in fitting), default=0.0)
    return next((one for one in fitting if one.step.seconds <= (1 + ALIKE) * least), None)


def plan(
    config: PretrainConfig, cluster: Cluster, assumed: Assumed, *, usable: float = 0.0, sampled: Sampled | None = None
) -> Planned:
    """Every setting of the recipe, the simplest first. usable: bytes of a GPU's memory; 0: most of its data sheet's.

    sampled: of this objective, where it is known; None: drawn.
    ValueError for what cannot be trained, or not evenly on so many GPUs, or is not modelled.
    """
    if config.engine.precision == "fp32":
        raise ValueError("the planner is of bf16, and this has engine.precision=fp32; set it to bf16 or auto")
    if config.objective.name == "sketch":
        raise ValueError("the planner is of pre-training, and this has objective.name=sketch; give another config")
    objective = build.build_objective(config)
    objective.check()
    times.check_modelled(objective, assumed)
    check_even(config, objective, cluster)
    model = memory.model_of(objective, config.optimization.optimizer)
    sizes = micro_batches(config, objective, cluster.gpus)
    sampled = sampled or sample(objective, sizes[0])  # of several sizes masks are alike
    spent = {name: costs(build.build_objective(_with(config, 1, name, sizes[0])), sampled) for name in CHECKPOINTING}
    around: dict[str, Any] = {
        "cluster": cluster, "assumed": assumed, "usable": usable or USABLE * cluster.kind.memory
    }  # fmt: skip
    settings = [
        _setting(_with(config, stage, checkpointing, size), model, sampled, spent[checkpointing], **around)
        for stage, checkpointing, size in itertools.product(STAGES, CHECKPOINTING, sizes)
    ]
    return Planned(config=config, cluster=cluster, steps=steps_of(config), settings=settings)


def steps_of(config: PretrainConfig) -> int:
    """Of the whole recipe. ValueError where it is not known how many images an epoch has."""
    if not config.data.num_images and not config.optimization.max_steps:
        raise ValueError(
            "how long the recipe is cannot be known: give data.num_images=N (how many images the source has) or "
            "optimization.max_steps=N"
        )
    build.check_enough(config, "data.num_images", config.data.num_images)
    return build.build_horizon(config, config.data.num_images).total


def check_even(config: PretrainConfig, objective: Objective, cluster: Cluster) -> None:
    """ValueError where the GPUs cannot cut the global batch evenly; it names the nearest numbers that can."""
    whole, gpus, node = config.optimization.global_batch_size, cluster.gpus, cluster.node
    least = fixed_micro_batch(config, objective) or 1
    if whole % (gpus * least) == 0:
        return
    can = [n for n in range(1, whole // least + 1) if whole % (n * least) == 0 and (n <= node or n % node == 0)]
    if not can:
        raise ValueError(
            f"optimization.global_batch_size {whole} is not a multiple of optimization.micro_batch_size {least}, which "
            "alters what is learned here; give another of either"
        )
    nearest = [
        str(n) for n in (max(filter(gpus.__gt__, can), default=0), min(filter(gpus.__lt__, can), default=0)) if n
    ]
    each = f" in micro-batches of {least}, which alter what is learned here," if least > 1 else ""
    raise ValueError(
        f"{gpus} GPUs cannot cut optimization.global_batch_size {whole}{each} evenly; use {' or '.join(nearest)} GPUs, "
        f"or a global batch that is a multiple of {gpus * least}"
    )


def fixed_micro_batch(config: PretrainConfig, objective: Objective) -> int:
    """The config's where it alters what is learned; 0: any will do, or the config leaves it open."""
    return config.optimization.micro_batch_size if is_fixed(objective) else 0


def micro_batches(config: PretrainConfig, objective: Objective, gpus: int) -> list[int]:
    """Those that cut a GPU's images evenly, the largest first; the config's alone where it alters what is learned."""
    images = config.optimization.global_batch_size // gpus
    if is_fixed(objective):
        return [config.optimization.micro_batch_size or images]
    return [size for size in range(images, 0, -1) if images % size == 0]


def _with(config: PretrainConfig, stage: int, checkpointing: str, micro_batch: int) -> PretrainConfig:
    return replace(
        config,
        engine=replace(config.engine, zero_stage=stage, activation_checkpointing=checkpointing),
        optimization=replace(config.optimization, micro_batch_size=micro_batch),
    )


def _setting(
    config: PretrainConfig,
    model: Model,
    sampled: Sampled,
    spent: tuple[Flops, float],
    *,
    cluster: Cluster,
    assumed: Assumed,
    usable: float,
) -> Setting:
    """spent: as costs() gives it."""
    objective = build.build_objective(config)
    images, _, settings = checks.settings(config, objective, ranks=cluster.gpus, device=torch.device("cuda"))
    sharding = memory.sharding_of(settings, ranks=cluster.gpus)
    flops, kept = spent
    sent = collectives(model, sharding)
    made = times.compute(
        objective,
        sampled.counts if isinstance(objective, IJepaObjective) else None,
        flops,
        model,
        sharding,
        images=images,
        cluster=cluster,
        assumed=assumed,
    )
    return Setting(
        zero_stage=sharding.zero_stage,
        checkpointing=config.engine.activation_checkpointing,
        micro_batch=images,
        micro_steps=sharding.micro_steps,
        memory=replace(
            memory.state(model, sharding),
            activations=images * kept,
            buffers=_buffers(objective, model, sharding, images),
        ),
        usable=usable,
        flops=flops,
        sent=sent,
        step=times.step_of(made, sent, sharding, cluster=cluster, assumed=assumed),
    )


def costs(objective: Objective, sampled: Sampled) -> tuple[Flops, float]:
    """(FLOPs of an image, bytes that the backward keeps of one at the step with the most tokens)."""
    images = sum(one.num_images for one in sampled.masks)
    done = [objective.done(one) for one in sampled.masks]
    needed, computed = (math.fsum(one[key] for one in done) / images for key in ("model_flops", "hardware_flops"))
    plain = replace(objective, recompute_every=(0, 0))  # type: ignore[type-var]
    usual = math.fsum(plain.done(one)["hardware_flops"] for one in sampled.masks) / images
    kept = sum(objective.expected([sampled.largest]).kept_bytes.values())
    return Flops(model=needed, again=computed - usual), kept


def _buffers(objective: Any, model: Model, sharding: Sharding, images: int) -> float:
    most = gathers(model.module, sharding).most if sharding.zero_stage == 3 else 0
    at_work = memory.block_at_work(objective.encoder, images * objective.grid.num_patches)
    return memory.passing(model, sharding, gathered=most) + at_work
