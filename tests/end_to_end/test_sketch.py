"""Sketches of a small run's features, from training to the picture."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.exchange.export import export
from ijepa_scale.exchange.load import load
from ijepa_scale.pictures.sketches import decode, found_sketches, hide, read_drawer, told_apart
from ijepa_scale.pictures.subject import drawn_boxes, open_checkpoint, open_images_of
from ijepa_scale.run.records import read_records
from ijepa_scale.verbs.visualize import main as visualize
from ijepa_scale.visualize.predictions import mean_and_error
from tests.end_to_end.runs import checkpoints_of, state_of
from tests.processes import ROOT, assert_all, pretrain, run_ranks, train_sketch

FIXTURES = ROOT / "tests" / "fixtures" / "before_rooms"
SKETCH = """\
objective: {name: sketch}
sketch: {width: 32, depth: 2, heads: 2}
data: {source: %s, workers: 0}
optimization: {optimizer: muon, global_batch_size: 8, max_steps: 8, epochs: 4, warmup_epochs: 1, lr: 2e-3}
checkpoint: {every_steps: 4}
"""


@pytest.fixture
def encoder(tmp_path):
    """A trained I-JEPA of 4 x 4 patches on images of 16 pixels, and a config for its sketches."""
    shutil.copytree(FIXTURES / "zero1", tmp_path / "run")
    (tmp_path / "sketch.yaml").write_text(SKETCH % (FIXTURES / "images"))
    return tmp_path / "run"


def start(encoder, *words, ranks=1, code=0):
    words = ("--checkpoint", str(encoder), "--config", str(encoder.parent / "sketch.yaml"), *words)
    ends = run_ranks(train_sketch, ranks, encoder.parent / "output", *words, timeout=400)
    assert_all(ends, code)
    return ends[0].output


def losses_of(run):
    return [record["loss"] for record in read_records(run / "metrics.jsonl") if record["kind"] == "step"]


def test_a_decoder_is_trained_at_any_stage_goes_on_and_draws(encoder):
    usual, before = encoder / "sketch", {path.name for path in encoder.iterdir()}
    said = start(encoder)
    assert "sketches.png" in said and "no probes: no encoder is trained" in said
    assert {path.name for path in encoder.iterdir()} - before == {"sketch", "pictures", "report.html"}
    words = json.loads((encoder / "pictures" / "sketches.json").read_text())
    assert words["section"] == "sketches" and words["step"] == 4 and "±" in words["caption"]
    assert np.asarray(Image.open(encoder / "pictures" / "sketches.png").convert("RGB")).std() > 10
    assert "What the predictor imagines" in (encoder / "report.html").read_text()
    losses = losses_of(usual)
    assert len(losses) == 8 and losses[-1] < losses[0] and checkpoints_of(usual) == [4, 8]
    assert not [key for key in state_of(usual, 8) if "|encoder." in key]  # it is not saved again
    other = encoder.parent / "other"
    start(encoder, f"run_dir={other}", "engine.zero_stage=3", "optimization.stop_at_step=4", ranks=2)
    start(encoder, f"run_dir={other}", "engine.zero_stage=3", ranks=2)
    assert losses_of(other) == pytest.approx(losses, abs=2e-6)


def test_a_flow_stands_beside_the_decoder_and_draws_several(encoder):
    said = start(encoder, "sketch.kind=flow", "sketch.condition=mean", "logging.pictures_every_steps=4")
    assert (encoder / "sketch-flow" / "checkpoints").is_dir() and "condition mean; a sample's box is nearest" in said
    assert json.loads((encoder / "pictures" / "samples.json").read_text())["section"] == "sketches"


def test_what_does_not_fit_is_said_before_training(encoder, tmp_path):
    assert "sketch.checkpoint: there is no" in start(encoder.parent / "none", code=2)
    assert "its width a multiple of its heads" in start(encoder, "sketch.width=30", "sketch.heads=4", code=2)
    assert "is of objective.name=ijepa; give one of sketch" in start(encoder, "--config", "tiny", code=2)
    assert f"model.width=48 cannot be: --checkpoint {encoder} fixes it" in start(encoder, "model.width=48", code=2)
    assert "model.init_from" in start(encoder, f"model.init_from={encoder}", code=2)
    export(str(encoder), tmp_path / "timm", form="timm", network=None, licence="unknown")
    said = start(tmp_path / "timm", code=2)
    assert "no predictor, and sketches are of what I-JEPA predicts" in said
    start(encoder, "optimization.stop_at_step=4")
    another = tmp_path / "another"
    shutil.copytree(FIXTURES / "zero2", another)
    said = start(another, f"run_dir={encoder / 'sketch'}", code=2)
    assert "sketch.checkpoint" in said and "choose another run_dir" in said
    with pytest.raises(ValueError, match=r"trains no encoder.*give .*run"):
        load(encoder / "sketch")


SCENES = """\
data: {source: scenes, num_images: 2000, image_size: 16, workers: 0, cache_dir: %s, crop_scale: [0.9, 1.0]}
model: {name: vit_tiny, patch_size: 4, width: 64, depth: 3, heads: 2}
predictor: {width: 48, depth: 2}
mask: {min_keep: 1, target_scale: [0.2, 0.3], num_target_blocks: 3}
loss: {variance: 0.02, covariance: 0.004}
optimization: {optimizer: muon, global_batch_size: 64, max_steps: 200, epochs: 4, warmup_epochs: 1, lr: 2e-3}
checkpoint: {every_steps: 200}
logging: {health_every_steps: 0}
report: {train_images: 0}
"""


@pytest.mark.slow
def test_sketches_hold_what_features_and_predictions_say(tmp_path):
    """At toy size what docs/visualize.md shows: of held-out scenes."""
    (tmp_path / "scenes.yaml").write_text(SCENES % (tmp_path / "cache"))
    run = tmp_path / "run"
    words = ("--config", str(tmp_path / "scenes.yaml"), f"run_dir={run}")
    assert_all(run_ranks(pretrain, 1, tmp_path / "output", *words, timeout=400))
    (tmp_path / "sketch.yaml").write_text(SKETCH % '""')
    words = ("optimization.max_steps=300", "optimization.global_batch_size=64", "sketch.width=64", "sketch.noise=0.2")
    start(run, *words)
    start(run, *words, "sketch.kind=flow")
    checkpoint = open_checkpoint(str(run))
    images = open_images_of(checkpoint, "", "", "", among=256, seed=0)
    assert "never trained on" in images.words
    model = checkpoint.model()
    drawers = {kind: read_drawer(path, kind, checkpoint) for kind, path in found_sketches(checkpoint, {}).items()}
    hidden = hide(model, images, drawn_boxes(checkpoint, 256, 0), drawers["decoder"].layer)
    found = decode(drawers["decoder"], model, hidden)
    assert found.own >= 90
    for better, values in ((-1, found.off), (1, found.like)):
        gain, error = mean_and_error(values["prediction"] - values["mean of others"])
        assert better * gain > 2 * error
    chance = 100 / 64
    for name, times in (("truth", 20), ("prediction", 4)):  # of 64 by chance one; four or more in 2 of 100 cases
        share, _ = told_apart(drawers["flow"], hidden, name)
        assert share >= times * chance
    torch.manual_seed(0)
    assert visualize(["sketch", "--checkpoint", str(run)]) == 0
