"""The step alone: what is wrong with its times, and a small run of it. How fast anything is, is not asked here."""

import json

import pytest
import torch

from ijepa_scale import build
from ijepa_scale.benchmark.alone import AGAIN, WARM_UP, achieved, faults, rates_of
from ijepa_scale.benchmark.in_memory import DrawnOnDevice, RandomImages
from ijepa_scale.config import load_config
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.plan.step_model import ATTENTION, COPIES, IDLE, MATRIX, Rates, Work
from tests.benchmark import worker_benchmark
from tests.processes import assert_all, run_ranks

SMALL = ["model.depth=1", "model.width=24", "predictor.width=24", "predictor.depth=1", "predictor.heads=1"]


def steps(seconds, again=None, graphs=None, skipped=()):
    again = again or [0.3] * 10
    graphs = graphs or [6] * (len(seconds) + len(again))
    return {"seconds": seconds, "seconds_again": again, "graphs_compiled": graphs, "skipped": list(skipped)}


def test_a_sound_run_has_no_faults():
    warming = [40.0, 3.0, 1.0, 0.5, 0.46]
    assert len(warming) == WARM_UP
    seconds = [*warming, *([0.3, 0.31, 0.44] * 15)]
    assert faults(steps(seconds, graphs=[2, 4, 6, 6, 6, *[6] * 55]), timed=True) == []


@pytest.mark.parametrize(
    "found, words",
    [
        (steps([*[0.3] * 22, 0.46, *[0.3] * 27]), ["step 23 took 460 ms, 1.5 times the median of 300"]),
        (steps([0.3] * 50, again=[*[0.3] * 9, 0.9]), ["step 60 took 900 ms, 3.0 times the median of 300"]),
        (steps([0.3] * 50, graphs=[*[6] * 29, *[8] * 31]), ["step 30 compiled 2 graphs anew"]),
        (steps([0.6] * 50), ["masks that come for the first time take 600 ms, and 300 when they come again"]),
        (steps([0.3] * 50, skipped=[7]), ["step 7 was skipped"]),
    ],
)
def test_faults_are_named(found, words):
    said = faults(found, timed=True)
    assert len(said) == len(words)
    for one, expected in zip(said, words, strict=True):
        assert expected in one


def test_on_a_cpu_times_are_no_faults_and_compilations_are():
    graphs = [*[6] * 29, *[7] * 31]
    assert faults(steps([*[0.3] * 49, 9.0], graphs=graphs), timed=False) == ["step 30 compiled 1 graphs anew"]


def test_rates_leave_the_warm_up_out():
    found = {"seconds": [9.0] * WARM_UP + [0.5] * 6, "model_flops": [1e12] * (WARM_UP + 6 + AGAIN), "batch": 8}
    rates = rates_of(found, Rates(matrix=4e12, copy=1.0))
    assert rates["images_per_second"] == {"median": 16.0, "low": 16.0, "high": 16.0}
    assert rates["share_of_sustained"] == 0.5 and rates_of(found, None)["share_of_sustained"] is None


def test_what_was_achieved_is_of_what_the_model_counts():
    def work(category, **amounts):
        return Work(category=category, what="", network="", phase="", seconds=1.0, **amounts)

    model = [work(MATRIX, flops=3e12), work(MATRIX, flops=1e12, bytes=5.0), work(COPIES, bytes=2e9), work(ATTENTION)]
    rows = [{"name": name, "milliseconds": 10.0} for name in (MATRIX, COPIES, ATTENTION, IDLE, "other")]
    found = achieved(rows, model)
    assert found == {
        MATRIX: {"tflop_per_second": pytest.approx(400)},
        COPIES: {"gigabytes_per_second": pytest.approx(200)},
    }


def test_a_batch_in_memory_is_what_training_would_make_of_such_images():
    config = load_config("tiny", [*SMALL, "optimization.global_batch_size=4", "optimization.micro_batch_size=4"])
    objective = build.build_ijepa(config)
    images = RandomImages(config.data.image_size, 8)
    dataset = build.build_micro_batches(config, images, objective, micro_batch_size=4, rank=0, ranks=1)
    first, second = dataset.batch(0), dataset.batch(1)
    assert first.images.dtype == torch.uint8 and first.images.shape == (4, 3, 64, 64)
    assert first.images.is_contiguous(memory_format=torch.channels_last), "as crops of decoded images are"
    assert not torch.equal(first.images, second.images)
    assert Counts.of(second.masks) == Counts.of(objective.draw_masks(1, range(4)))


def test_weights_are_drawn_by_name_and_the_target_starts_as_the_context():
    objective = DrawnOnDevice.of(build.build_ijepa(load_config("tiny", SMALL)), torch.device("cpu"))
    name, shape = "context_encoder.blocks.0.attn.qkv.weight", torch.Size((72, 24))
    weight = objective.initial_weight(name, shape)
    assert torch.equal(weight, objective.initial_weight(name.replace("context", "target"), shape))
    assert not torch.equal(weight, objective.initial_weight(name.replace("qkv", "proj"), shape))
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert objective.initial_weight("context_encoder.norm.weight", torch.Size((24,))).eq(1).all()


def test_a_small_run_lists_its_steps_and_traces_some(tmp_path):
    assert_all(run_ranks(worker_benchmark.alone, 1, tmp_path, SMALL, 12, str(tmp_path)))
    found = json.loads((tmp_path / "alone.json").read_text())
    assert (len(found["seconds"]), len(found["seconds_again"]), found["faults"]) == (12, AGAIN, [])
    assert (found["batch"], found["batch_asked"]) == (2, 4), "memory held two images of the four"
    config = load_config("tiny", SMALL)
    objective = build.build_ijepa(config)
    flops = [objective.flops.model(Counts.of(objective.draw_masks(step, range(2)))) for step in range(12)]
    assert found["model_flops"] == [*flops, *flops[-AGAIN:]], "twelve layouts of masks, the last ones again"
    assert len(set(flops)) > 6 and found["losses"][0] != found["losses"][-1]
    assert found["share_of_sustained"] == pytest.approx(found["flop_per_second"]["median"] / 1e12)
    assert found["estimate"]["milliseconds"] > 0 and found["estimate"]["categories"][MATRIX]["flops"] > 0
    traced = json.loads((tmp_path / "trace.json").read_text())
    times = {row["name"]: row["milliseconds"] for row in traced["categories"]}
    assert min(times[MATRIX], times[IDLE]) > 0 and {"forward", "backward"} <= {one["name"] for one in traced["phases"]}
    assert traced["achieved"][MATRIX]["tflop_per_second"] > 0
