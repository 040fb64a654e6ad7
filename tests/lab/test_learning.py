"""The runs of docs/lab/learning.md go on where they were, and a deadline cuts them off."""

import sys

import numpy as np
import pytest
import torch

from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "docs" / "lab"))
import learning

SMALL = {"images": 32, "batch": 8, "image_size": 32, "width": 64, "depth": 4, "predictor_depth": 1, "min_keep": 1}


@pytest.mark.slow
def test_runs_that_ended_are_not_run_again_and_others_are(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 60), ("test", 40)):
        labels = np.arange(count)[:, None] % 3
        brightness = 60 * labels[..., None, None] + 40
        np.save(tmp_path / "data" / f"{split}_labels.npy", labels)
        noise = rng.integers(0, 50, (count, 3, 32, 32))
        np.save(tmp_path / "data" / f"{split}_images.npy", (noise + brightness).astype(np.uint8))
    monkeypatch.setattr(learning, "IMAGES", {"one": SMALL, "two": {**SMALL, "seed": 1}, "other": SMALL})

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["learning.py", "--data", "unused", "--out", str(tmp_path), *more])
        learning.main()
        return [(row["recipe"]["name"], row["steps"], row["ended"]) for row in learning.results(tmp_path)]

    assert run("--only", "one", "--seconds", "0") == []
    assert run("--only", "one") == [("one", 4, True)]
    assert run("--only", "one|two") == [("one", 4, True), ("two", 4, True)]
    (first, _) = learning.results(tmp_path)
    assert first["k-NN"] > 60 and first["linear"] > 60 and first["linear, last 4"] > 60  # brightness tells them apart
    assert "| one | 32 | 4 |" in capsys.readouterr().out


def test_lidar_counts_the_directions_that_tell_images_apart():
    """Four of sixteen, in which images differ a hundred times as much as their views; and views that tell nothing."""
    draws = torch.Generator().manual_seed(0)
    views = 0.01 * torch.randn(2000, 4, 16, generator=draws, dtype=torch.float64)
    assert learning.lidar(views) > 14  # all alike
    views[..., :4] += torch.randn(2000, 1, 4, generator=draws, dtype=torch.float64)
    assert learning.lidar(views) == pytest.approx(4, rel=0.02)


def test_tokens_are_told_apart_by_their_image():
    tokens = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    turned = tokens.roll(1, 0)
    assert learning.same_image([(tokens, 2 * tokens), (tokens, turned)]) == 50
