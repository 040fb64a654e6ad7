"""Pictures while training: what they show, that they change nothing, and what keeps them from being drawn."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ijepa_scale import build
from ijepa_scale.build import EvalImages
from ijepa_scale.config import load_config
from ijepa_scale.data.images import open_images
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.pictures.subject import Images, open_images_of
from ijepa_scale.run import step_pictures
from ijepa_scale.run.page import pictures_of
from ijepa_scale.run.step_pictures import SHOWN, StepPictures, cut_back
from ijepa_scale.visualize.features import patch_features, pca_scores, turned


@pytest.fixture
def run(small_config, image_folder, tmp_path):
    """A run as its pictures see it; of the small encoder with its initial weights."""
    config = load_config(small_config, ["logging.pictures_every_steps=3"])
    images = open_images(str(image_folder))
    return SimpleNamespace(
        config=config,
        ranks=Ranks(0, 1, 0, torch.device("cpu")),
        folder=SimpleNamespace(path=tmp_path),
        objective=build.build_objective(config),
        engine=SimpleNamespace(module=build.build_model(config)),
        dataset=SimpleNamespace(micro_batch_size=16),
        evaluation=EvalImages(images, images, held_out=False),
    )


@pytest.fixture
def pictures(run):
    run.said, run.logged = [], []
    return StepPictures(run, run.logged.append, run.said.append)


@pytest.fixture
def unpainted(monkeypatch):
    """Pictures that take no time to paint."""
    monkeypatch.setattr(step_pictures, "draw_step", lambda path, *_, **__: path.write_bytes(b"painted"))


def scores_of(run, step):
    with np.load(run.folder.path / "pictures" / f"features-step-{step:08d}.npz") as found:
        return found["scores"]


def change(run, seed=0):
    """Other weights for the target encoder."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.engine.module.target_encoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_a_slider_of_the_same_images_on_the_page_and_a_record_of_each(run, pictures):
    assert [step for step in range(8) if pictures.due(step)] == [0, 3, 6]
    for step in (0, 3):
        pictures.draw(step)
        change(run)
    blocks, left_out = pictures_of(run.folder.path)
    (slider,) = blocks["features"]
    assert [frame.step for frame in slider.frames] == [0, 3] and left_out == [] and run.said == []
    assert all(min(frame.pixels) > 300 for frame in slider.frames)
    first, second = (frame.caption for frame in slider.frames)
    assert (
        "6 images of" in first
        and "of the split that is trained on. Features of the target encoder's last block" in first
    )
    assert "over 64 images" in first and "Those of later steps are turned to these." in first
    assert "to be like those of step 0: the correlation with these is 0." in second
    assert [(one["kind"], one["step"], *one["pictures"].values()) for one in run.logged] == [
        ("pictures", 0, "features-step-00000000.png"),
        ("pictures", 3, "features-step-00000003.png"),
    ]
    assert all(0 < one["seconds"] < 60 for one in run.logged)


def test_the_features_are_those_of_the_images_that_visualize_shows(run, pictures):
    """Computed there in another way; and less the mean at each place."""
    pictures.draw(0)
    loaded = SimpleNamespace(image_size=32, path=run.folder.path, step=0)
    checkpoint = SimpleNamespace(loaded=loaded, config=run.config, run=None)
    images: Images = open_images_of(checkpoint, "", "", "", among=64, seed=0)  # type: ignore[arg-type]
    (all_features,) = patch_features(run.engine.module.target_encoder.eval(), images.pixels, [-1])
    expected = pca_scores(all_features[:SHOWN] - all_features.mean(axis=0, dtype=np.float64))
    _, near = turned(scores_of(run, 0), expected)
    assert scores_of(run, 0).shape == (SHOWN, 64, 3) and near == pytest.approx(1.0, abs=1e-4)


def test_weights_modes_and_random_numbers_are_as_before(run, pictures):
    module = run.engine.module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    pictures.draw(3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.equal(torch.get_rng_state(), states[0]) and [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert run.logged and not any(parameter.grad is not None for parameter in module.parameters())


def test_a_run_that_is_resumed_draws_the_same_again(run, pictures, unpainted):
    drawn = {}
    for step in (0, 3, 6):
        pictures.draw(step)
        if step == 3:
            at_3 = {name: value.clone() for name, value in run.engine.module.state_dict().items()}
        change(run, seed=step)
        drawn[step] = scores_of(run, step)
    folder = run.folder.path / "pictures"
    contents = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    (folder / "features.png").write_bytes(b"of the verb visualize")
    cut_back(run.folder.path, 3)
    assert {path.name for path in folder.iterdir()} == {
        "features.png",
        *(f"features-step-{step:08d}.{ending}" for step in (0, 3) for ending in ("png", "json", "npz")),
    }
    run.engine.module.load_state_dict(at_3)
    again = StepPictures(run, run.logged.append, run.said.append)
    for step in (3, 6):
        again.draw(step)
        change(run, seed=step)
        np.testing.assert_array_equal(scores_of(run, step), drawn[step])
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == contents
    cut_back(run.folder.path, 0)  # it starts anew
    assert [path.name for path in folder.iterdir()] == ["features.png"]


def test_colours_are_not_turned_to_those_of_other_images(run, pictures, image_folder, unpainted):
    pictures.draw(0)
    other = open_images(str(image_folder / "train" / "class-1"))
    run.evaluation = EvalImages(other, other, held_out=True)
    pictures.draw(3)
    caption = json.loads((run.folder.path / "pictures" / "features-step-00000003.json").read_text())["caption"]
    assert "turned, all as one" not in caption and "never trained on" in caption and "over 16 images" in caption


def test_what_keeps_a_picture_from_being_drawn_is_told_once_and_ends_nothing(run, pictures, monkeypatch):
    (run.folder.path / "pictures").write_text("in the way")
    pictures.draw(0)
    pictures.draw(3)
    (said,) = run.said
    assert said.startswith("warning: there is no picture of step 0: FileExistsError: ") and "Training goes on" in said
    (run.folder.path / "pictures").unlink()

    def broken(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(step_pictures, "draw_step", broken)
    pictures.draw(6)
    assert len(run.said) == 2 and "step 6: RuntimeError: no font" in run.said[1] and run.logged == []
    monkeypatch.undo()
    pictures.draw(9)
    assert [one["step"] for one in run.logged] == [9] and len(run.said) == 2


def test_images_that_cannot_be_read_and_features_that_are_not_finite_are_told(run, pictures, tmp_path):
    whole = run.evaluation
    (tmp_path / "torn").mkdir()
    for name in "ab":
        (tmp_path / "torn" / f"{name}.png").write_bytes(b"\x89PNG torn")
    torn = open_images(str(tmp_path / "torn"))
    run.evaluation = EvalImages(torn, torn, held_out=False)
    pictures.draw(0)
    assert "none of 2 images can be read" in run.said[0]
    run.evaluation = whole
    with torch.no_grad():
        run.engine.module.target_encoder.norm.weight.fill_(float("nan"))
    pictures.draw(3)
    assert "step 3: ValueError: the features are not finite" in run.said[1] and run.logged == []
