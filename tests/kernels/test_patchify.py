import pytest
import torch
import torch.nn.functional as F

from ijepa_kernels.patchify import patchify
from tests.kernels.accuracy import INTERPRETED


def images_of(batch, height, width, seed=0):
    return torch.randint(256, (batch, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def normalized(images):
    """(B, 3, H, W) float64, one channel at a time."""
    out = images.double() / 255
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):  # ImageNet's
        out[:, channel] = (out[:, channel] - mean) / std
    return out


SHAPES = [(1, 4, 4, 4), (1, 3, 3, 1), (2, 6, 10, 2), (3, 28, 14, 7), (2, 32, 48, 16), (1, 28, 28, 14)]


@pytest.mark.parametrize("batch, height, width, patch_size", SHAPES)
def test_all_patches_match_unfold(batch, height, width, patch_size, device):
    images = images_of(batch, height, width)
    expected = F.unfold(normalized(images), patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        actual = patchify(images.to(device), patch_size, dtype=dtype).cpu().double()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch, height, width, patch_size", SHAPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_chosen_patches_are_rows_of_all_patches(batch, height, width, patch_size, index_dtype, device):
    images = images_of(batch, height, width).to(device)
    everything = patchify(images, patch_size, dtype=torch.float32)
    indices = torch.randint(len(everything), (2 * len(everything) + 1,), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    chosen = patchify(images, patch_size, indices_T=indices.to(index_dtype), dtype=torch.float32)
    assert torch.equal(chosen, everything[indices])
    none = patchify(images, patch_size, indices_T=indices[:0].to(index_dtype), dtype=torch.float32)
    assert none.shape == (0, 3 * patch_size**2)


@pytest.mark.parametrize("patch_size, columns", [(14, 640), (14, 588), (14, 651), (1, 64), (4, 49)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_may_end_in_zeros(patch_size, columns, dtype, device):
    images = images_of(3, 2 * patch_size, patch_size).to(device)
    for indices in (None, torch.tensor([5, 0, 2, 2, 1], device=device)):
        pixels = patchify(images, patch_size, indices_T=indices, dtype=dtype)
        padded = patchify(images, patch_size, indices_T=indices, dtype=dtype, columns=columns)
        assert torch.equal(padded, F.pad(pixels, (0, columns - 3 * patch_size**2)))


def test_columns_are_the_pixels_and_at_most_63_more():
    for columns in (587, 652):
        with pytest.raises(ValueError, match=f"columns must be 588 and at most 63 more, got {columns}"):
            patchify(images_of(1, 14, 14), 14, dtype=torch.float32, columns=columns)


def test_a_linear_layer_on_it_is_the_convolution_of_public_checkpoints(device):
    images = images_of(2, 28, 42)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 3, 14, 14, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    expected = F.conv2d(normalized(images), weight, bias, stride=14).flatten(2).transpose(1, 2).flatten(0, 1)
    actual = F.linear(patchify(images.to(device), 14, dtype=torch.float64).cpu(), weight.flatten(1), bias)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_lower_precisions_are_the_exact_values_rounded(device):
    images = (
        torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).to(device)
    )  # every value of a byte
    exact = patchify(images, 4, dtype=torch.float64)
    single = patchify(images, 4, dtype=torch.float32)
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=1e-6)
    # Computed in fp32 and rounded once: nothing is normalized in bf16.
    if not INTERPRETED:  # the interpreter cuts off where it makes bf16 of fp32
        assert torch.equal(patchify(images, 4, dtype=torch.bfloat16), single.bfloat16())
    assert torch.equal(patchify(images, 4, dtype=torch.float16), single.half())


def test_memory_layout_does_not_matter_and_the_images_stay_as_they_are(device):
    images = images_of(2, 12, 8).to(device)
    before = images.clone()
    expected = patchify(images, 4, dtype=torch.float32)
    assert torch.equal(images, before)
    assert torch.equal(patchify(images.to(memory_format=torch.channels_last), 4, dtype=torch.float32), expected)
    wide = torch.cat([images, images], dim=3)[..., :8]
    indices = torch.tensor([7, 0, 11], device=device)
    assert torch.equal(patchify(wide, 4, dtype=torch.float32), expected)
    assert torch.equal(patchify(wide, 4, indices_T=indices, dtype=torch.float32), expected[indices])


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(1, 3, 8, 8), r"\(B, 3, H, W\) uint8, got \(1, 3, 8, 8\) torch.float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"got \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), r"got \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 10, 8, dtype=torch.uint8), "image sides 10 x 8 are not multiples of the patch size 4"),
        (torch.zeros(1, 3, 8, 6, dtype=torch.uint8), "image sides 8 x 6 are not multiples"),
    ],
)
def test_errors(images, message):
    with pytest.raises(ValueError, match=message):
        patchify(images, 4, dtype=torch.float32)
