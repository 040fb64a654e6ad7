import math

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as torchvision

from ijepa_scale.data.order import generator_for
from ijepa_scale.data.transforms import center_crop, random_resized_crop
from tests.data.small_sources import photo


class Recorded:
    """A generator that gives the numbers it was made with."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


@pytest.mark.parametrize("image_size", [(300, 200), (64, 64), (37, 500)])
@pytest.mark.parametrize("size", [16, 96])
def test_crop_agrees_with_torchvision(image_size, size):
    image = photo(*image_size)
    width, height = image.size
    for area, log_ratio, x, y in np.random.default_rng(1).random((6, 4)):
        # The box by its definition, in one try: area and ratio of the draws, then a uniform place.
        box_area = (0.3 + 0.7 * area) * width * height
        ratio = math.exp((2 * log_ratio - 1) * math.log(4 / 3))
        box_width, box_height = round(math.sqrt(box_area * ratio)), round(math.sqrt(box_area / ratio))
        if box_width > width or box_height > height:
            continue
        left, top = math.floor(x * (width - box_width + 1)), math.floor(y * (height - box_height + 1))
        expected = torchvision.resized_crop(
            image, top, left, box_height, box_width, [size, size], torchvision.InterpolationMode.BICUBIC
        )
        actual = random_resized_crop(image, Recorded(area, log_ratio, x, y), size)
        assert actual.shape == (3, size, size) and actual.dtype == np.uint8
        assert actual.transpose(1, 2, 0).flags.c_contiguous
        np.testing.assert_allclose(
            actual.astype(int), np.asarray(expected).transpose(2, 0, 1).astype(int), rtol=0, atol=1
        )


def boxes(image_size, count, **options):
    """(left, top, right, bottom) of random crops, found from an image whose colours are its coordinates."""
    width, height = image_size
    y, x = np.mgrid[0:height, 0:width]
    image = Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8))
    found = []
    for i in range(count):
        crop = random_resized_crop(image, generator_for(0, i), 400, **options)
        found.append([crop[0].min(), crop[1].min(), int(crop[0].max()) + 1, int(crop[1].max()) + 1])
    return np.array(found, dtype=float)


def test_boxes_follow_their_distribution():
    left, top, right, bottom = boxes((240, 240), 300, scale=(0.1, 0.4)).T
    area = (right - left) * (bottom - top) / 240**2
    log_ratio = np.log((right - left) / (bottom - top))
    assert (area > 0.08).all() and (area < 0.42).all()
    assert abs(area.mean() - 0.25) < 5 * 0.3 / math.sqrt(12 * 300)  # uniform on 0.1..0.4
    assert np.abs(log_ratio).max() < math.log(4 / 3) + 0.05
    assert abs(log_ratio.mean()) < 5 * 2 * math.log(4 / 3) / math.sqrt(12 * 300)
    assert abs(log_ratio.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.02
    for low, high in ((left, right), (top, bottom)):
        assert low.min() == 0 and high.max() == 240  # reaches both edges
        place = low / (240 - (high - low))
        assert abs(place.mean() - 0.5) < 5 / math.sqrt(12 * 300)


@pytest.mark.parametrize("image_size, expected", [((250, 10), (118, 0, 131, 10)), ((10, 250), (0, 118, 10, 131))])
def test_a_strip_gets_the_largest_centred_box(image_size, expected):
    """At scale 1 no box of a legal ratio fits; the fallback is 13 x 10 of 250 x 10."""
    np.testing.assert_allclose(boxes(image_size, 3, scale=(1.0, 1.0)), [expected] * 3, atol=1)


@pytest.mark.parametrize("image_size", [(1, 1), (1, 200), (200, 1), (2, 3)])
def test_tiny_images_can_be_cropped(image_size):
    for i in range(20):
        assert random_resized_crop(photo(*image_size), generator_for(0, i), 8, flip=True).shape == (3, 8, 8)


def test_flip_mirrors_half_of_the_crops_and_changes_nothing_else():
    image = photo(50, 40)
    plain = [random_resized_crop(image, generator_for(0, i), 16) for i in range(200)]
    flipped = [random_resized_crop(image, generator_for(0, i), 16, flip=True) for i in range(200)]
    mirrored = [np.array_equal(a, b[:, :, ::-1]) for a, b in zip(plain, flipped, strict=True)]
    assert all(same or np.array_equal(a, b) for same, a, b in zip(mirrored, plain, flipped, strict=True))
    assert 65 < sum(mirrored) < 135
    assert all(crop.transpose(1, 2, 0).flags.c_contiguous for crop in flipped)


@pytest.mark.parametrize("image_size", [(300, 200), (200, 300), (64, 64), (257, 256), (30, 100)])
@pytest.mark.parametrize("size", [16, 63, 224])
def test_center_crop_agrees_with_torchvision(image_size, size):
    image = photo(*image_size)
    bicubic, shorter_side = torchvision.InterpolationMode.BICUBIC, round(size * 256 / 224)
    resized = torchvision.resize(image, shorter_side, bicubic)
    # Pillow resizes rows or columns first, whichever is cheaper, and clips between: that choice may differ for a box.
    columns_first = torchvision.resize(image, [resized.height, image.width], bicubic)
    columns_first = torchvision.resize(columns_first, [resized.height, resized.width], bicubic)
    actual = center_crop(image, size)
    assert actual.shape == (3, size, size) and actual.dtype == np.uint8 and actual.flags.c_contiguous
    differences = []
    for whole in (resized, columns_first):
        expected = np.asarray(torchvision.center_crop(whole, [size, size])).transpose(2, 0, 1)
        differences.append(np.abs(actual.astype(int) - expected).max())
    assert min(differences) <= 1


def test_center_crop_keeps_an_image_of_the_right_size():
    image = photo(64, 64)
    pixels = np.asarray(image).transpose(2, 0, 1)
    np.testing.assert_array_equal(center_crop(image, 64), pixels)
    assert not np.array_equal(center_crop(image, 64, shorter_side=73), pixels)
    np.testing.assert_array_equal(
        center_crop(photo(64, 80), 64, shorter_side=64)[0], np.asarray(photo(64, 80))[8:72, :, 0]
    )


def test_center_crop_refuses_to_show_less_than_the_crop():
    with pytest.raises(ValueError, match="shorter_side 63 is less than the crop's size 64"):
        center_crop(photo(64, 64), 64, shorter_side=63)
