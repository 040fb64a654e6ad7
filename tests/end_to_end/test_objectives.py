"""Objectives beside I-JEPA, from the config to the exported encoder: neither has a target encoder, nor an EMA."""

import re

import pytest
import torch

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.exchange.export import export
from ijepa_scale.exchange.load import find, load
from ijepa_scale.run.records import read_records
from tests.conftest import SMALL_CONFIG
from tests.end_to_end.runs import Runs, assert_close_run, assert_same_run, state_of, steps_of

SECTIONS = {
    "mae": "mae: {decoder_width: 16, decoder_depth: 1, decoder_heads: 2}",
    "cae": "cae: {regressor_depth: 1, decoder_depth: 1}",
}
NAMES = list(SECTIONS)


@pytest.fixture(scope="module")
def runs_of(image_folder, tmp_path_factory):
    """Runs of an objective, by its name."""

    def runs(name):
        folder = tmp_path_factory.mktemp(name)
        shared = re.sub(r"(?m)^(predictor|mask): .*\n", "", SMALL_CONFIG % image_folder)
        own = f"objective: {{name: {name}}}\n{SECTIONS[name]}\n"
        (folder / "small.yaml").write_text(shared + own)
        return Runs(folder / "small.yaml", folder)

    return runs


QUICK = ["mae", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "mae")]


@pytest.mark.parametrize("name", QUICK)
def test_it_learns_and_its_encoder_is_scored_and_exported(runs_of, tmp_path, name):
    run = tmp_path / "run"
    options = ("logging.health_every_steps=8", "report.train_images=32", "report.test_images=16")
    (end,) = runs_of(name)(run, *options, "optimization.lr=3e-3", ranks=1, drawn=True)
    records = read_records(run / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    health = [record for record in records if record["kind"] == "health"]
    assert len(health) == 3 and all("drift" not in record and record["feature_std"] > 0 for record in health)
    assert "loss.variance" not in end.output  # advice that this objective refuses
    assert (run / "report.json").is_file() and (run / "masks.png").stat().st_size > 5000
    kinds = {key.split("|")[1] for key in state_of(run, 12)}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}
    assert find(run).names == ("context",)
    loaded = load(run)  # as verbs that ask for the target encoder
    assert "holds the context encoder alone" in " ".join(loaded.notes)
    export(str(run), tmp_path / "out", form="safetensors")
    again, images = load(tmp_path / "out").network, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(again(images), loaded.network(images))
    assert f"\n# {name.upper()}, a vision transformer" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def alone(runs_of, tmp_path_factory):
    """A run of one process, by the objective's name."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp("alone") / "run"
            runs_of(name)(done[name], ranks=1)
        return done[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_learn_alike_at_every_stage_and_a_stop_leaves_no_trace(runs_of, alone, tmp_path, name, stage):
    runs, options = runs_of(name), (f"engine.zero_stage={stage}", "optimization.micro_batch_size=2")
    runs(tmp_path / "whole", *options)
    assert_close_run(tmp_path / "whole", alone(name))
    runs(tmp_path / "stopped", *options, "optimization.stop_at_step=6")
    runs(tmp_path / "stopped", *options)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bf16_and_recomputed_blocks_are_near_the_same_run(runs_of, alone, tmp_path, name):
    runs = runs_of(name)
    expected = [record["loss"] for record in steps_of(alone(name))]
    for stage in (1, 3):
        run = tmp_path / f"zero{stage}"
        runs(run, f"engine.zero_stage={stage}", "engine.precision=bf16", "engine.activation_checkpointing=full")
        assert [record["loss"] for record in steps_of(run)] == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_blocks_are_the_same_run(runs_of, alone, tmp_path, name):
    run, options = tmp_path / "run", ("engine.compile=true", "engine.activation_checkpointing=every_2")
    runs_of(name)(run, *options, ranks=1)
    expected = [record["loss"] for record in steps_of(alone(name))]
    assert [record["loss"] for record in steps_of(run)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shipped_has_the_sizes_and_the_first_encoder_of_the_small_ijepa(name):
    ours, theirs = load_config(f"{name}_small"), load_config("small_images")
    for section in ("model", "engine", "report"):
        assert getattr(ours, section) == getattr(theirs, section)
    assert ours.data.image_size == theirs.data.image_size
    encoder, other = (build.build_model(config).context_encoder.state_dict() for config in (ours, theirs))
    assert encoder.keys() == other.keys() and all(torch.equal(encoder[key], other[key]) for key in other)
