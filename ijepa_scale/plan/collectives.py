"""What ranks send one another in a step, collective by collective, in bytes: a test counts them at the collectives."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn

from ijepa_scale.plan.memory import BF16, FP32, Model, Sharding, buckets, piece
from ijepa_scale.plan.partitioned import gathers, kept_whole

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

    @property
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

    def of(parameters: Iterable[nn.Parameter]) -> list[int]:
        return [BF16 * whole(parameter.numel()) for parameter in parameters]

    calls = gathers(model.module, sharding).calls(times)
    gathered = list(chain.from_iterable(calls))
    of_averages = sum(not one[0].requires_grad for one in calls)
    trained = [whole(numel) for group in model.groups for numel in group.numels]
    return [
        _made(
            REDUCE_SCATTER,
            "gradients",
            [sharding.sent * numel for numel in trained] * times,
            times * math.ceil(sum(trained) / sharding.bucket),
        ),
        _made(ALL_GATHER, "updates", [FP32 * sum(map(whole, group.numels)) for group in model.groups if group.muon]),
        _made(
            ALL_GATHER,
            "weights",
            of(p for p in gathered if p.requires_grad),
            len(calls) - of_averages,
        ),
        _made(ALL_GATHER, "averages", of(p for p in gathered if not p.requires_grad), of_averages),
        _made(
            ALL_GATHER, "small weights", of(p for p in model.module.parameters() if kept_whole(p, sharding.persistence))
        ),
        _made(ALL_REDUCE, "norm", [FP64] * len(model.groups)),
    ]
