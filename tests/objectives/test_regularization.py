import math

import pytest
import torch

from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.objectives.regularization import variance_covariance
from tests.objectives.test_ijepa import PATCHES, images_of, random_masks, tiny_model


def alone(tensor):
    return tensor


def by_loops(tokens, patches):
    """The definition, in Python floats: (variance, covariance)."""
    rows, places = tokens.double().tolist(), patches.tolist()
    width = len(rows[0])
    centred = []
    for row, place in zip(rows, places, strict=True):
        same = [other for other, where in zip(rows, places, strict=True) if where == place]
        centred.append([row[d] - sum(other[d] for other in same) / len(same) for d in range(width)])
    variance = covariance = 0.0
    for i in range(width):
        for j in range(width):
            moment = sum(row[i] * row[j] for row in centred) / (len(rows) - 1)
            if i == j:
                variance += max(0.0, 1.0 - math.sqrt(moment + 1e-4)) / width
            else:
                covariance += moment**2 / width
    return variance, covariance


def random_tokens(tokens, width, patches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return values, torch.randint(patches, (tokens,), generator=generator)


@pytest.mark.parametrize(
    "tokens, width, patches, scale", [(2, 1, 1, 0.1), (9, 8, 3, 0.5), (60, 5, 7, 1.0), (5, 3, 9, 3.0)]
)
def test_terms_equal_the_definition(tokens, width, patches, scale):
    values, places = random_tokens(tokens, width, patches, seed=tokens)
    values *= scale
    values[:, 0] *= 0.01  # a dimension that is nearly dead
    found = variance_covariance(values + 100.0, places, patches, alone)
    assert [term.item() for term in found] == pytest.approx(by_loops(values, places), rel=1e-9, abs=1e-12)


def test_gradients_are_those_of_the_terms():
    """Also through the means, which are held constant."""
    values, places = random_tokens(12, 4, 3)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.stack(variance_covariance(x, places, 3, alone)), values)


def test_what_depends_on_the_patch_alone_counts_as_collapsed():
    values, places = random_tokens(7, 5, 7)
    positions = values[places].float().requires_grad_()  # every image the same token at a patch
    variance, covariance = variance_covariance(positions, places, 7, alone)
    assert variance.item() == pytest.approx(1 - math.sqrt(1e-4), abs=1e-6) and covariance.item() < 1e-12
    (variance + covariance).backward()
    assert bool(torch.isfinite(positions.grad).all())


def test_bf16_tokens_are_summed_in_fp32():
    values, places = random_tokens(600, 6, 4)
    rounded = values.bfloat16()
    found = variance_covariance(rounded, places.int(), 4, alone)
    exact = variance_covariance(rounded.double(), places, 4, alone)
    assert all(term.dtype == torch.float32 for term in found)
    # Covariance is what a difference of larger sums leaves: 1.4e-5 off with torch 2.11's products; 6e-2 in bf16.
    assert [term.item() for term in found] == pytest.approx([term.item() for term in exact], rel=1e-4)


def test_sums_over_two_parts_equal_the_whole():
    """What total() is for: two ranks, here in turns, that each hold a part of the tokens."""
    values, places = random_tokens(20, 4, 3)
    parts = [(values[:8], places[:8]), (values[8:], places[8:])]
    sums = [[], []]
    for call in range(3):  # the k-th sum needs both parts' k-th terms, which need the sums before
        for rank, (rows, where) in enumerate(parts):
            calls = iter(range(3))

            def total(tensor, rank=rank, calls=calls, call=call):
                number = next(calls)
                if number == call:
                    sums[rank].append(tensor.clone())
                return sums[0][number] + sums[1][number] if number < call else tensor

            variance_covariance(rows, where, 3, total)
    calls = iter(range(3))

    def total(tensor):
        number = next(calls)
        return sums[0][number] + sums[1][number]

    found = variance_covariance(*parts[0], 3, total)
    assert [term.item() for term in found] == pytest.approx(by_loops(values, places), rel=1e-9)


def test_the_loss_is_the_weighted_sum_of_its_terms_over_the_context_tokens():
    images, pixels = 6, images_of(6)
    context, targets = random_masks(4, images, 2, 3)
    masks = pack_masks(context, targets, PATCHES)
    plain = tiny_model()
    rows = []
    for i in range(images):
        one = pack_masks([context[i]], [targets[i]], PATCHES).context
        rows.append(plain.context_encoder(pixels[i : i + 1], one))
    patches = torch.cat([torch.from_numpy(part) for part in context])
    expected = by_loops(torch.cat(rows).detach(), patches)
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
