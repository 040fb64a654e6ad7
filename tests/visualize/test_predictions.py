import math

import numpy as np
import pytest
import torch

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.visualize import predictions
from tests.objectives.test_ijepa import IMAGE, PATCHES, tiny_model
from tests.objectives.test_ijepa import images_of as tensors_of

GRID = PatchGrid(4, 4)


def images_of(batch):
    return tensors_of(batch).numpy()


def random_blocks(count, size=4, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(PATCHES, size, replace=False) for _ in range(count)])


@pytest.fixture
def model():
    return tiny_model(dtype=torch.float32)


@pytest.mark.parametrize("layers", [(2,), (1, 2)])
def test_predictions_and_targets_are_those_that_the_loss_compares(layers):
    """The module's own l2 loss is the mean square of their difference."""
    model = tiny_model("l2", dtype=torch.float32)
    model.target_layers = layers
    if len(layers) == 2:
        model.predictor.predictor_proj = torch.nn.Linear(16, 48)
    images, blocks = images_of(5), random_blocks(5)
    outside = [np.delete(np.arange(PATCHES), block) for block in blocks]
    masks = pack_masks(outside, [[block] for block in blocks], PATCHES)
    with torch.no_grad():
        loss = model(torch.from_numpy(images), masks)["loss"].item()
    truth = predictions.in_blocks(predictions.target_features(model, images), blocks)
    said = predictions.predictions(model, images, blocks)
    assert said.shape == truth.shape == (5, 4, 24 * len(layers))
    assert np.square(said - truth).mean() == pytest.approx(loss, rel=1e-5)


def test_parts_of_a_batch_are_the_batch(model, monkeypatch):
    images, blocks = images_of(5), random_blocks(5)
    whole = predictions.target_features(model, images), predictions.predictions(model, images, blocks)
    monkeypatch.setattr(predictions, "AT_ONCE", 2)
    parts = predictions.target_features(model, images), predictions.predictions(model, images, blocks)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_a_prediction_knows_nothing_of_what_is_in_its_box(model):
    images, blocks = images_of(3), np.tile(GRID.block(1, 1, 2, 2), (3, 1))
    before = predictions.predictions(model, images, blocks)
    changed = images.copy()
    changed[:, :, 4:12, 4:12] = 0
    np.testing.assert_array_equal(predictions.predictions(model, changed, blocks), before)
    changed[:, :, 0, 0] = 0
    assert np.abs(predictions.predictions(model, changed, blocks) - before).max() > 1e-4


def test_cosines_and_baselines_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    targets, blocks, said = rng.normal(size=(6, 16, 5)), random_blocks(6), rng.normal(size=(6, 4, 5))
    truth, mean = predictions.in_blocks(targets, blocks), predictions.mean_features(targets, blocks)
    cosines = predictions.cosines(said, truth)
    for image, place in np.ndindex(6, 4):
        patch = blocks[image, place]
        one, other = said[image, place], targets[image, patch]
        assert cosines[image, place] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        others = [targets[i, patch] for i in range(6) if i != image]
        np.testing.assert_allclose(mean[image, place], np.mean(others, axis=0))
    average, error = predictions.mean_and_error(cosines)
    assert average == pytest.approx(cosines.mean())
    assert error == pytest.approx(np.std(cosines.mean(axis=1), ddof=1) / math.sqrt(6))
    assert predictions.compared({"a": cosines, "b": cosines - 0.25}) == [
        f"a {average:.3f} ±{error:.3f}",
        f"b {average - 0.25:.3f} ±{error:.3f}",
        "a less b +0.250 ±0.000",
    ]


def test_a_block_is_filled_with_the_patches_found_and_nothing_else_changes():
    images, block = images_of(3), GRID.block(1, 2, 2, 1)
    filled = predictions.pasted(0, block, images, np.array([16 + 3, 32 + 4]), GRID)
    expected = images[0].copy()
    side = IMAGE // 4
    expected[:, side : 2 * side, 2 * side : 3 * side] = images[1][:, :side, 3 * side :]
    expected[:, 2 * side : 3 * side, 2 * side : 3 * side] = images[2][:, side : 2 * side, :side]
    np.testing.assert_array_equal(filled, expected.transpose(1, 2, 0))
    spread = predictions.over_grid(np.array([1.0, 2.0]), block, GRID)
    assert spread[1, 2] == 1 and spread[2, 2] == 2 and np.isnan(spread).sum() == 14
