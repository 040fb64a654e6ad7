"""What lies on each GPU, in bytes, in bf16: state exactly as it is cut among ranks, activations and buffers as counted.

A test holds the state to what lies there under ZeRO-1, -2 and -3, to the byte.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from ijepa_scale.engine.buckets import runs, share_of
from ijepa_scale.engine.optim import parameter_groups
from ijepa_scale.engine.zero import BUCKET, IN_FLIGHT
from ijepa_scale.models.blocks import Block, ViTSize, bytes_kept
from ijepa_scale.objectives.objective import Objective

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Group:
    """Parameters of one group of the optimizer, in order. averaged: an EMA follows them. muon: Muon trains them."""

    shapes: tuple[torch.Size, ...]
    averaged: bool
    muon: bool

    @functools.cached_property
    def numels(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @functools.cached_property
    def numel(self) -> int:
        return sum(self.numels)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained. constants: bytes of tables that are not trained. module: on the meta device, without values."""

    groups: tuple[Group, ...]
    constants: int
    module: torch.nn.Module

    @property
    def trained(self) -> int:
        return sum(group.numel for group in self.groups)

    @property
    def averaged(self) -> int:
        return sum(group.numel for group in self.groups if group.averaged)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How state is cut. micro_steps: a step's. sent: bytes of a gradient's value on its way. bucket: in elements.

    persistence, prefetch, reuse: DeepSpeed's stage3_param_persistence_threshold, stage3_prefetch_bucket_size and
    stage3_max_reuse_distance, in elements. offload: whether masters, moments and EMA lie in the host's memory.
    """

    zero_stage: int
    ranks: int
    micro_steps: int = 1
    sent: int = FP32
    bucket: int = BUCKET
    offload: bool = False
    persistence: int = 100_000
    prefetch: int = 50_000_000
    reuse: int = 1_000_000_000

    @property
    def every_micro_step(self) -> bool:
        """Whether gradients are sent after each micro-step."""
        return self.zero_stage > 1 and self.ranks > 1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on a GPU. gradients: the most of them that are kept at once. buffers: what comes and goes besides.

    host: what engine.offload_optimizer has put into the host's memory; not in the total.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float = 0.0
    buffers: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations + self.buffers


def model_of(objective: Objective, optimizer: str) -> Model:
    """optimizer: optimization.optimizer."""
    with torch.device("meta"):
        module = objective.build()
    muon: Any = Block if optimizer == "muon" else ()
    groups = parameter_groups(objective.trained(module), objective.averaged(module), muon)
    return Model(
        groups=tuple(Group(tuple(p.shape for p in one["params"]), one["ema"], one["muon"]) for one in groups),
        constants=sum(buffer.nbytes for buffer in module.buffers()),
        module=module,
    )


def sharding_of(settings: dict[str, Any], *, ranks: int) -> Sharding:
    """settings: DeepSpeed's config, as plan.checks.settings() gives it."""
    zero = settings["zero_optimization"]
    of_stage_3 = {
        name: int(zero[key])
        for name, key in (
            ("persistence", "stage3_param_persistence_threshold"),
            ("prefetch", "stage3_prefetch_bucket_size"),
            ("reuse", "stage3_max_reuse_distance"),
        )
        if key in zero
    }
    return Sharding(
        zero_stage=zero["stage"],
        ranks=ranks,
        micro_steps=settings["gradient_accumulation_steps"],
        sent={"fp32": FP32, "bf16": BF16}[settings["communication_data_type"]],
        bucket=int(zero["reduce_bucket_size"]),
        offload="offload_optimizer" in zero,
        **of_stage_3,
    )


def state(model: Model, sharding: Sharding) -> Memory:
    """Weights, gradients, masters with their moments, and EMA, of a rank, and what of it lies on the host."""
    return _partitioned(model, sharding) if sharding.zero_stage == 3 else _sharded(model, sharding)


def buckets(group: Group, sharding: Sharding) -> list[int]:
    """Elements of each bucket at ZeRO-1 and -2, padding included: a rank has its part of each."""
    return [
        sharding.ranks * share_of(sum(group.numels[first:last]), sharding.ranks)
        for first, last in runs(group.numels, sharding.bucket)
    ]


def piece(numel: int, ranks: int) -> int:
    """Elements of a parameter that a rank has at ZeRO-3, padding included."""
    return -(-numel // ranks)


def small_numels(model: Model, sharding: Sharding) -> list[int]:
    """Elements of the parameters that every rank has whole at ZeRO-3, too: small ones that are trained."""
    return [numel for group in model.groups for numel in group.numels if numel <= sharding.persistence]


def _sharded(model: Model, sharding: Sharding) -> Memory:
    whole = sum(sum(buckets(group, sharding)) for group in model.groups)
    averaged = sum(sum(buckets(group, sharding)) for group in model.groups if group.averaged)
    ranks, accumulates = sharding.ranks, sharding.micro_steps > 1
    if ranks == 1:
        gradients = whole * (FP32 if accumulates else BF16)
    elif not accumulates:
        gradients = whole // ranks * sharding.sent
    else:  # added up in fp32: whole at ZeRO-1, of this rank's part alone at ZeRO-2
        gradients = FP32 * (whole // ranks if sharding.every_micro_step else whole)
    found = Memory(
        weights=BF16 * whole + model.constants,
        gradients=gradients,
        optimizer=3 * FP32 * whole // ranks,
        ema=FP32 * averaged // ranks + BF16 * averaged,
    )
    if not sharding.offload:
        return found
    # And the way there and back of one bucket at a time: its gradient as it comes, its weights, those of the average.
    if ranks == 1:
        comes = FP32 if accumulates else BF16
    else:
        comes = FP32 if accumulates and sharding.every_micro_step else sharding.sent
    largest = max(one for group in model.groups for one in buckets(group, sharding)) // ranks
    travelling = largest * (comes + BF16 + (BF16 if averaged else 0))
    return replace(
        found, optimizer=0, ema=BF16 * averaged, host=found.optimizer + FP32 * averaged // ranks + travelling
    )


def _partitioned(model: Model, sharding: Sharding) -> Memory:
    """Each of several ranks has small parameters that are trained whole, besides. The host has gradients twice."""
    ranks = sharding.ranks
    small = sum(small_numels(model, sharding)) if ranks > 1 else 0
    pieces = sum(piece(numel, ranks) for group in model.groups for numel in group.numels)
    averaged = sum(piece(numel, ranks) for group in model.groups if group.averaged for numel in group.numels)
    found = Memory(
        weights=BF16 * (pieces + small) + model.constants,
        gradients=FP32 * pieces,
        optimizer=3 * FP32 * pieces,
        ema=(FP32 + BF16) * averaged,
    )
    if not sharding.offload:
        return found
    host = 2 * found.gradients + found.optimizer + FP32 * averaged
    return replace(found, gradients=0, optimizer=0, ema=BF16 * averaged, host=host)


def passing(model: Model, sharding: Sharding, *, gathered: int) -> float:
    """Gradients on their way, and at ZeRO-3 weights that are gathered. gathered: elements, at most, at once."""
    if sharding.zero_stage == 3:
        return sharding.sent * sharding.bucket + BF16 * gathered
    if sharding.ranks == 1:
        return 0.0
    largest = sorted((one for group in model.groups for one in buckets(group, sharding)), reverse=True)
    return sharding.sent * sum(largest[: IN_FLIGHT + 1])


def block_at_work(encoder: ViTSize, tokens: float) -> float:
    """What a block of the encoder has in memory while it runs on so many tokens: about as much as it would keep."""
    return tokens * bytes_kept(encoder, 0, BF16) / encoder.depth
