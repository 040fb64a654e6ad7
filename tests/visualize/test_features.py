import numpy as np
import pytest
import torch

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.blocks import NORM_EPS
from ijepa_scale.visualize import features
from tests.evals.small import SIDE, small_encoder

GRID = PatchGrid(SIDE // 4, SIDE // 4)


def random_features(*shape, seed=0):
    """With axes of very different spread, far from the origin."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 0.7 ** np.arange(shape[-1]) @ np.linalg.qr(rng.normal(size=shape[-1:] * 2))[0]) + 5


def pixels(count, side=SIDE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def test_principal_components_are_numpys_singular_vectors():
    values = random_features(50, 8)
    centred = values - values.mean(axis=0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :3] * sizes[:3] * np.sign(right[:3][np.arange(3), np.abs(right[:3]).argmax(axis=1)])
    np.testing.assert_allclose(features.principal_components(values, 3), expected, atol=1e-9)
    np.testing.assert_allclose(features.principal_components(values.astype(np.float32), 3), expected, atol=1e-4)


def colours_of(values, threshold=None):
    return features.colours(features.pca_scores(values, threshold))


def test_colours_are_of_one_pca_of_all_images():
    """An image has the same colours wherever it stands, and others than alone."""
    values = random_features(6, 16, 8)
    colours = colours_of(values)
    np.testing.assert_allclose(colours_of(values[::-1])[::-1], colours, atol=1e-9)
    assert np.abs(colours_of(values[:1]) - colours[:1]).max() > 0.1
    assert colours.shape == (6, 16, 3) and colours.min() == 0.0 and colours.max() == 1.0
    scores = features.principal_components(values.reshape(-1, 8), 3)
    order = np.argsort(scores[:, 0])
    assert (np.diff(colours.reshape(-1, 3)[order, 0]) >= 0).all()
    np.testing.assert_allclose(features.pca_scores(values).reshape(-1, 3), scores / scores.std(axis=0), atol=1e-9)


def test_foreground_is_one_side_of_the_first_component():
    values = random_features(4, 16, 8)
    first = features.principal_components(values.reshape(-1, 8), 1)[:, 0]
    middle = (first > (first.min() + first.max()) / 2).reshape(4, 16)
    assert (features.foreground(values, 0.5) == middle).all() and (features.foreground(values, -0.5) == ~middle).all()
    colours = colours_of(values, 0.5)
    assert (colours[~middle] == features.BACKGROUND).all()
    np.testing.assert_allclose(colours[middle], colours_of(values[middle][None])[0])
    with pytest.raises(ValueError, match=r"--foreground 1 keeps 0 of 64 patches"):
        features.foreground(values, 1.0)


def test_scores_turn_back_to_those_that_they_were_turned_from():
    scores = features.pca_scores(random_features(4, 16, 8))
    rng = np.random.default_rng(1)
    for change in (np.diag([1.0, -1.0, 1.0]), np.eye(3)[[2, 0, 1]], np.linalg.qr(rng.normal(size=(3, 3)))[0]):
        found, near = features.turned(scores @ change, scores)
        np.testing.assert_allclose(found, scores, atol=1e-9)
        assert near == pytest.approx(1.0)


def test_no_other_turn_brings_scores_nearer_and_who_is_alike_stays():
    own, others = (features.pca_scores(random_features(4, 16, 8, seed=seed)) for seed in (0, 1))
    found, near = features.turned(own, others)
    least = np.square(found - others).sum()
    assert near == pytest.approx(np.corrcoef(found.ravel(), others.ravel())[0, 1]) and 0.0 < near < 0.9
    rng = np.random.default_rng(2)
    for _ in range(200):
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        assert np.square(own @ turn - others).sum() > least
    apart = [np.linalg.norm(one.reshape(-1, 1, 3) - one.reshape(1, -1, 3), axis=2) for one in (own, found)]
    np.testing.assert_allclose(*apart, atol=1e-9)


def test_patches_without_scores_do_not_count_for_the_turn():
    scores, rng = features.pca_scores(random_features(4, 16, 8)), np.random.default_rng(3)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    own, others = scores @ turn, scores.copy()
    own[0], others[:, 0] = np.nan, np.nan
    found, near = features.turned(own, others)
    np.testing.assert_allclose(found[1:], scores[1:], atol=1e-9)
    assert np.isnan(found[0]).all() and near == pytest.approx(1.0)


def test_similarity_is_the_cosine_of_centred_features():
    values, marked = random_features(3, 16, 8), np.array([0, 5, 15])
    mean = values.reshape(-1, 8).mean(axis=0)
    found = features.similarity(values, marked)
    for image in range(3):
        asked = values[image, marked[image]] - mean
        for patch in range(16):
            other = values[image, patch] - mean
            cosine = asked @ other / np.linalg.norm(asked) / np.linalg.norm(other)
            assert found[image, patch] == pytest.approx(cosine)
    assert found[np.arange(3), marked] == pytest.approx(1.0)


@torch.no_grad()
def test_attention_is_the_softmax_of_queries_and_keys():
    """Of block 1, whose input is what block 0 puts out, one query and head at a time."""
    encoder, images = small_encoder().double(), pixels(2)
    weights = features.attention_weights(encoder, images, 1)
    assert weights.shape == (2, 2, 16, 16) and weights.dtype == np.float64
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-12)
    (before,) = encoder.intermediate(torch.from_numpy(images), [0], norm=False)
    block = encoder.blocks[1]
    normed = torch.nn.functional.layer_norm(before, (32,), block.norm1.weight, block.norm1.bias, NORM_EPS)
    queries, keys, _ = block.attn.qkv(normed).view(2, 16, 3, 2, 16).unbind(2)
    for image, head, query in np.ndindex(2, 2, 16):
        scores = torch.stack([queries[image, query, head] @ keys[image, key, head] / 4 for key in range(16)])
        np.testing.assert_allclose(weights[image, head, query], scores.softmax(0).numpy(), atol=1e-12)

    maps = features.attention_maps(weights, None)
    np.testing.assert_allclose(
        maps, 16 * np.mean([features.attention_maps(weights, p) / 16 for p in range(16)], axis=0)
    )
    np.testing.assert_allclose(maps.mean(axis=-1), 1.0)
    np.testing.assert_allclose(features.attention_maps(weights, 3)[1, 0], 16 * weights[1, 0, 3])


def test_patch_features_are_the_encoders_at_any_size_and_in_parts(monkeypatch):
    encoder = small_encoder()
    for side in (SIDE, 24):
        images = pixels(5, side)
        with torch.no_grad():
            expected = encoder.intermediate(torch.from_numpy(images), [0, -1])
        monkeypatch.setattr(features, "AT_ONCE", 2)
        for found, one in zip(features.patch_features(encoder, images, [0, -1]), expected, strict=True):
            assert found.shape == (5, (side // 4) ** 2, 32)
            np.testing.assert_allclose(found, one.numpy(), rtol=1e-4, atol=1e-4)
        for found, one in zip(features.place_means(encoder, images, [0, -1]), expected, strict=True):
            np.testing.assert_allclose(found, one.numpy().mean(axis=0), rtol=1e-4, atol=1e-4)


def test_the_busiest_patch_is_the_one_that_varies_most():
    images = np.full((2, 3, SIDE, SIDE), 90, np.uint8)
    images[0, :, 4:8, 12:16] = pixels(1, 4)[0]
    images[1, :, 13, 2] = 255
    assert features.busiest_patches(images, GRID).tolist() == [7, 12]
    assert features.patch_box(7, GRID) == (1, 3, 1, 1)
