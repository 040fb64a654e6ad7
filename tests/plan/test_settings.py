"""Settings of a recipe on a cluster: which there are, which fit, which is taken, and what is refused."""

from dataclasses import replace

import pytest

from ijepa_scale.config import load_config
from ijepa_scale.plan import sampling
from ijepa_scale.plan.clusters import GPUS, NETWORKS, cluster_of
from ijepa_scale.plan.settings import Planned, plan
from ijepa_scale.plan.times import Assumed, Step
from tests.processes import ROOT


@pytest.fixture(autouse=True)
def few_layouts(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLED_STEPS", 4)


def planned(name="vitb16", *overrides, gpus=64, gpu="a100-80g", node=8, network="", usable=0.0, **assumed):
    small = ["model.depth=2"] if name.startswith("vit") else []
    config = load_config(ROOT / f"configs/{name}.yaml", [*small, *overrides])
    return plan(config, cluster_of(gpu, gpus, node=node, network=network), Assumed(**assumed), usable=usable)


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SAMPLED_STEPS", 4)
        return planned()


def test_every_setting_is_there_once(found):
    names = [(one.zero_stage, one.checkpointing, one.micro_batch) for one in found.settings]
    assert len(names) == len(set(names)) == 3 * 4 * 6  # 32 images a GPU: 1, 2, 4, 8, 16, 32
    assert all(one.micro_batch * one.micro_steps == 32 for one in found.settings)
    assert found.steps == 600 * (1_281_167 // 2048)


def test_what_a_setting_changes(found):
    by = {(one.zero_stage, one.checkpointing, one.micro_batch): one for one in found.settings}
    for stage in (1, 2, 3):
        none, full = by[stage, "none", 32], by[stage, "full", 32]
        assert full.memory.activations < 0.1 * none.memory.activations and full.step.compute > none.step.compute
        assert by[stage, "none", 16].memory.activations == pytest.approx(none.memory.activations / 2)
    one, two, three = (by[stage, "none", 16] for stage in (1, 2, 3))  # two micro-steps
    assert one.memory.gradients > two.memory.gradients and two.memory.weights > three.memory.weights
    assert one.step.exposed < three.step.exposed


def test_the_fastest_that_fits_is_taken_and_of_equals_the_simplest(found):
    fitting = [one for one in found.settings if one.fits]
    assert found.fastest in fitting and found.fastest.step.seconds <= 1.01 * min(one.step.seconds for one in fitting)
    first, second = found.settings[:2]
    alike = [replace(first, step=Step(compute=1.005)), replace(second, step=Step(compute=1.0))]
    choice = Planned(config=found.config, cluster=found.cluster, steps=1, settings=alike)
    assert choice.fastest is alike[0]
    slower = replace(choice, settings=[replace(first, step=Step(compute=1.1)), alike[1]])
    assert slower.fastest is alike[1]
    small = replace(choice, settings=[replace(alike[1], usable=1.0)])
    assert small.fastest is None


def test_one_gpu_sends_nothing_and_accumulates():
    found = planned("vitb16", gpus=1)
    assert not any(one.sent or one.step.exposed for one in found.settings)
    assert {one.micro_batch * one.micro_steps for one in found.settings} == {found.images}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gpus": 48}, "48 GPUs cannot cut optimization.global_batch_size 2048 evenly; use 32 or 64 GPUs"),
        ({"gpus": 3}, "use 2 or 4 GPUs"),
        ({"gpus": 4096}, "use 2048 GPUs"),
        ({"gpus": 12}, "no whole nodes of 8; use 8 or 16"),
        ({"gpus": 0}, "must be 1 or more"),
        ({"gpu": "v100"}, "use one of a100-40g"),
        ({"gpu": "l40s"}, "give --interconnect, one of ib-8x200"),
        ({"network": "carrier-pigeon"}, "--interconnect carrier-pigeon is not known"),
        ({"network": "-1"}, "--interconnect -1 is not known"),
    ],
)
def test_clusters_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        planned(**options)


def test_a_micro_batch_that_alters_what_is_learned_is_kept():
    found = planned("vith14", "mask.context=batch_min", gpus=16)
    assert {one.micro_batch for one in found.settings} == {128}
    with pytest.raises(
        ValueError, match="in micro-batches of 128, which alter what is learned here, evenly; use 16 GPUs"
    ):
        planned("vith14", "mask.context=batch_min", gpus=64)


def test_other_objectives_need_a_share_of_the_peak():
    small = ("data.num_images=100000",)
    with pytest.raises(ValueError, match=r"objective.name=mae takes is not known.*--mfu SHARE"):
        planned("mae_small", *small, gpus=2)
    for name in ("mae_small", "data2vec_small", "cae_small"):
        found = planned(name, *small, gpus=2, mfu=0.3)
        plain = found.settings[0]
        expected = plain.micro_batch * plain.flops.model / (0.3 * found.cluster.kind.peak)
        assert plain.step.compute == pytest.approx(expected) and found.fastest is not None


def test_what_is_not_known_of_the_recipe_is_asked_for():
    with pytest.raises(ValueError, match=r"data.num_images=N"):
        planned("vitb16", "data.num_images=0")
    with pytest.raises(ValueError, match=r"engine.precision=fp32"):
        planned("vitb16", "engine.precision=fp32")
    with pytest.raises(ValueError, match=r"this has objective.name=sketch"):
        planned("sketch_large")


def test_muon_is_counted():
    plain, muon = (planned("vitb16", f"optimization.optimizer={name}", gpus=8) for name in ("adamw", "muon"))
    assert muon.settings[0].step.seconds > plain.settings[0].step.seconds
    assert "updates" in {one.what for one in muon.settings[0].sent} - {one.what for one in plain.settings[0].sent}


def test_links_are_those_of_the_slowest_part():
    assert cluster_of("a100-80g", 8, node=8, network="").link == 300e9
    assert cluster_of("a100-80g", 16, node=8, network="").link == NETWORKS["ib-8x200"]
    assert cluster_of("a100-80g", 16, node=8, network="ethernet-25").link == 3.125e9
    assert cluster_of("l40s", 16, node=8, network="25").link == 25e9
    for gpu in GPUS.values():
        assert gpu.sustained.matrix < gpu.peak and gpu.sustained.copy < gpu.bandwidth
