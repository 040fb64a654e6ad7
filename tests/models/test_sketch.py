"""The decoder of features against its parts, and the flow's sampler against a flow that is known exactly."""

import math

import pytest
import torch

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.attention import Sequences
from ijepa_scale.models.blocks import ViTSize, run_blocks
from ijepa_scale.models.sketch import SketchDecoder, SketchFlow
from ijepa_scale.models.vit import VisionTransformer

SIZE = ViTSize(width=16, depth=2, heads=2, mlp_width=32)
GRID = PatchGrid(2, 3)


def random_weights(module):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double()


def flow():
    return random_weights(SketchFlow(SIZE, feature_width=8, pixels=12, grid=GRID))


def test_a_decoder_is_blocks_over_placed_features():
    decoder = random_weights(SketchDecoder(SIZE, feature_width=8, pixels=12, grid=GRID))
    features = torch.randn(3, 6, 8, dtype=torch.float64)
    for image, out in zip(features, decoder(features), strict=True):  # each image alone
        tokens = decoder.embed(image) + decoder.pos_embed
        tokens = run_blocks(decoder.blocks, tokens, Sequences(torch.tensor([0, 6], dtype=torch.int32), 6, 6))
        torch.testing.assert_close(out, decoder.proj(decoder.norm(tokens)))


def test_a_flow_heeds_known_features_alone_and_the_time():
    network, time = flow(), torch.tensor([0.2, 0.7], dtype=torch.float64)
    features, noisy = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 6, 12, dtype=torch.float64)
    known, predicted = torch.tensor([[True, False] * 3, [False] * 6]), torch.tensor([False, False])
    out = network(features, known, predicted, noisy, time)
    other = torch.where(known[..., None], features, torch.randn(2, 6, 8, dtype=torch.float64))
    assert torch.equal(out, network(other, known, predicted, noisy, time))
    changed = network(features, known, ~predicted, noisy, time)
    assert not torch.allclose(out[0], changed[0]) and torch.equal(out[1], changed[1])  # of what is known alone
    assert not torch.allclose(out[0], network(features + known[..., None], known, predicted, noisy, time)[0])
    assert not torch.allclose(out, network(features, known, predicted, noisy, time / 2))
    assert not torch.allclose(out, network(features, known, predicted, noisy + 1, time))


class OfNormals(SketchFlow):
    """The exact flow to independent pixels of one mean and one standard deviation."""

    mean, std = 1.5, 0.5

    def forward(self, features, known, predicted, noisy, time):
        t = time[:, None, None]
        gain = t * self.std**2 / (t**2 * self.std**2 + (1 - t) ** 2)  # the regression of a pixel on its noisy value
        return self.mean + gain * (noisy - t * self.mean)


def test_samples_of_an_exact_flow_have_its_distribution():
    network = OfNormals(SIZE, feature_width=8, pixels=12, grid=GRID)
    noise = torch.randn(2000, 6, 12, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2000, 6, 8), torch.zeros(2000, 6, dtype=torch.bool), torch.zeros(2000, dtype=torch.bool)
    drawn = network.sample(*nothing, noise, steps=200)
    errors = 5 / math.sqrt(drawn.numel())
    assert drawn.mean().item() == pytest.approx(network.mean, abs=network.std * errors)
    assert drawn.std().item() == pytest.approx(network.std, rel=0.02)  # Euler's steps cost some
    torch.testing.assert_close((drawn - network.mean) / network.std, noise, rtol=0.03, atol=0.03)  # it keeps the order
    once = network.sample(*nothing, noise, steps=1)
    torch.testing.assert_close(once, torch.full_like(once, network.mean))  # all that noise alone tells


def test_an_encoder_takes_pixels_as_it_takes_images_and_hands_gradients_to_them():
    from ijepa_kernels.patchify import patchify

    encoder = random_weights(VisionTransformer(SIZE, image_size=8, patch_size=4))
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    pixels = patchify(images, 4, dtype=torch.float64).view(3, 4, -1)
    found = encoder.of_pixels(pixels, (1, 2))
    for one, wanted in zip(found, encoder.intermediate(images, [0, 1], norm=False), strict=True):
        torch.testing.assert_close(one, wanted)
    small = pixels[:1].clone().requires_grad_()
    encoder.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x: encoder.of_pixels(x, (2,))[0].square().mean(), (small,))
