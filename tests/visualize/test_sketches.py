"""What sketches are made of, against plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_kernels.patchify import patchify
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.sketch import SketchDecoder, SketchFlow
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.visualize import sketches

GRID = PatchGrid(3, 3)
SIZE = ViTSize(width=16, depth=3, heads=2, mlp_width=32)
BLOCKS = np.array([[1, 2, 4, 5], [3, 4, 6, 7]])
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (2, 3, 12, 12), dtype=np.uint8)


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return VisionTransformer(SIZE, image_size=12, patch_size=4).requires_grad_(False)


def test_pixels_of_patches_are_the_image_again():
    pixels = patchify(torch.from_numpy(IMAGES), 4, dtype=torch.float32).view(2, 9, -1)
    assert np.array_equal(sketches.images_of(pixels, GRID), IMAGES)
    assert sketches.images_of(100 * pixels, GRID).max() == 255  # cut, not wrapped round


def test_errors_are_of_the_pixels_of_the_box():
    other = rng.integers(0, 256, IMAGES.shape, dtype=np.uint8)
    found = sketches.pixel_errors(other, IMAGES, BLOCKS, GRID)
    for image, block in enumerate(BLOCKS):
        for k, patch in enumerate(block):
            row, column = 4 * (patch // 3), 4 * (patch % 3)
            part = (image, slice(None), slice(row, row + 4), slice(column, column + 4))
            wanted = np.abs(other[part].astype(float) - IMAGES[part].astype(float)).mean() / 255 * 100
            assert found[image, k] == pytest.approx(wanted, rel=1e-5)


def test_features_of_a_box_and_of_what_is_around_fill_the_image():
    whole = rng.standard_normal((2, 9, 5)).astype(np.float32)
    inside = np.stack([one[block] for one, block in zip(whole, BLOCKS, strict=True)])
    around = np.stack([np.delete(one, block, axis=0) for one, block in zip(whole, BLOCKS, strict=True)])
    assert np.array_equal(sketches.filled(around, inside, BLOCKS), whole)


@pytest.mark.parametrize("layer", [2, 3])
def test_features_around_a_box_do_not_know_it(encoder, layer):
    found = sketches.features_around(encoder, IMAGES, BLOCKS, layer)
    for image, block in enumerate(BLOCKS):  # whole images, with attention to what is around alone
        rest = np.delete(np.arange(9), block)
        tokens = encoder.patch_embed(torch.from_numpy(IMAGES[image : image + 1]), None, torch.float32)
        tokens = (tokens + encoder.pos_embed[0])[rest]
        for part in encoder.blocks[:layer]:
            qkv = part.attn.qkv(part.norm1(tokens)).unflatten(-1, (3, 2, 8)).permute(1, 2, 0, 3)
            mixed = F.scaled_dot_product_attention(*qkv).transpose(0, 1).flatten(1)
            tokens = tokens + part.attn.proj(mixed)
            tokens = tokens + part.mlp.fc2(F.gelu(part.mlp.fc1(part.norm2(tokens))))
        tokens = encoder.norm(tokens) if layer == 3 else tokens
        torch.testing.assert_close(torch.from_numpy(found[image]), F.layer_norm(tokens, (16,)), rtol=1e-4, atol=1e-5)
    changed = IMAGES.copy()
    changed[0, :, :4, 4:8] = 0  # patch 1, in the box of the first image
    assert np.array_equal(found[0], sketches.features_around(encoder, changed, BLOCKS, layer)[0])


def test_of_several_layers_the_one_that_is_drawn_is_taken():
    predicted = rng.standard_normal((2, 4, 10))
    assert np.array_equal(sketches.of_layer(predicted, (2, 6), 6), predicted[..., 5:])
    with pytest.raises(ValueError, match=r"features of block 4, and what is predicted are those of 2, 6"):
        sketches.of_layer(predicted, (2, 6), 4)


def test_images_are_drawn_one_as_beside_others(encoder, monkeypatch):
    """In parts, of one size or another; a sample is of its seed."""
    decoder = SketchDecoder(SIZE, feature_width=16, pixels=48, grid=GRID).requires_grad_(False)
    flow = SketchFlow(SIZE, feature_width=16, pixels=48, grid=GRID).requires_grad_(False)
    features = sketches.true_features(encoder, IMAGES, 3)
    inside = np.stack([one[block] for one, block in zip(features, BLOCKS, strict=True)])
    options = {"condition": "tokens", "predicted": False}
    monkeypatch.setattr(sketches, "FLOW_STEPS", 3)
    both = (
        sketches.decoded(decoder, features, GRID),
        sketches.samples(flow, inside, BLOCKS, GRID, seeds=[5, 6], **options),
    )
    monkeypatch.setattr(sketches, "AT_ONCE", 1)
    again = sketches.samples(flow, inside, BLOCKS, GRID, seeds=[5, 6], **options)
    assert np.abs(sketches.decoded(decoder, features, GRID).astype(int) - both[0]).max() <= 1
    assert np.abs(again.astype(int) - both[1]).max() <= 1 and again.shape == IMAGES.shape
    other = sketches.samples(flow, inside, BLOCKS, GRID, seeds=[5, 7], **options)
    assert np.array_equal(other[0], again[0]) and not np.array_equal(other[1], again[1])
