"""A rank's share of images, each once and in order, as batches to encode or to judge by; and loaders that fail."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ijepa_scale.data.collate import (
    LoadError,
    MicroBatchStream,
    check_batches_fit,
    shared_memory,
    start_worker,
    why_loaders_failed,
)
from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.transforms import center_crop, stretched
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.launchers import ranks_here

OPTION = "--workers"  # of evaluate and embed; in a config data.workers


@dataclass(frozen=True)
class ImageBatch:
    """images: (B, 3, S, S) uint8. places: (B,) int64, which of the images each is; -1: none, not to be counted.

    reasons: why each cannot be read; "" for those that can, and where there is none.
    """

    images: torch.Tensor
    places: torch.Tensor
    reasons: tuple[str, ...]


@contextlib.contextmanager
def image_batches(
    images: ImageSet,
    indices: Sequence[int] | np.ndarray,
    *,
    image_size: int,
    batch_size: int,
    ranks: Ranks,
    workers: int,
    stretch: bool = False,
    start: int = 0,
) -> Iterator[MicroBatchStream]:
    """ImageBatches of this rank's share of the indices: every place from start on that is its rank, modulo the ranks.

    stretch: the whole image, squashed to a square, not its centre. workers: loader processes, which end with the
    context; 0: this process loads. All ranks get as many batches of one size: where a share is over, and for an
    unreadable image, a black one stands, with place -1.
    Raises ValueError where batches do not fit into shared memory, LoadError where loader processes fail.
    """
    share = _Share(images, indices, image_size, stretch, ranks.rank, ranks.world_size, start)
    draws = torch.Generator()  # of its own: a loader draws from the global one, even where nothing is random
    loader = DataLoader(
        share,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_stacked,
        worker_init_fn=start_worker,
        generator=draws,
    )
    with streamed(loader, batch_bytes=batch_size * 3 * image_size**2) as batches:
        yield batches


@contextlib.contextmanager
def streamed(loader: DataLoader, *, batch_bytes: int) -> Iterator[MicroBatchStream]:
    """The loader's batches; its processes end with the context. Raises as image_batches()."""
    workers, found = loader.num_workers, shared_memory()
    if workers and found:
        facts = {"batch_bytes": batch_bytes, "workers": workers, "ranks": ranks_here(), "free": found[1]}
        check_batches_fit(**facts, ahead=loader.prefetch_factor or 0, option=OPTION)
    try:
        with MicroBatchStream(loader) as batches:
            yield batches
    except (RuntimeError, OSError) as error:
        if not (why := why_loaders_failed(error)):
            raise
        raise LoadError(f"{why}, or lower {OPTION} (now {workers}; with 0 no process is started for it)") from error


@dataclass(frozen=True)
class _Share(Dataset):
    """Item i: (3, S, S) uint8 of the i-th place of a rank's share, the place, and why it cannot be read."""

    images: ImageSet
    indices: Sequence[int] | np.ndarray  # of all ranks; a range of a whole set takes no memory
    image_size: int
    stretch: bool
    rank: int
    ranks: int
    start: int

    def __len__(self) -> int:
        return math.ceil((len(self.indices) - self.start) / self.ranks)

    def __getitem__(self, item: int) -> tuple[np.ndarray, int, str]:
        place, reason = self.start + item * self.ranks + self.rank, ""
        if place < len(self.indices):
            try:
                image = self.images.read(int(self.indices[place]))
                return (stretched if self.stretch else center_crop)(image, self.image_size), place, reason
            except BadImageError as error:
                reason = error.reason
        return np.zeros((3, self.image_size, self.image_size), np.uint8), -1, reason


def _stacked(items: list[tuple[np.ndarray, int, str]]) -> ImageBatch:
    images, places, reasons = zip(*items, strict=True)
    return ImageBatch(torch.from_numpy(np.stack(images)), torch.tensor(places), reasons)
