"""Sketches: what is drawn at random, and the losses against plain formulas in float64."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import pack_masks
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
DRAWS = SketchDraws(GRID, noise=0.5, seed=7)
BOXES = SketchDraws(GRID, noise=0.5, box_scale=(0.2, 0.5), seed=7)
PREDICTOR = ViTSize(width=12, depth=1, heads=2, mlp_width=20)
FLOW = {"predictor": PREDICTOR, "draw_masks": BOXES}


def objective(**options):
    usual = {"layers": (2,), "predictor": None, "condition": "tokens", "perceptual": 0.5, "draw_masks": DRAWS}
    return SketchObjective(
        encoder=ViTSize(width=24, depth=3, heads=3, mlp_width=40),
        decoder=ViTSize(width=16, depth=2, heads=2, mlp_width=28),
        image_size=16,
        patch_size=4,
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
    draw = pickle.loads(pickle.dumps(BOXES))(3, range(4, 404))
    part, alone = BOXES(3, range(10, 13)), DRAWS(3, range(10, 13))
    assert part.num_images == 3 and part.seeds == alone.seeds == draw.seeds[6:9] and alone.masks is None
    for one in ("noise_B", "time_B", "predicted_B"):
        assert torch.equal(getattr(part, one), getattr(draw, one)[6:9])
    boxes = draw.masks.target_blocks.patches(16)
    assert all(map(np.array_equal, part.masks.target_blocks.patches(16), boxes[6:9]))
    assert len({*draw.seeds, *BOXES(4, range(4, 404)).seeds}) == 800
    assert len({box.size for box in boxes}) == 1 and len({tuple(box) for box in boxes}) > 3
    for box, around in zip(boxes, draw.masks.context.patches(16), strict=True):
        assert np.array_equal(np.sort(np.concatenate([box, around])), np.arange(16))
        rows, columns = np.unique(box // 4), np.unique(box % 4)
        assert box.size == rows.size * columns.size == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a rectangle
    sizes = {BOXES(step, range(1)).masks.target_blocks.num_tokens for step in range(40)}
    assert min(sizes) >= 2 and max(sizes) <= 9 and len(sizes) > 2
    assert draw.noise_B.square().mean().sqrt().item() == pytest.approx(0.5, rel=0.12)  # of 400 half normals
    logits = torch.logit(draw.time_B.double())
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.15) and logits.std().item() == pytest.approx(0.8, abs=0.1)
    assert 0.4 < draw.predicted_B.double().mean() < 0.6


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
def test_the_flows_loss_is_of_its_velocity_given_truths_or_predictions(condition):
    model, images = random_model(objective(**FLOW, layers=(1, 2), condition=condition)), pixels_of(4)
    draw = BOXES(0, range(4))
    assert {*draw.predicted_B.tolist()} == {True, False} and (1 - draw.time_B).min() > 0.05
    pixels = plain_pixels(images)
    (features,) = features_of(model.encoder, pixels, (2,))
    features = features + draw.noise_B.double().view(4, 1, 1) * standard_normal(draw.seeds, features)
    noise, losses = standard_normal([seed + 1 for seed in draw.seeds], pixels), []
    boxes = [torch.from_numpy(box).long() for box in draw.masks.target_blocks.patches(16)]
    for i, box in enumerate(boxes):  # one image at a time
        if draw.predicted_B[i]:
            own = pack_masks([np.delete(np.arange(16), box)], [[box]], 16)
            predicted = model.predictor(model.context_encoder(images[i : i + 1], own.context), own)
            features[i, box] = predicted[:, 24:]  # of the second of two layers
        told, known, t = features[i].clone(), torch.zeros(1, 16, dtype=torch.bool), draw.time_B[i].double()
        known[0, box] = True
        if condition == "mean":
            told[box] = told[box].mean(dim=0)
        between = t * pixels[i] + (1 - t) * noise[i]
        drawn = model.decoder(told[None], known, draw.predicted_B[i : i + 1], between[None], draw.time_B[i : i + 1])
        losses.append(((drawn[0] - between) / (1 - t) - (pixels[i] - noise[i])).square().mean())
    terms = model(images, draw)
    torch.testing.assert_close(terms["loss"].double(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)
    terms["loss"].backward()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"decoder"} and model.decoder.predicted.grad.abs().sum() > 0


def test_the_mean_is_of_the_box():
    features, box = torch.randn(1, 16, 5), torch.zeros(1, 16, dtype=torch.bool)
    box[0, [1, 2]] = True
    torch.testing.assert_close(conditioned(features, box, "mean")[0, 1], (features[0, 1] + features[0, 2]) / 2)
    assert conditioned(features, box, "tokens") is features


@pytest.mark.parametrize("options", [{}, FLOW, {"perceptual": 0.0}, {"recompute_every": (1, 1)}])
def test_flops_are_those_counted(options):
    one, images = objective(**options), pixels_of(3)
    model, draw = random_model(one, torch.float32), one.draw_masks(0, range(3))
    found = counted(model, draw, images)
    assert one.done(draw)["hardware_flops"] == pytest.approx(found, rel=1e-6)
    assert one.expected([draw]).flops == pytest.approx({name: part / 3 for name, part in one.flops([draw])[0].items()})


def test_it_answers_as_objectives_do():
    one = objective()
    assert one.trained(one.build()).keys() == {"decoder"} and not one.encoders(one.build())
    for module in (one.build(), objective(**FLOW).build()):
        assert all(name.split(".")[0] in (*FROZEN, "decoder") for name, _ in module.named_parameters())
    with pytest.raises(ValueError, match=r"block 4, and the encoder has 3; use numbers from 1 to 3"):
        objective(layers=(2, 4)).check()
