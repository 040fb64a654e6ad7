import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.models.regularization import pooled_tokens, variance_covariance
from tests.models.test_ijepa import PATCHES, images_of, random_masks, tiny_model


def by_loops(pooled):
    """The definition, in Python floats: (variance, covariance)."""
    columns = [np.array(column, dtype=np.float64) for column in pooled.double().T.tolist()]
    width, images = len(columns), len(columns[0])
    variance = covariance = 0.0
    for i, a in enumerate(columns):
        variance += max(0.0, 1.0 - math.sqrt(sum((a - a.mean()) ** 2) / (images - 1) + 1e-4)) / width
        for j, b in enumerate(columns):
            if i != j:
                covariance += (sum((a - a.mean()) * (b - b.mean())) / (images - 1)) ** 2 / width
    return variance, covariance


@pytest.mark.parametrize("images, width, scale", [(2, 1, 0.1), (7, 16, 0.5), (128, 33, 1.0), (5, 8, 3.0)])
def test_terms_equal_the_definition(images, width, scale):
    pooled = scale * torch.randn(images, width, generator=torch.Generator().manual_seed(images), dtype=torch.float64)
    pooled[:, 0] *= 0.01  # a dimension that is nearly dead
    variance, covariance = variance_covariance(pooled + 100.0)
    expected = by_loops(pooled)
    assert (variance.item(), covariance.item()) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.autograd.gradcheck(lambda rows: torch.stack(variance_covariance(rows)), pooled.requires_grad_())


def test_identical_images_have_full_variance_loss_and_a_finite_gradient():
    pooled = torch.ones(4, 3, requires_grad=True)
    variance, covariance = variance_covariance(pooled)
    assert variance.item() == pytest.approx(1 - math.sqrt(1e-4)) and covariance.item() == 0.0
    (variance + covariance).backward()
    assert torch.equal(pooled.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pooled_tokens_are_the_means_of_their_sequences(dtype):
    context, targets = random_masks(2, 5, 1, 3)
    packed = pack_masks(context, targets, PATCHES).context
    tokens = torch.randn(packed.num_tokens, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    pooled = pooled_tokens(tokens, packed)
    bounds = packed.cu_seqlens.tolist()
    expected = [tokens.double()[low:high].mean(0) for low, high in pairwise(bounds)]
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(pooled.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_terms_over_the_context_features():
    images, pixels = 6, images_of(6)
    context, targets = random_masks(4, images, 2, 3)
    masks = pack_masks(context, targets, PATCHES)
    plain = tiny_model()
    rows = []
    for i in range(images):
        one = pack_masks([context[i]], [targets[i]], PATCHES).context
        rows.append(plain.context_encoder(pixels[i : i + 1], one).mean(0))
    expected = by_loops(torch.stack(rows).detach())
    model = tiny_model()
    model.variance, model.covariance = 0.3, 0.07
    losses = model(pixels, masks)
    prediction = plain(pixels, masks)
    assert set(prediction) == {"loss"}  # off: no terms, none computed
    assert losses["prediction"].item() == pytest.approx(prediction["loss"].item(), rel=1e-12)
    assert (losses["variance"].item(), losses["covariance"].item()) == pytest.approx(expected, rel=1e-9)
    assert losses["loss"].item() == pytest.approx(
        prediction["loss"].item() + 0.3 * expected[0] + 0.07 * expected[1], rel=1e-9
    )
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


def test_statistics_are_taken_over_the_gathered_rows():
    pixels = images_of(3)
    masks = pack_masks(*random_masks(1, 3, 2, 3), PATCHES)
    others = torch.randn(2, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = tiny_model()
    model.variance = 1.0
    model.gather = lambda rows: torch.cat([others, rows])
    rows = pooled_tokens(model.context_encoder(pixels, masks.context), masks.context).detach()
    assert model(pixels, masks)["variance"].item() == pytest.approx(by_loops(torch.cat([others, rows]))[0], rel=1e-9)
