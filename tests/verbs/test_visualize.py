"""The verb visualize, on a run of 4 x 4 patches of images of 16 pixels, and 16 pictures."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ijepa_scale.config import LossConfig, MaskConfig, ObjectiveConfig, PredictorConfig
from ijepa_scale.engine.checkpoint import MANIFEST, _digest, read_manifest
from ijepa_scale.exchange.export import export
from ijepa_scale.pictures import drawing
from ijepa_scale.pictures.subject import open_checkpoint, open_images_of
from ijepa_scale.run.page import pictures_of
from ijepa_scale.verbs.visualize import main
from ijepa_scale.visualize.sheet import SECTIONS
from tests.processes import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "before_rooms"
IMAGES = str(FIXTURES / "images")
SMALL = ["--images", IMAGES, "--count", "3", "--among", "12"]
MADE = ["attention", "features", "mask_shares", "masks", "neighbours", "patches", "predictions", "similarity"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visualize") / "run"
    shutil.copytree(FIXTURES / "zero1", folder)
    return folder


@pytest.fixture(autouse=True)
def few_layouts(monkeypatch):
    monkeypatch.setattr(drawing, "LAYOUTS", 50)


def words_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_all_pictures_of_a_run_with_the_words_beside_them(run, capsys):
    assert main(["all", "--checkpoint", str(run), *SMALL]) == 0
    said, folder = capsys.readouterr().out, run / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{n}.{e}" for n in MADE for e in ("png", "json"))
    for name in MADE:
        words = words_of(folder, name)
        assert words["section"] in SECTIONS and words["step"] == 4
        assert all(len(words[key]) > 10 for key in ("title", "caption", "alt"))
        assert np.asarray(Image.open(folder / f"{name}.png").convert("RGB")).std() > 10
    assert "less the mean at each place, over 12 images" in words_of(folder, "similarity")["caption"]
    assert "12 images of images:train\n" in said and "±" in words_of(folder, "predictions")["caption"]
    for what, made in (("masks", "masks.png, mask_shares.png"), ("predict", "predictions.png")):
        assert f"{what}: {folder}/{made} (" in said


def test_what_is_drawn_depends_on_the_seed_alone(run, tmp_path):
    captions, pictures = {}, {}
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        words = ["predict", "--checkpoint", str(run), *SMALL, "--out", str(tmp_path / name), "--seed", seed]
        assert main(words) == 0
        captions[name] = words_of(tmp_path / name, "predictions")["caption"]
        pictures[name] = (tmp_path / name / "predictions.png").read_bytes()
    assert captions["one"] == captions["same"] != captions["other"]
    assert pictures["one"] == pictures["same"] != pictures["other"]


def test_patches_boxes_layers_sizes_and_queries_of_ones_choice(run, tmp_path):
    usual = ["--checkpoint", str(run), *SMALL, "--out", str(tmp_path)]
    features = ["--size", "24", "--patch", "5,5", "--layers", "-1", "0", "--foreground", "0.3", "--raw"]
    assert main(["features", *usual, *features]) == 0
    assert "24 pixels" in words_of(tmp_path, "features")["caption"]
    assert "less the mean at each place" not in words_of(tmp_path, "features")["caption"]
    assert words_of(tmp_path, "attention")["title"].endswith("block 0 attend to")
    assert "the marked patch" in words_of(tmp_path, "attention")["caption"]
    assert main(["predict", *usual, "--box", "0,1,2,3"]) == 0
    assert main(["neighbours", *usual, "--query", f"{IMAGES}/03.png", "--patch", "0,0"]) == 0
    assert words_of(tmp_path, "neighbours")["alt"].startswith("1 rows")


def test_what_is_wrong_is_said_in_words(run, tmp_path, capsys):
    for words, said in (
        (["features", "--patch", "4,0"], "--patch 4,0 is outside the grid of 4 x 4 patches: rows are 0..3"),
        (["features", "--patch", "1"], "--patch wants ROW,COL in whole numbers with commas between, got '1'"),
        (["predict", "--box", "2,2,3,1"], "--box 2,2,3,1 (row, column, height, width) must lie in the grid of 4 x 4"),
        (["predict", "--box", "0,0,4,4"], "leave some of it"),
        (["predict", "--box", "a,b,c,d"], "--box wants ROW,COL,HEIGHT,WIDTH"),
        (["features", "--layers", "2"], "--layers 2: the encoder has 2 blocks"),
        (["features", "--size", "18"], "multiples of the patch, 4 pixels, got 18 x 18"),
        (["predict", "--size", "32"], "--size is of features alone, got it with predict"),
        (["features", "--foreground", "2"], "--foreground 2 keeps 0 of 48 patches"),
        (["features", "--count", "20"], "--count 20 is more than --among 12"),
        (["features", "--images", str(tmp_path / "none")], "none"),
        (["neighbours", "--query", str(tmp_path / "none.png")], "cannot read the query"),
    ):
        task, *rest = words
        assert main([task, "--checkpoint", str(run), *SMALL, "--out", str(tmp_path / "out"), *rest]) == 2, words
        assert said in capsys.readouterr().err, words
    assert main(["features", "--checkpoint", str(tmp_path / "none"), *SMALL]) == 2
    assert f"there is no {tmp_path / 'none'}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["feature", "--checkpoint", str(run)])
    assert end.value.code == 2 and "'features'" in capsys.readouterr().err


def test_an_export_of_an_encoder_has_features_but_no_predictions(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or its source is asked for five times
    export(str(run), tmp_path / "timm", form="timm", network=None, licence="unknown")
    usual = ["--checkpoint", str(tmp_path / "timm"), *SMALL]
    assert main(["features", *usual]) == 2 and "give --out DIR" in capsys.readouterr().err
    assert main(["predict", *usual, "--out", str(tmp_path / "out")]) == 2
    assert "and no predictor" in capsys.readouterr().err
    assert main(["all", *usual, "--out", str(tmp_path / "out")]) == 0
    assert "left out: predict: " in capsys.readouterr().out
    assert main(["features", "--checkpoint", str(tmp_path / "timm"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip()


def test_another_objective_has_masks_but_no_predictions(run, tmp_path):
    checkpoint = open_checkpoint(str(run))
    assert checkpoint.config is not None
    sections = {"mask": MaskConfig(), "loss": LossConfig(), "predictor": PredictorConfig()}  # which are not MAE's
    other = replace(checkpoint, config=replace(checkpoint.config, objective=ObjectiveConfig(name="mae"), **sections))
    assert "of the objective mae; predict is of ijepa alone" in other.why_not("predict")
    assert not checkpoint.why_not("predict") and not other.why_not("masks")
    images = open_images_of(checkpoint, IMAGES, "", "", among=4, seed=0)
    nothing = {"layers": [0], "foreground": None, "raw": False, "queries": [], "patch": None, "box": None, "samples": 1}
    asked = drawing.Asked(out=tmp_path, count=3, seed=0, size=16, drawers={}, **nothing)
    assert drawing.draw_masks_of(other, images, asked) == ["masks.png"]
    assert words_of(tmp_path, "masks")["caption"].startswith("Masks of mae, ")


def test_images_are_those_that_were_not_trained_on(run, image_folder, tmp_path):
    """By default the run's validation split; where it has none, the words say that it was trained on them."""
    checkpoint = open_checkpoint(str(run))
    assert checkpoint.config is not None
    shutil.copytree(image_folder / "train", tmp_path / "train")
    shutil.copytree(image_folder / "train" / "class-0", tmp_path / "validation" / "class-0")
    chosen = {}
    for source in (image_folder, tmp_path):
        config = replace(checkpoint.config, data=replace(checkpoint.config.data, source=str(source)))
        chosen[source] = open_images_of(replace(checkpoint, config=config), "", "", "", among=64, seed=0)
    assert chosen[image_folder].words.endswith(":train, of the split that was trained on")
    assert chosen[tmp_path].words.endswith(":validation, never trained on") and len(chosen[tmp_path].indices) == 16
    assert sorted(chosen[image_folder].indices) == list(range(64)) != chosen[image_folder].indices


@pytest.fixture
def two_checkpoints(run, tmp_path):
    """A run with another checkpoint, of step 2, and of other weights."""
    shutil.copytree(run / "checkpoints", tmp_path / "two" / "checkpoints")
    earlier = tmp_path / "two" / "checkpoints" / "step-00000002"
    shutil.copytree(earlier.with_name("step-00000004"), earlier)
    manifest = read_manifest(earlier)
    generator = torch.Generator().manual_seed(0)
    for entry in manifest["files"]:
        file = earlier / entry["name"]
        weights = {
            key: value + 0.02 * torch.randn(value.shape, generator=generator) for key, value in load_file(file).items()
        }
        save_file(weights, file)
        entry |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest["step"] = 2
    (earlier / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))
    return tmp_path / "two"


def test_a_picture_of_each_checkpoint_is_a_slider_of_its_own(two_checkpoints, capsys):
    run, folder = two_checkpoints, two_checkpoints / "pictures"
    assert main(["features", "--checkpoint", str(run), *SMALL]) == 0
    alone = (folder / "features.png").read_bytes()
    assert main(["features", "--checkpoint", str(run), *SMALL, "--steps", "all"]) == 0
    drawn = ("attention", "features", "similarity")
    of_steps = {f"{name}-checkpoint-{step:08d}.png" for name in drawn for step in (2, 4)}
    assert {path.name for path in folder.glob("*.png")} == {*of_steps, *(f"{name}.png" for name in drawn)}
    assert (folder / "features.png").read_bytes() == alone == (folder / "features-checkpoint-00000004.png").read_bytes()
    steps = {block.title: [frame.step for frame in block.frames] for block in pictures_of(run)[0]["features"]}
    assert steps["Patch features in colours"] == [4]
    assert steps["Patch features in colours, over checkpoints"] == [2, 4]
    newest, earlier = (words_of(folder, f"features-checkpoint-{step:08d}")["caption"] for step in (4, 2))
    assert "Colours of earlier checkpoints are turned to these." in newest
    assert "to be like those of step 4: the correlation with these is 0." in earlier
    assert capsys.readouterr().out.count("12 images of images:train") == 3


def test_some_of_the_steps_that_a_run_has_kept(two_checkpoints, tmp_path, capsys):
    usual = ["--checkpoint", str(two_checkpoints), *SMALL, "--out", str(tmp_path / "out")]
    assert main(["predict", *usual, "--steps", "2"]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["predictions-checkpoint-00000002.png"]
    assert main(["predict", *usual, "--steps", "2", "3"]) == 2
    assert "--steps 3: " in (said := capsys.readouterr().err) and "has kept checkpoints of the steps 2, 4; " in said
    assert main(["masks", *usual, "--steps", "all"]) == 2
    assert "masks are the same at every step" in capsys.readouterr().err
    assert main(["predict", "--checkpoint", str(tmp_path), *SMALL, "--steps", "all"]) == 2
    assert "--steps is of a run, and there is no checkpoint in" in capsys.readouterr().err


def test_help_imports_nothing_that_takes_time():
    code = "import sys; from ijepa_scale.verbs.visualize import main\ntry: main(['--help'])\n"
    code += "except SystemExit: print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n") and "WHAT" in done.stdout
