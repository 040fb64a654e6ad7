"""embed: patch features, chosen layers and networks, a stop in the middle, and what is refused."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_scale import build
from ijepa_scale.data.images import open_images
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.evals.stores import JOURNAL
from ijepa_scale.exchange.load import load
from ijepa_scale.objectives.ijepa import IJepaObjective
from ijepa_scale.verbs.embed import embed_source as embed
from ijepa_scale.verbs.embed import main
from ijepa_scale.verbs.neighbours import show_neighbours as neighbours
from tests.processes import run_ranks, start_ranks
from tests.verbs import worker_embed

PATCHES = "embeddings.patches.npy"


@pytest.fixture(scope="module")
def run():
    """A run folder, of 4 x 4 patches of images of 16 pixels; its two encoders differ."""
    return Path(__file__).parents[1] / "fixtures" / "before_rooms" / "zero1"


@pytest.fixture(scope="module")
def pictures(image_folder):
    return str(image_folder / "train")


def tokens_by_hand(run, pictures, network, layers, count=5):
    """Of the first images, (count, N, layers * D)."""
    encoder, images = load(run, network).network, open_images(pictures, split="train")
    crops = torch.stack([torch.from_numpy(center_crop(images.read(i), 16)) for i in range(count)])
    with torch.no_grad():
        return torch.cat(encoder.intermediate(crops, layers), dim=2).numpy()


def test_patches_of_chosen_layers_with_the_grid_that_they_are_of(run, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    words = [str(run), pictures, "--out", str(out), "--workers", "0", "--patches", "--layers", "-2", "-1"]
    assert main([*words, "--network", "context"]) == 0
    assert "64 images -> 32 numbers each, by " in capsys.readouterr().out
    facts = json.loads((out / "embeddings.json").read_text())
    assert facts["patches"] == {"rows": 4, "columns": 4} and facts["layers"] == [-2, -1]
    each, whole = (np.load(out / name, mmap_mode="r") for name in (PATCHES, "embeddings.npy"))
    assert each.shape == (64, 16, 32) and whole.shape == (64, 32) and each.dtype == whole.dtype == np.float32
    expected = tokens_by_hand(run, pictures, "context", (-2, -1))
    np.testing.assert_allclose(each[:5], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole[:5], expected.mean(axis=1), rtol=1e-4, atol=1e-5)
    assert np.abs(expected - tokens_by_hand(run, pictures, "target", (-2, -1))).max() > 1e-3
    assert sorted(path.name for path in out.iterdir()) == [
        "embeddings.json",
        "embeddings.npy",
        PATCHES,
        "images.csv",
    ]
    query = f"{pictures}/class-0/000.png"
    copy = shutil.copy(query, tmp_path / "copy.png")
    neighbours(str(out), [str(copy)], str(tmp_path / "picture.png"), count=2)
    assert capsys.readouterr().out.splitlines()[1].split() == ["1.000", query]
    assert main([*words[:6]]) == 0  # without patches: those of before are not left beside other rows
    assert not (out / PATCHES).exists() and np.load(out / "embeddings.npy").shape == (64, 16)


def test_a_patch_s_row_and_column_follow_from_its_index(run, pictures):
    """index = row * columns + column: a change of one patch of pixels, seen before any block has mixed them."""
    encoder, images = load(run).network, open_images(pictures, split="train")
    crop = torch.from_numpy(center_crop(images.read(0), 16))[None]
    changed = crop.clone()
    changed[:, :, 4 * 2 : 4 * 3, 4 * 1 : 4 * 2] ^= 255  # row 2, column 1 of 4 x 4
    with torch.no_grad():
        before, after = (encoder.patch_embed(images, None, torch.float32) for images in (crop, changed))
    assert (before != after).any(dim=-1).nonzero().flatten().tolist() == [2 * 4 + 1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_what_a_signal_stops_the_same_command_ends_with_the_same_files(run, pictures, tmp_path, number):
    kept = tmp_path / "kept"
    words = [str(run), pictures, "--batch-size", "4", "--workers", "1", "--patches", "--layers", "0", "-1", "--out"]
    started = start_ranks(worker_embed.slowly, 1, tmp_path / "first", *words, str(kept))
    deadline = time.monotonic() + 60
    while not (kept / JOURNAL).exists() or json.loads((kept / JOURNAL).read_text())["done"] < 12:
        assert started.running() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(started.pid(0), number)
    (end,) = started.wait()
    assert end.code == (-9 if number == signal.SIGKILL else 75), end.output
    assert ("stopped; the same command goes on from what is in" in end.output) == (number == signal.SIGINT)
    assert not {"embeddings.npy", "embeddings.json"} & {path.name for path in kept.iterdir()}
    (end,) = run_ranks(worker_embed.embed, 1, tmp_path / "second", *words, str(kept))
    done = json.loads(end.output.split("going on after ")[1].split(" ")[0])
    assert end.code == 0 and 12 <= done < 64 and done % 4 == 0
    (end,) = run_ranks(worker_embed.embed, 1, tmp_path / "third", *words, str(tmp_path / "whole"))
    assert end.code == 0 and "going on" not in end.output
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (kept, tmp_path / "whole")]
    assert files[0] == files[1] and len(files[0]) == 4


class WithoutTarget(IJepaObjective):
    def encoders(self, module):
        return {"context": module.context_encoder}


def test_an_objective_without_a_target_is_embedded_by_its_context_encoder(run, pictures, tmp_path, monkeypatch, capsys):
    """Which embeddings.json says; neighbours look a query up by the same."""
    objective = build.build_ijepa
    monkeypatch.setitem(build.OBJECTIVES, "ijepa", lambda config: WithoutTarget(**vars(objective(config))))
    embed(str(run), pictures, str(tmp_path / "out"), workers=0)
    assert "holds the context encoder alone: it is taken for the target encoder too\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "embeddings.json").read_text())["network"] == "context"
    features = np.load(tmp_path / "out" / "embeddings.npy")[:5]
    expected = tokens_by_hand(run, pictures, "context", [-1]).mean(axis=1)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    neighbours(str(tmp_path / "out"), [f"{pictures}/class-0/000.png"], str(tmp_path / "a.png"), count=2)


@pytest.mark.parametrize(
    "words, error",
    [
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--workers", "-1"], "--workers must be 0 (this process loads) or more, got -1"),
        (
            ["--layers", "0", "2"],
            "--layers 2: the encoder has 2 blocks; give numbers of 0..1, or from the end of -2..-1",
        ),
        (["--layers", "-3"], "--layers -3: the encoder has 2 blocks"),
        (["--network", "student"], "--network must be target or context, got 'student'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(run, pictures, tmp_path, capsys, words, error):
    assert main([str(run), pictures, "--out", str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}") and not (tmp_path / "out").exists()
