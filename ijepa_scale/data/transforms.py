"""An upright RGB image -> a fixed square of pixels, (3, size, size) uint8: a random one to train on, or the centre."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ijepa_scale.data.decoding import USUAL, Limits, UprightJpeg, open_croppable
from ijepa_scale.data.order import generator_for

_MAX_TRIES = 10


@dataclass(frozen=True)
class RandomCrop:
    """The crop of whichever image comes to stand at a position of the run: all of its randomness is in the key.

    size: pixels a side. scale, flip: as of random_resized_crop(). key: of generator_for(), the seed first.
    """

    size: int
    key: tuple[int, ...]
    scale: tuple[float, float] = (0.3, 1.0)
    flip: bool = False

    def of(self, file: bytes | str, limits: Limits = USUAL) -> np.ndarray:
        """(3, size, size) uint8 of an image's file, given as its content or its path. Raises as decode() does."""
        image = open_croppable(file, limits)
        return random_resized_crop(image, generator_for(*self.key), self.size, scale=self.scale, flip=self.flip)


def random_resized_crop(
    image: Image.Image | UprightJpeg,
    rng: np.random.Generator,
    size: int,
    *,
    scale: tuple[float, float] = (0.3, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> np.ndarray:
    """A random box of an RGB image, resized (bicubic, antialiased) to (3, size, size) uint8 (arXiv:1409.4842).

    In memory the channels are the last dimension, as decoders give them: stacked so, nothing is moved about.
    scale: area of the box / area of the image, uniform. ratio: width / height of the box, uniform in its logarithm.
    flip: mirror it left to right half of the time. The draws are made with `rng.random()` only, the flip's last.
    """
    left, top, width, height = _random_box(rng, *image.size, scale=scale, ratio=ratio)
    # Cut, then resize: with resize(box=...) the filter would also see pixels outside the box.
    pixels = _resized(image.crop((left, top, left + width, top + height)), size)
    if flip and rng.random() < 0.5:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    return pixels.transpose(2, 0, 1)


def _resized(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """RGB image or (height, width, 3) uint8 -> (size, size, 3) uint8, bicubic and antialiased.

    By PyTorch where its operation is vectorized: it then takes a quarter of Pillow's time, elsewhere twice as much.
    Their pixels differ by rounding alone, save at hard edges where the one resizes rows first and the other columns.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    if isinstance(image, Image.Image):
        assert image.mode == "RGB", f"expected an RGB image (see to_rgb), got mode {image.mode}"
        image = np.array(image)
    # Batched before permuted: only then PyTorch sees that channels come last, and takes the faster of its two ways.
    channels_last = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    return F.interpolate(channels_last, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _random_box(
    rng: np.random.Generator, width: int, height: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, box width, box height). After ten boxes that do not fit: the largest centred one of a legal ratio."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_MAX_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        box_ratio = math.exp(log_low + (log_high - log_low) * rng.random())
        box_width, box_height = round(math.sqrt(area * box_ratio)), round(math.sqrt(area / box_ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.random() * (width - box_width + 1))
            top = int(rng.random() * (height - box_height + 1))
            return left, top, box_width, box_height
    box_ratio = min(max(width / height, ratio[0]), ratio[1])
    box_width = max(1, min(width, round(height * box_ratio)))
    box_height = max(1, min(height, round(width / box_ratio)))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def stretched(image: Image.Image, size: int) -> np.ndarray:
    """All of an RGB image as a square, whatever its shape (bicubic, antialiased), (3, size, size) uint8.

    As tasks have it in which things at the image's edge count.
    """
    return _resized(image, size).transpose(2, 0, 1)


def usual_shorter_side(size: int) -> int:
    """Pixels of an image's shorter side of whose middle size x size are cut out for evaluation: 256 of 224."""
    return round(size * 256 / 224)


def center_crop(image: Image.Image, size: int, *, shorter_side: int | None = None) -> np.ndarray:
    """The centre of an RGB image for evaluation, (3, size, size) uint8.

    The shorter side is resized (bicubic, antialiased) to `shorter_side`, and the middle of that is cut out, in one go.
    shorter_side: size * 256 / 224 if None, the usual margin; then an image of exactly size x size stays as it is.
    """
    if shorter_side is None:
        if image.size == (size, size):
            return _pixels(image)
        shorter_side = usual_shorter_side(size)
    if shorter_side < size:
        raise ValueError(f"shorter_side {shorter_side} is less than the crop's size {size}; make it at least {size}")
    width, height = image.size
    scale = shorter_side / min(width, height)
    resized_width, resized_height = max(shorter_side, int(width * scale)), max(shorter_side, int(height * scale))
    x_scale, y_scale = width / resized_width, height / resized_height
    left, top = round((resized_width - size) / 2), round((resized_height - size) / 2)
    box = (left * x_scale, top * y_scale, (left + size) * x_scale, (top + size) * y_scale)
    return _pixels(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB", f"expected an RGB image (see to_rgb), got mode {image.mode}"
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
