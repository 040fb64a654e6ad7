"""How long a step takes on a cluster: what a GPU computes, and what of the collectives it has to wait for.

By arithmetic on what is assumed, not measured: no step on several GPUs has been timed here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ijepa_scale.engine.muon import ITERATIONS
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.ijepa import IJepaObjective
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.plan import step_model
from ijepa_scale.plan.clusters import Cluster
from ijepa_scale.plan.collectives import ALL_REDUCE, REDUCE_SCATTER, Collective
from ijepa_scale.plan.memory import Model, Sharding

FORWARD_SHARE = 1 / 3  # of a step's FLOPs, where a share of the peak is all that is known
EACH_MICRO_STEP = "gradients into their buckets"  # of step_model.TAIL_BYTES; the rest is once a step, of a rank's part


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """mfu: share of the peak while a GPU computes; None: by step_model.py.

    link_efficiency: share of a link's rate that collectives reach. overlap: share of the forward's and the backward's
    time behind which collectives can hide. hop_seconds: of each hop of a ring.
    """

    mfu: float | None = None
    link_efficiency: float = 0.8
    overlap: float = 0.8
    hop_seconds: float = 2e-6

    def __post_init__(self) -> None:
        for option, share in (("--mfu", self.mfu), ("--link-efficiency", self.link_efficiency)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{option} {share} is a share: it must be above 0 and at most 1")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"--overlap {self.overlap} is a share: it must be from 0 to 1")
        if not 0 <= self.hop_seconds < 1:
            raise ValueError(f"--hop-us {1e6 * self.hop_seconds:g} must be from 0 to 1,000,000 microseconds")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Seconds: forward and backward of a micro-step, what follows once a step."""

    forward: float
    backward: float
    tail: float


@dataclass(frozen=True, kw_only=True)
class Flops:
    """An image's. model: what the method needs. again: what is computed a second time."""

    model: float
    again: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step. waits: what is not hidden of each kind of collective."""

    compute: float
    waits: dict[str, float] = field(default_factory=dict)

    @property
    def exposed(self) -> float:
        return sum(self.waits.values())

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def seconds_at_share(flops: float, *, peak: float, share: float) -> float:
    """Of so many FLOPs at a share of a peak in FLOP/s."""
    return flops / (share * peak)


def check_modelled(objective: Objective, assumed: Assumed) -> None:
    """ValueError for an objective whose time is not modelled, unless a share of the peak is given."""
    if assumed.mfu is None and not isinstance(objective, IJepaObjective):
        raise ValueError(
            f"how long a step of objective.name={objective.name} takes is not known: the model of the step is of ijepa "
            "alone; give --mfu SHARE, the share of the peak that you expect, as 0.4"
        )


def compute(
    objective: Objective,
    counts: Counts | None,
    flops: Flops,
    model: Model,
    sharding: Sharding,
    *,
    images: int,
    cluster: Cluster,
    assumed: Assumed,
) -> Compute:
    """counts: an image's means, of I-JEPA. images: of a micro-batch."""
    kind = cluster.kind
    newton = muon_flops(model) / (sharding.ranks if sharding.zero_stage < 3 else 1) / kind.sustained.matrix
    if assumed.mfu is not None:
        needed = seconds_at_share(images * flops.model, peak=kind.peak, share=assumed.mfu)
        again = seconds_at_share(images * flops.again, peak=kind.peak, share=assumed.mfu)
        return Compute(forward=FORWARD_SHARE * needed, backward=(1 - FORWARD_SHARE) * needed + again, tail=newton)
    assert isinstance(objective, IJepaObjective) and counts is not None, "check_modelled() comes first"
    work = step_model.model_step(
        objective,
        counts.times(images),
        trained=model.trained,
        averaged=model.averaged,
        rates=kind.sustained,
        compiled=objective.compiled,
    )
    forward, backward = (sum(one.seconds for one in work if one.phase == phase) for phase in ("forward", "backward"))
    of_trained = [
        one for one in work if one.phase == "forward" and one.network in (step_model.CONTEXT, step_model.PREDICTOR)
    ]
    again = images * flops.again * sum(one.seconds for one in of_trained) / sum(one.flops for one in of_trained)
    each = sum(one.seconds for one in work if one.what == EACH_MICRO_STEP or one.category == step_model.IDLE)
    once = sum(one.seconds for one in work if one.phase == "tail") - each
    return Compute(
        forward=kind.slower * forward,
        backward=kind.slower * (backward + again + each),
        tail=kind.slower * once / sharding.ranks + newton,
    )


def muon_flops(model: Model) -> float:
    """Of a step's updates of all matrices: engine/muon.py makes each orthogonal by products with its shorter side."""
    total = 0
    for group in model.groups:
        for rows, columns in group.shapes if group.muon else ():
            short, long = sorted((rows, columns))
            total += ITERATIONS * (4 * short**2 * long + 2 * short**3)
    return float(total)


def step_of(
    made: Compute, sent: Sequence[Collective], sharding: Sharding, *, cluster: Cluster, assumed: Assumed
) -> Step:
    """The step's seconds. sent: its collectives, none of one rank."""
    took = {one.what: seconds_of(one, sharding.ranks, cluster=cluster, assumed=assumed) for one in sent}
    calls = {one.what: one.calls for one in sent}
    micro_steps = sharding.micro_steps
    behind_forward, behind_backward = assumed.overlap * made.forward, assumed.overlap * made.backward
    waits: dict[str, float] = {what: took[what] for what in ("updates", "norm", "small weights") if what in took}
    if sharding.zero_stage == 3:
        each = ("weights", "averages", "gradients")
        both = sum(took.get(what, 0.0) for what in each) / micro_steps
        first = sum(took[what] / calls[what] for what in ("weights", "gradients") if what in took)
        if sent:
            waits["weights and gradients"] = micro_steps * max(first, both - behind_forward - behind_backward)
    elif sent:
        times = micro_steps if sharding.every_micro_step else 1
        gradients, gathers = took["gradients"] / times, took["weights"] + took.get("averages", 0.0)
        last = gradients / (calls["gradients"] / times)
        waits["gradients"] = times * max(last, gradients - behind_backward)
        waits["weights and averages"] = max(took["weights"] / calls["weights"], gathers - behind_forward)
    return Step(compute=micro_steps * (made.forward + made.backward) + made.tail, waits=waits)


def seconds_of(one: Collective, ranks: int, *, cluster: Cluster, assumed: Assumed) -> float:
    """Over rings: the bytes that a rank sends at its link's rate, and each call's hops."""
    hops = (2 if one.operation == ALL_REDUCE else 1) * (ranks - 1)
    return one.sent(ranks) / (assumed.link_efficiency * cluster.link) + one.calls * hops * assumed.hop_seconds


def sends_in_words(sent: Sequence[Collective], ranks: int) -> tuple[float, float]:
    """(bytes that a rank sends of reduce-scatters, of all else) in a step."""
    scattered = math.fsum(one.sent(ranks) for one in sent if one.operation == REDUCE_SCATTER)
    return scattered, math.fsum(one.sent(ranks) for one in sent) - scattered
