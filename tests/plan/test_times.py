"""Times of a plan against published speeds, one measured step, and sums by hand."""

import json
import statistics

import pytest

from ijepa_scale.config import load_config
from ijepa_scale.models.vit import VIT_SIZES
from ijepa_scale.objectives.flops import forward
from ijepa_scale.plan import settings
from ijepa_scale.plan.clusters import GPUS, cluster_of
from ijepa_scale.plan.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Collective
from ijepa_scale.plan.memory import Sharding
from ijepa_scale.plan.settings import plan
from ijepa_scale.plan.times import Assumed, Compute, seconds_at_share, seconds_of, step_of
from tests.processes import ROOT

A100S = cluster_of("a100-80g", 16, node=8, network="")
MEASURED = ROOT / "docs/measurements/nvidia-h100-80gb-hbm3/alone.json"


@pytest.fixture(autouse=True)
def plainest(monkeypatch):
    """Of all settings the one that is looked at."""
    monkeypatch.setattr(settings, "STAGES", (1,))
    monkeypatch.setattr(settings, "CHECKPOINTING", ("none",))


def planned(*overrides, cluster, **assumed):
    return plan(load_config(ROOT / "configs/vith14.yaml", list(overrides)), cluster, Assumed(**assumed))


def plain(found, micro_batch):
    return next(
        one
        for one in found.settings
        if (one.zero_stage, one.checkpointing, one.micro_batch) == (1, "none", micro_batch)
    )


@pytest.mark.parametrize("context, hours", [("batch_min", 72), ("all", 92)])
def test_the_published_recipe_takes_its_hours_at_its_share_of_the_peak(context, hours):
    """ViT-H/14 on 16 A100 in under 72 hours is 19.5% of their peak (arXiv:2301.08243), at 655 GFLOP an image."""
    found = planned(f"mask.context={context}", cluster=A100S, mfu=0.195)
    assert found.hours(plain(found, 128)) == pytest.approx(hours, rel=0.025)


def test_a_plain_vit_g_step_makes_its_images_at_its_share_of_the_peak():
    """86.6 images/s of an A100 at 44.4%: NVIDIA's ViT-g/14, with a class token, forward and backward."""
    flops = 3 * forward(VIT_SIZES["vit_giant"], 40, 257, 257**2)
    assert 1 / seconds_at_share(flops, peak=GPUS["a100-80g"].peak, share=0.444) == pytest.approx(86.6, rel=0.005)


def test_the_measured_step_and_its_memory():
    """ViT-H/14 with 128 images on one H100."""
    measured = json.loads(MEASURED.read_text())
    found = planned("optimization.global_batch_size=128", cluster=cluster_of("h100", 1, node=8, network=""))
    one = plain(found, 128)
    assert one.step.exposed == 0 and not one.sent
    assert one.step.seconds == pytest.approx(statistics.median(measured["seconds"][5:]), rel=0.03)
    assert measured["peak_memory_bytes"] < one.memory.total < 1.1 * measured["peak_memory_bytes"]


def of(operation, what, sizes):
    return Collective(operation=operation, what=what, sizes=tuple(sizes), calls=len(sizes))


SENT = [
    of(REDUCE_SCATTER, "gradients", [8 * 10**9] * 4),
    of(ALL_GATHER, "weights", [4 * 10**9] * 4),
    of(ALL_GATHER, "averages", [4 * 10**9] * 2),
    of(ALL_REDUCE, "norm", [8]),
]


def test_what_waits_is_what_does_not_hide():
    """By hand: 16 ranks send 15/16 of all at 80% of 200 GB/s; 15 hops a call, twice of an all-reduce."""
    assumed = Assumed(hop_seconds=1e-3, overlap=0.5)
    rate, part = 160e9, 15 / 16
    gradients, weights, averages, norm = (seconds_of(one, 16, cluster=A100S, assumed=assumed) for one in SENT)
    assert gradients == pytest.approx(part * 32e9 / rate + 4 * 15e-3)
    assert averages == pytest.approx(part * 8e9 / rate + 2 * 15e-3)
    assert norm == pytest.approx(30e-3, rel=1e-6)
    sharding = Sharding(zero_stage=1, ranks=16)
    for seconds, hidden in ((0.1, False), (10.0, True)):
        made = Compute(forward=seconds, backward=2 * seconds, tail=0.5)
        step = step_of(made, SENT, sharding, cluster=A100S, assumed=assumed)
        assert step.compute == pytest.approx(3 * seconds + 0.5)
        assert step.waits["gradients"] == pytest.approx(gradients / 4 if hidden else gradients - seconds)
        gathers = weights / 4 if hidden else weights + averages - 0.5 * seconds
        assert step.waits["weights and averages"] == pytest.approx(gathers)
        assert step.seconds == pytest.approx(step.compute + sum(step.waits.values()))


def test_micro_steps_hide_once_at_zero_1_and_each_at_zero_2():
    made, assumed = Compute(forward=0.1, backward=0.1, tail=0.0), Assumed(overlap=1.0, hop_seconds=0.0)
    once = step_of(made, SENT, Sharding(zero_stage=1, ranks=16, micro_steps=2), cluster=A100S, assumed=assumed)
    each = step_of(made, SENT, Sharding(zero_stage=2, ranks=16, micro_steps=2), cluster=A100S, assumed=assumed)
    assert once.compute == each.compute == pytest.approx(0.4)
    assert once.waits["gradients"] == pytest.approx(15 / 16 * 32e9 / 160e9 - 0.1)
    a_micro_step = 15 / 16 * 16e9 / 160e9
    assert a_micro_step < 0.1  # all hides behind its backward but for the last of its two calls
    assert each.waits["gradients"] == pytest.approx(2 * a_micro_step / 2)


@pytest.mark.parametrize("share", [{"mfu": 0.0}, {"mfu": 40.0}, {"overlap": -0.1}, {"link_efficiency": 2.0}])
def test_shares_are_shares(share):
    with pytest.raises(ValueError, match="is a share"):
        Assumed(**share)
