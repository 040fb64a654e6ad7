"""Images and masks -> Batch: the micro-batch of any rank at any micro-step, as a pure function of its position."""

import gc
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ijepa_scale.data.images import BadImage, ImageSet, Limits, Use, croppable
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.order import generator_for, image_at
from ijepa_scale.data.streams import StreamMark, Streams
from ijepa_scale.data.transforms import random_resized_crop
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes, place_blocks
from ijepa_scale.masking.packing import Masks, limit_context, map_tensors, pack_masks

# Streams of random numbers, the first part of each key after the seed.
SIZES, CROP, BLOCKS, CONTEXT = range(4)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. indices: which image each is. bad: unreadable images met.

    images: (B, 3, S, S) uint8; loader processes leave their channels last in memory, to be moved on the device.
    Of a stream, indices are rows of shards, names say which, and mark is where the stream stands after the batch.
    """

    images: torch.Tensor
    masks: Masks
    indices: tuple[int, ...]
    bad: tuple[BadImage, ...] = ()
    names: tuple[str, ...] = ()
    mark: StreamMark | None = None

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(self, images=change(self.images), masks=map_tensors(self.masks, change))

    def tensors(self) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        self.map_tensors(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory; the loader's thread calls it."""
        return self.map_tensors(torch.Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class MicroBatches(Dataset):
    """Item i is this rank's micro-batch at micro-step i of the run.

    The global batch of a step is cut in order: micro-step a of rank r takes the images at positions
    (a * ranks + r) * micro_batch_size onwards. What stands at a position (image, crop, blocks) depends on the seed, the
    step and the position alone, so ranks, workers, accumulation and restarts do not change what is trained on.
    """

    images: ImageSet | Mixture | Streams
    blocks: MultiBlock
    context: str = "all"  # mask.context; batch_min alone depends on the micro-batch
    seed: int
    image_size: int
    crop_scale: tuple[float, float]
    horizontal_flip: bool = False
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    ranks: int = 1

    @property
    def accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.ranks)

    def __getitem__(self, micro_step: int) -> Batch:
        step, micro = divmod(micro_step, self.accumulation_steps)
        first = (micro * self.ranks + self.rank) * self.micro_batch_size
        positions = range(first, first + self.micro_batch_size)
        sizes = block_sizes(self.blocks, generator_for(self.seed, SIZES, step))
        crops, batch = self._crops(micro_step, step, positions)
        contexts, targets = [], []
        for position in positions:
            placed = place_blocks(self.blocks, sizes, generator_for(self.seed, BLOCKS, step, position))
            contexts.append(placed.context)
            targets.append(list(placed.target_blocks))
        rngs = [generator_for(self.seed, CONTEXT, step, position) for position in positions]
        masks = pack_masks(limit_context(contexts, self.context, rngs), targets, self.blocks.grid.num_patches)
        channels_last = torch.from_numpy(np.stack([crop.transpose(1, 2, 0) for crop in crops]))
        return Batch(channels_last.permute(0, 3, 1, 2), masks, **batch)

    def _crops(self, micro_step: int, step: int, positions: range) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Crops of the images at positions of a step, and what a Batch says of where they come from."""
        if isinstance(self.images, Streams):  # which are in order: streams take turns, and their processes with them
            uses = [self._cropping(step, position) for position in positions]
            taken, missed, mark = self.images.take(micro_step % self.images.num_streams, len(positions), uses)
            rows, names, read = zip(*taken, strict=True)
            return list(read), {"indices": rows, "names": names, "bad": tuple(missed), "mark": mark}
        crops, indices = [], []
        failures: list[BadImage] = []
        for position in positions:
            index = self._index_at(step, position)
            crop, bad = self.images.read_or_substitute(index, self._cropping(step, position))
            crops.append(crop)
            indices.append(index)
            failures += bad
        return crops, {"indices": tuple(indices), "bad": tuple(failures)}

    def _cropping(self, step: int, position: int) -> Use:
        """The crop of whichever image comes to stand at a position of a step."""

        def crop(file: bytes | str, limits: Limits) -> np.ndarray:
            rng = generator_for(self.seed, CROP, step, position)
            image = croppable(file, limits)
            return random_resized_crop(image, rng, self.image_size, scale=self.crop_scale, flip=self.horizontal_flip)

        return crop

    def _index_at(self, step: int, position: int) -> int:
        size = self.global_batch_size
        if isinstance(self.images, Mixture):
            return self.images.image_at(self.seed, step, position, global_batch_size=size)
        return image_at(self.seed, step, position, num_images=len(self.images), global_batch_size=size)

    def preview(self, step: int) -> Batch:
        """A micro-batch to look at, which moves no stream on: of streams the first images as they are stored."""
        images = self.images
        if isinstance(images, Streams):
            images = replace(images, shuffle_buffer=1, states=None, _open={})
        return replace(self, images=images)[step * self.accumulation_steps]


def micro_batch_stream(
    dataset: MicroBatches, *, start_step: int, stop_step: int, workers: int, pinned: bool = False
) -> Iterator[Batch]:
    """This rank's micro-batches from start_step up to stop_step, in order, loaded by worker processes.

    pinned: in page-locked memory, from which copies to a GPU take no part of the host's time.

    Of streams there is a process for each: micro-step m is made by process m - start, modulo their number, and that is
    always the same stream.
    """
    accumulation = dataset.accumulation_steps
    if isinstance(dataset.images, Streams) and workers:
        workers = dataset.images.num_streams
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start_step * accumulation, stop_step * accumulation),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pinned,
        worker_init_fn=_start_worker,
    )
    return _ended(iter(loader))


def _ended(batches: Any) -> Iterator[Batch]:
    """The same, and the end of the worker processes with it: an error keeps hold of them, and they ignore SIGTERM."""
    try:
        yield from batches
    finally:
        if hasattr(batches, "_shutdown_workers"):  # it has in torch 2.0 to 2.15, when there are any
            batches._shutdown_workers()


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group: the rank decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.enable()  # a rank collects by hand while it trains, and a fork of it would never collect
