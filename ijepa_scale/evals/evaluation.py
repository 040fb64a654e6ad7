"""What every task of `evaluate` is handed, and what it answers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.data.images import ImageSet
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.models.vit import VisionTransformer

Watch = Callable[[Iterable, str], Iterable]  # (what is gone through, in words what is done) -> the same, with a bar


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
    watch: Watch = lambda batches, _: batches


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

    predicted: (n,) int64, the chosen measure's class of each test image, for the table of confusions; None: there are
    none. facts: whatever else results.json should say.
    """

    measures: list[Measure]
    predicted: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
