"""What every task of `evaluate` is handed, and what it answers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.data.images import ImageSet
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.models.vit import VisionTransformer

Watch = Callable[[str, Iterable], Iterable]  # (in words what is done, what is gone through) -> the same, with a bar


@dataclass(frozen=True)
class Labelled:
    """The labelled images of a split. indices: (n,) int64, which of images. labels: (n,) int64, into names."""

    images: ImageSet
    indices: np.ndarray
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, places: np.ndarray) -> "Labelled":
        """Those at some places of these, in that order."""
        return Labelled(self.images, self.indices[places], self.labels[places], self.names)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One network and the images to judge it by. All ranks hold the same, each its own device.

    encoder: frozen, in fp32, on the rank's device. sha256: of its weights. image_size: pixels a side that it is given.
    seed: of every draw. batch_size: images that a rank encodes at a time. workers: its loader processes. watch: shows
    progress, on the first rank. keep: the folder of features that are kept from one call to the next, on a disk that
    all ranks see. out: the folder of results.
    """

    encoder: VisionTransformer
    sha256: str
    image_size: int
    train: Labelled
    test: Labelled
    ranks: Ranks
    seed: int
    batch_size: int
    workers: int
    keep: Path
    out: Path
    watch: Watch = lambda _, batches: batches


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a task. value: percent right, unless unit says otherwise. chosen: the one that is the result.

    error: one standard error, in the unit of value. chance: what answering without looking gives. count: test images.
    settings: what sets it apart from the task's other measures, such as {"k": 20}.
    """

    name: str
    value: float
    error: float
    count: int
    chance: float | None = None
    unit: str = "%"
    chosen: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a task answers, on the first rank; elsewhere its measures may be empty.

    predicted, labels: (n,) int64, by the chosen measure and true, of each test image, to show what is confused; None:
    they are no classes. facts: whatever else results.json should say.
    """

    measures: list[Measure]
    predicted: np.ndarray | None = None
    labels: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def best_of(
        cls, measures: list[Measure], predicted: list[np.ndarray], labels: np.ndarray, **facts: Any
    ) -> "Outcome":
        """All of the measures, the first of the largest as the chosen one, and what was predicted by that."""
        best = int(np.argmax([measure.value for measure in measures]))
        marked = [replace(measure, chosen=place == best) for place, measure in enumerate(measures)]
        return cls(measures=marked, predicted=predicted[best], labels=labels, facts=facts)


def accuracy(
    name: str, predicted: np.ndarray, labels: np.ndarray, *, chance: float, settings: dict[str, Any]
) -> Measure:
    """Percent of the labels that were predicted, with the binomial standard error."""
    value = 100.0 * float((predicted == labels).mean())
    error = math.sqrt(value * (100.0 - value) / len(labels))
    return Measure(name=name, value=value, error=error, count=len(labels), chance=chance, settings=settings)


def commonest_share(labels: np.ndarray) -> float:
    """Percent right by always answering the commonest class."""
    return 100.0 * float(np.bincount(labels).max()) / len(labels)
