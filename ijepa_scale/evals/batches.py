"""Labelled images -> batches to train a classifier on, or to judge it by: the same on any number of ranks and workers.

What stands at a position of the global batch of a step (the image, its crop, what it is mixed with) depends on the
seed, the step and the position alone.
"""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ijepa_kernels.patchify import IMAGENET_MEAN
from ijepa_scale.data.collate import PREFETCH, FailedBatch, LoadError, start_worker
from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import MAX_SUBSTITUTES, SUBSTITUTE_SEED, BadImage
from ijepa_scale.data.order import generator_for, image_at
from ijepa_scale.data.transforms import RandomCrop, center_crop, stretched
from ijepa_scale.evals.evaluation import Labelled
from ijepa_scale.evals.shares import streamed
from ijepa_scale.extras import needed

# Streams of random numbers, beside those of data/order.py.
AUGMENT, RAND_AUGMENT, MIX, DROP_PATH = range(100, 104)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """From an image's file to the pixels that are trained on."""

    crop: str = "random"  # a random resized crop; "stretched": the whole image, squashed to a square; "centre"
    scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop / area of the image
    flip: bool = True  # half of the images, left to right
    rand_augment: str = ""  # timm's name of a RandAugment, such as rand-m9-mstd0.5-inc1 (as MAE); "": none

    def __post_init__(self) -> None:
        if self.crop not in ("random", "stretched", "centre"):
            raise ValueError(f"crop must be random, stretched or centre, got {self.crop!r}")
        low, high = self.scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {list(self.scale)}")
        if self.rand_augment and not self.rand_augment.startswith("rand"):
            raise ValueError(
                f"rand_augment must be one of timm's, such as rand-m9-mstd0.5-inc1; got {self.rand_augment!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup and CutMix (arXiv:1710.09412, 1905.04899) of the images at positions 2j and 2j + 1, each half of the time.

    The strength is drawn for each pair; a last image without another stays as it is.
    """

    mixup: float = 0.8  # of the Beta distribution that mixup's weight is drawn from; 0: no mixup
    cutmix: float = 1.0  # the same of the share of pixels; 0: no CutMix

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0.0 or not self.mixup + self.cutmix:
            raise ValueError(f"mixup and cutmix must be 0 or more, one of them above, got {self.mixup}, {self.cutmix}")


@dataclass(frozen=True)
class LabelledBatch:
    """A micro-batch. images: (B, 3, S, S) uint8; (0, 3, S, S) where they are not read.

    labels, places, positions: (B,) int64. places: which of the labelled images was asked for. positions: in the global
    batch. targets: (B, classes) float32, rows that sum to 1, where images are mixed; else None. last: of its step. bad:
    unreadable images, each of which another stands in for.
    """

    images: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor | None
    step: int
    last: bool
    bad: tuple[BadImage, ...] = ()

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LabelledBatch":
        return replace(
            self,
            images=change(self.images),
            labels=change(self.labels),
            places=change(self.places),
            positions=change(self.positions),
            targets=None if self.targets is None else change(self.targets),
        )

    def to(self, device: torch.device) -> "LabelledBatch":
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "LabelledBatch":
        """The same in page-locked memory; the loader's thread calls it."""
        return self.map_tensors(torch.Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class TrainingBatches(Dataset):
    """Item i is this rank's micro-batch at micro-step i, or why there is none.

    An epoch is a permutation of its own of the images, less what is over after whole batches. The global batch is cut
    in order, in whole pairs (see Mix): first among the ranks, then each rank's share among accumulation_steps, so sizes
    differ by a pair. A mean over the global batch is thus a sum over images / global_batch_size, of all ranks and
    micro-steps. In the place of an unreadable image stands another, with its own label: which, the unreadable one says.
    """

    labelled: Labelled
    augment: Augment
    mix: Mix | None = None
    epochs: int
    batch_size: int  # images a step, of all ranks; cut to the number of images
    micro_batch_size: int  # images that a rank runs at once, about; 2 at least
    image_size: int  # pixels a side
    read: bool = True  # False: no image is, as where tokens of each place are there already
    seed: int
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.mix or self.augment.rand_augment:
            needed("timm", extra="evaluate")  # a loader process would say it too late
        if not len(self.labelled):
            raise ValueError(f"{self.labelled.images.name} has no labelled images to train on")
        if self._pairs < self.ranks:
            raise ValueError(
                f"a batch of {self.global_batch_size} images has no pair for each of {self.ranks} ranks: use at most "
                f"{self._pairs} ranks" + (", or a larger batch" if self.batch_size < len(self.labelled) else "")
            )

    @property
    def global_batch_size(self) -> int:
        return min(self.batch_size, len(self.labelled))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.labelled) // self.global_batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps a step, the same on all ranks; each has a pair or more."""
        wanted = math.ceil(self._pairs / (self.ranks * max(1, self.micro_batch_size // 2)))
        return min(wanted, self._pairs // self.ranks)

    @property
    def _pairs(self) -> int:
        return math.ceil(self.global_batch_size / 2)

    def positions(self, micro: int) -> range:
        """This rank's positions in the global batch at a micro-step of a step."""
        parts = self.ranks * self.accumulation_steps
        part = self.rank * self.accumulation_steps + micro
        return range(
            2 * (part * self._pairs // parts),
            min(self.global_batch_size, 2 * ((part + 1) * self._pairs // parts)),
        )

    @contextlib.contextmanager
    def stream(
        self, *, workers: int, start_step: int = 0, stop_step: int | None = None
    ) -> Iterator[Iterator[LabelledBatch]]:
        """LabelledBatches in order from start_step to stop_step (None: the last), made by so many loader processes.

        The iterator raises BadImageError where an image and all that might stand in for it are bad, and what
        shares.image_batches() does.
        """
        accumulation, stop = self.accumulation_steps, self.total_steps if stop_step is None else stop_step
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start_step * accumulation, stop * accumulation),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # of its own: a loader draws from the global one, even where nothing is random
        )
        images = self.read * (len(self.positions(0)) + 2)  # of a micro-batch at most
        with streamed(loader, batch_bytes=images * 3 * self.image_size**2) as batches:
            yield _read_through(batches)

    def __getitem__(self, micro_step: int) -> LabelledBatch | FailedBatch:
        try:
            return self.batch(micro_step)
        except BadImageError as error:
            return FailedBatch(str(error))

    def batch(self, micro_step: int) -> LabelledBatch:
        """Raises BadImageError where an image and all that might stand in for it are bad."""
        step, micro = divmod(micro_step, self.accumulation_steps)
        positions, size = self.positions(micro), self.global_batch_size
        num_images = len(self.labelled)
        places = [image_at(self.seed, step, at, num_images=num_images, global_batch_size=size) for at in positions]
        labels = self.labelled.labels[places]
        images = np.empty((len(positions) * self.read, 3, self.image_size, self.image_size), np.uint8)
        bad: list[BadImage] = []
        for row in range(len(images)):
            images[row], labels[row], missed = self._read(places[row], step, positions[row])
            bad += missed
        batch = LabelledBatch(
            torch.from_numpy(images),
            torch.from_numpy(labels),
            torch.tensor(places),
            torch.arange(positions.start, positions.stop),
            targets=None,
            step=step,
            last=micro + 1 == self.accumulation_steps,
            bad=tuple(bad),
        )
        return batch if self.mix is None else self._mixed(batch, self.mix)

    def _read(self, place: int, step: int, position: int) -> tuple[np.ndarray, int, list[BadImage]]:
        """The pixels and the label of a labelled image, or of another in its place; and the bad ones met."""
        rng = generator_for(SUBSTITUTE_SEED, int(self.labelled.indices[place]))
        images = self.labelled.images
        bad: list[BadImage] = []
        for _ in range(1 + MAX_SUBSTITUTES):
            index = int(self.labelled.indices[place])
            try:
                return self._pixels(index, step, position), int(self.labelled.labels[place]), bad
            except BadImageError as error:
                bad.append(BadImage(index, images.sample_id(index), error.reason))
            place = int(rng.random() * len(self.labelled))
        raise BadImageError(
            f"{images.name}: {bad[0].sample_id} is bad ({bad[0].reason}) and so are {MAX_SUBSTITUTES} random labelled "
            "images drawn in its place; check that the data set holds readable images"
        )

    def _pixels(self, index: int, step: int, position: int) -> np.ndarray:
        images, augment, key = self.labelled.images, self.augment, (self.seed, AUGMENT, step, position)
        if augment.crop == "random":
            crop = RandomCrop(self.image_size, key, scale=augment.scale, flip=augment.flip)
            pixels = images.crop(index, crop)
        else:
            whole = stretched if augment.crop == "stretched" else center_crop
            pixels = whole(images.read(index), self.image_size)
            if augment.flip and generator_for(*key).random() < 0.5:
                pixels = pixels[:, :, ::-1]
        if not augment.rand_augment:
            return pixels
        with _global_draws(self.seed, RAND_AUGMENT, step, position):
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            return np.asarray(_rand_augment(augment.rand_augment, self.image_size)(image)).transpose(2, 0, 1)

    def _mixed(self, batch: LabelledBatch, mix: Mix) -> LabelledBatch:
        """The batch with its pairs mixed. Sums are rounded to uint8, in which the encoder takes its images."""
        classes = len(self.labelled.names)
        images, targets = batch.images.clone(), torch.nn.functional.one_hot(batch.labels, classes).float()
        for row in range(0, len(images) - 1, 2):
            pair = slice(row, row + 2)
            with _global_draws(self.seed, MIX, batch.step, int(batch.positions[row])):
                mixed, targets[pair] = _mixup(mix, classes)(images[pair].float(), batch.labels[pair])
            images[pair] = mixed.round().byte()
        return replace(batch, images=images, targets=targets)


def _read_through(batches: Any) -> Iterator[LabelledBatch]:
    try:
        yield from batches
    except LoadError as error:
        raise BadImageError(str(error)) from error


@functools.cache
def _rand_augment(name: str, image_size: int) -> Any:
    """timm's, as its training transforms make it; it draws from Python's and NumPy's global generators."""
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
    settings = {"translate_const": int(0.45 * image_size), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    augment = rand_augment_transform(name, settings)
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = functools.partial(_one_bit_or_more, op.level_fn)
    return augment


def _one_bit_or_more(level_fn: Callable, *arguments: Any) -> tuple[int]:
    """timm (1.0.31) would at times keep 0 bits, which Pillow (13.0) takes for an error."""
    return (max(1, *level_fn(*arguments)),)


@functools.cache
def _mixup(mix: Mix, classes: int) -> Any:
    """timm's, which draws from NumPy's global generator. The loss smooths labels."""
    from timm.data.mixup import Mixup

    return Mixup(mix.mixup, mix.cutmix, label_smoothing=0.0, num_classes=classes)


@contextlib.contextmanager
def _global_draws(*key: int) -> Iterator[None]:
    """Within it Python's and NumPy's global generators draw what the key says; afterwards they go on as before."""
    before = random.getstate(), np.random.get_state()
    seed = int(generator_for(*key).random() * 2**32)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
