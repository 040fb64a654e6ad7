"""Several sources read by index as one, each image as often as its source's weight says."""

import functools
import hashlib
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ijepa_scale.data.images import BadImage, ImageSet
from ijepa_scale.data.order import mixed_image_at
from ijepa_scale.data.transforms import RandomCrop


@dataclass(frozen=True)
class Mixture:
    """The images of all parts, end to end. weights: positive integers, one a part."""

    parts: tuple[ImageSet, ...]
    weights: tuple[int, ...]

    @property
    def name(self) -> str:
        total = sum(self.weights)
        named = zip(self.weights, self.parts, strict=True)
        return " + ".join(f"{100 * weight / total:.3g}% {part.name}" for weight, part in named)

    @functools.cached_property
    def digest(self) -> str:
        """Tells mixtures apart, as of an ImageSet."""
        return hashlib.sha256(" ".join(part.digest for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def image_at(self, seed: int, step: int, position: int, *, global_batch_size: int) -> int:
        """Index of the image at a position of the global batch of a step."""
        n = step * global_batch_size + position
        source, index = mixed_image_at(n, seed=seed, sizes=[len(p) for p in self.parts], weights=self.weights)
        return self._first(source) + index

    def crop_or_substitute(self, index: int, crop: RandomCrop) -> tuple[np.ndarray, tuple[BadImage, ...]]:
        """As of an ImageSet; a substitute is of the same part."""
        source, own = self._find(index)
        pixels, bad = self.parts[source].crop_or_substitute(own, crop)
        first = self._first(source)
        return pixels, tuple(BadImage(first + other.index, other.sample_id, other.reason) for other in bad)

    def sample_id(self, index: int) -> str:
        source, own = self._find(index)
        return self.parts[source].sample_id(own)

    def _first(self, source: int) -> int:
        return sum(len(part) for part in self.parts[:source])

    def _find(self, index: int) -> tuple[int, int]:
        source = next(i for i, end in enumerate(accumulate(map(len, self.parts))) if index < end)
        return source, index - self._first(source)
