"""What ranks send one another in a step, collective by collective, in bytes: a test counts them at the collectives."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ijepa_scale.plan.memory import BF16, FP32, Model, Sharding, buckets, piece, small_numels
from ijepa_scale.plan.partitioned import gathers

FP64 = 8
REDUCE_SCATTER, ALL_GATHER, ALL_REDUCE = "reduce-scatter", "all-gather", "all-reduce"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Of a step. sizes: bytes of what a rank puts into a reduce-scatter or gets from an all-gather. calls: in how many
    they go. what: gradients, weights, small weights, averages, updates or norm."""

    operation: str
    what: str
    sizes: tuple[int, ...]
    calls: int

    @functools.cached_property
    def bytes(self) -> int:
        return sum(self.sizes)

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends at the least."""
        return (2 if self.operation == ALL_REDUCE else 1) * self.bytes * (ranks - 1) / ranks


def collectives(model: Model, sharding: Sharding) -> list[Collective]:
    """Of a step; terms of the loss over all ranks' images are not in it, nor what ranks agree on for the records."""
    if sharding.ranks == 1:
        return []
    found = _partitioned(model, sharding) if sharding.zero_stage == 3 else _sharded(model, sharding)
    return [one for one in found if one.sizes]


def _sharded(model: Model, sharding: Sharding) -> list[Collective]:
    """At ZeRO-1 gradients travel once a step, at ZeRO-2 after every micro-step; Muon's updates as gradients do."""
    times = sharding.micro_steps if sharding.every_micro_step else 1
    of = [(group, elements) for group in model.groups for elements in buckets(group, sharding)]
    scattered = [sharding.sent * elements for _, elements in of] * times
    return [
        _made(REDUCE_SCATTER, "gradients", scattered),
        _made(ALL_GATHER, "updates", [sharding.sent * elements for group, elements in of if group.muon]),
        _made(ALL_GATHER, "weights", [BF16 * elements for _, elements in of]),
        _made(ALL_GATHER, "averages", [BF16 * elements for group, elements in of if group.averaged]),
        _made(ALL_REDUCE, "norm", [FP64]),
    ]


def _made(operation: str, what: str, sizes: Sequence[int], calls: int | None = None) -> Collective:
    """calls: None: one a size."""
    sizes = tuple(sizes)
    return Collective(operation=operation, what=what, sizes=sizes, calls=len(sizes) if calls is None else calls)


def _partitioned(model: Model, sharding: Sharding) -> list[Collective]:
    """Weights are gathered in every micro-step, small ones at the step's end one by one; Muon's updates are fp32."""
    ranks, times = sharding.ranks, sharding.micro_steps

    def whole(numel: int) -> int:
        return ranks * piece(numel, ranks)

    gathered = gathers(model.module, sharding)

    def of(trained: bool) -> tuple[list[int], int]:
        """(sizes, calls) of a step's gathers of weights that are trained, or of the others."""
        sizes, calls = [], 0
        for micro_step, count in ((gathered.first, 1), (gathered.later, times - 1)):
            own = [BF16 * whole(numel) for call in micro_step for numel, is_trained in call if is_trained == trained]
            sizes += own * count
            calls += count * sum(call[0][1] == trained for call in micro_step)  # a call of both is its first's
        return sizes, calls

    trained = [whole(numel) for group in model.groups for numel in group.numels]
    buckets_sent = math.ceil(sum(trained) / sharding.bucket)
    return [
        _made(REDUCE_SCATTER, "gradients", [sharding.sent * numel for numel in trained] * times, times * buckets_sent),
        _made(ALL_GATHER, "updates", [FP32 * sum(map(whole, group.numels)) for group in model.groups if group.muon]),
        _made(ALL_GATHER, "weights", *of(True)),
        _made(ALL_GATHER, "averages", *of(False)),
        _made(ALL_GATHER, "small weights", [BF16 * whole(n) for n in small_numels(model, sharding)]),
        _made(ALL_REDUCE, "norm", [FP32 if sharding.offload else FP64] * len(model.groups)),
    ]
