"""Sketches: what is drawn at random, and the losses against plain formulas in float64."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.objectives.sketch import (
    FROZEN,
    SketchDraws,
    SketchObjective,
    conditioned,
    features_of,
    standard_normal,
)
from tests.objectives.test_flops import counted
from tests.objectives.test_mae import pixels_of, random_model

GRID = PatchGrid(4, 4)
DRAWS = SketchDraws(GRID, noise=0.5, box_scale=(0.2, 0.5), seed=7)


def objective(**options):
    usual = {"layer": 2, "flow": False, "condition": "tokens", "perceptual": 0.5}
    return SketchObjective(
        encoder=ViTSize(width=24, depth=3, heads=3, mlp_width=40),
        decoder=ViTSize(width=16, depth=2, heads=2, mlp_width=28),
        image_size=16,
        patch_size=4,
        draw_masks=DRAWS,
        **(usual | options),
    )


def plain_pixels(images):
    """(B, N, K) by reshaping whole images, normalized with ImageNet's mean and standard deviation."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    parts = ((images.double() / 255 - mean) / std).unfold(2, 4, 4).unfold(3, 4, 4)  # B, 3, rows, columns, p, p
    return parts.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def test_draws_are_of_the_position_alone_and_as_the_config_says():
    draw = pickle.loads(pickle.dumps(DRAWS))(3, range(4, 404))
    part = DRAWS(3, range(10, 13))
    assert part.num_images == 3 and part.seeds == draw.seeds[6:9] and torch.equal(part.box_BN, draw.box_BN[6:9])
    assert torch.equal(part.noise_B, draw.noise_B[6:9]) and torch.equal(part.time_B, draw.time_B[6:9])
    assert len({*draw.seeds, *DRAWS(4, range(4, 404)).seeds}) == 800
    for box in draw.box_BN.view(-1, 4, 4).numpy():  # a rectangle
        rows, columns = box.any(axis=1), box.any(axis=0)
        assert np.array_equal(box, np.outer(rows, columns)) and (np.diff(np.flatnonzero(rows)) == 1).all()
    shares = draw.box_BN.double().mean(dim=1)
    assert 0.1 < shares.min() < 0.2 and 0.4 < shares.max() <= 0.57  # sides are rounded
    assert draw.noise_B.square().mean().sqrt().item() == pytest.approx(0.5, rel=0.12)  # of 400 half normals
    logits = torch.logit(draw.time_B.double())
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.15) and logits.std().item() == pytest.approx(0.8, abs=0.1)


def test_noise_of_an_image_is_its_own():
    like = torch.empty(3, 5, 7)
    drawn = standard_normal([11, 12, 13], like)
    assert torch.equal(drawn[1:], standard_normal([12, 13], like[1:])) and not torch.equal(drawn[0], drawn[1])
    many = standard_normal(range(100), torch.empty(100, 5, 70))
    assert abs(many.mean()) < 0.02 and many.std().item() == pytest.approx(1, abs=0.02)


def test_features_are_normalized_outputs_of_blocks():
    model, images = random_model(objective()), pixels_of(2)
    found = features_of(model.encoder, model.pixels(images), (1, 3))
    plain = model.encoder.intermediate(images, [0, 2], norm=False)
    plain[1] = model.encoder.norm(plain[1])
    for one, wanted in zip(found, plain, strict=True):
        centred = wanted - wanted.mean(dim=-1, keepdim=True)
        wanted = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(one, wanted)
    torch.testing.assert_close(model.pixels(images), plain_pixels(images))


def test_the_decoders_loss_is_of_pixels_and_of_the_frozen_encoders_features():
    model, images, draw = random_model(objective()), pixels_of(2), DRAWS(0, range(2))
    terms = model(images, draw)
    pixels = plain_pixels(images)
    (features,) = features_of(model.encoder, pixels, (2,))
    noisy = features + draw.noise_B.double().view(2, 1, 1) * standard_normal(draw.seeds, features)
    drawn = model.decoder(noisy).float()
    wanted_pixels = (drawn - pixels).abs().mean()
    torch.testing.assert_close(terms["pixels"].double(), wanted_pixels.double(), rtol=1e-5, atol=1e-6)
    errors = [
        F.mse_loss(features_of(model.encoder, drawn, (layer,))[0], features_of(model.encoder, pixels, (layer,))[0])
        for layer in (1, 2, 3)
    ]
    wanted = wanted_pixels + 0.5 * sum(errors) / 3
    torch.testing.assert_close(terms["loss"].double(), wanted.double(), rtol=1e-5, atol=1e-6)
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.decoder.parameters())
    alone = random_model(objective(perceptual=0.0))(images, draw)
    assert list(alone) == ["loss"] and torch.equal(alone["loss"].detach(), terms["pixels"])


@pytest.mark.parametrize("condition", ["tokens", "mean"])
def test_the_flows_loss_is_of_its_velocity(condition):
    model, images, draw = random_model(objective(flow=True, condition=condition)), pixels_of(4), DRAWS(0, range(4))
    pixels, t = plain_pixels(images), draw.time_B.double().view(4, 1, 1)
    (features,) = features_of(model.encoder, pixels, (2,))
    features = features + draw.noise_B.double().view(4, 1, 1) * standard_normal(draw.seeds, features)
    if condition == "mean":
        features = torch.stack(
            [one[box].mean(dim=0).expand_as(one) for one, box in zip(features, draw.box_BN, strict=True)]
        )
    noise = standard_normal([seed + 1 for seed in draw.seeds], pixels)
    noisy = t * pixels + (1 - t) * noise
    drawn = model.decoder(features, draw.box_BN, noisy, draw.time_B)
    assert (1 - t).min() > 0.05
    wanted = ((drawn - noisy) / (1 - t) - (pixels - noise)).square().mean()
    torch.testing.assert_close(model(images, draw)["loss"].double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_mean_is_of_the_box():
    features, box = torch.randn(1, 16, 5), torch.zeros(1, 16, dtype=torch.bool)
    box[0, [1, 2]] = True
    torch.testing.assert_close(conditioned(features, box, "mean")[0, 1], (features[0, 1] + features[0, 2]) / 2)
    assert conditioned(features, box, "tokens") is features


@pytest.mark.parametrize("options", [{}, {"flow": True}, {"perceptual": 0.0}, {"recompute_every": (1, 1)}])
def test_flops_are_those_counted(options):
    one, images = objective(**options), pixels_of(3)
    model, draw = random_model(one, torch.float32), DRAWS(0, range(3))
    found = counted(model, draw, images)
    assert one.done(draw)["hardware_flops"] == pytest.approx(found, rel=1e-6)
    assert one.expected([draw]).flops == pytest.approx({name: part / 3 for name, part in one.flops(3)[0].items()})


def test_it_answers_as_objectives_do():
    one = objective()
    assert one.trained(one.build()).keys() == {"decoder"} and not one.encoders(one.build())
    assert all(name.startswith((FROZEN, "decoder.")) for name, _ in one.build().named_parameters())
    with pytest.raises(ValueError, match=r"block 4, and the encoder has 3; use a number from 1 to 3"):
        objective(layer=4).check()
