"""Images -> one feature vector each, from frozen encoders: the one way, alone or over ranks, to memory or to disk."""

import contextlib
import functools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.files import written_whole
from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.transforms import center_crop, stretched
from ijepa_scale.engine.distributed import Ranks, alone


@torch.no_grad()
def pooled(encoder: Any, images_BCHW: torch.Tensor, blocks: Sequence[int] = ()) -> torch.Tensor:
    """Average of an encoder's tokens over the patches of each image (I-JEPA, arXiv:2301.08243, A.2: no [cls] token).

    encoder: images -> (B, N, D) tokens after the final LayerNorm, in any float dtype.
    images_BCHW: (B, 3, H, W) uint8; they are moved to the encoder's device, and normalized inside it.
    blocks: the averages of these blocks' outputs instead, each after the final LayerNorm, side by side, as with the
    paper's last four, (-4, -3, -2, -1): as of VisionTransformer.intermediate().
    Returns (B, D), or (B, len(blocks) * D), float32 on the CPU. Each module's training mode is as before on return.
    """
    tensor = next(chain(encoder.parameters(), encoder.buffers()), None)
    images_BCHW = images_BCHW.to("cpu" if tensor is None else tensor.device, non_blocking=True)
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        tokens = encoder.intermediate(images_BCHW, blocks) if len(blocks) else [encoder(images_BCHW)]
    finally:
        for module, training in modes:
            module.training = training
    # Averaged in fp32: a bf16 sum over hundreds of patches would lose the small differences between images.
    return torch.cat([tokens_BND.float().mean(dim=1) for tokens_BND in tokens], dim=1).cpu()


@dataclass(frozen=True)
class Extracted:
    """Features of the images that could be read.

    features: by the encoders' names, (n, D) float32 arrays (read-only maps of files, where they went to disk); on the
    first rank alone. indices: (n,) int64, which image each row is of, and unreadable: why the others have none, on
    every rank.
    """

    features: dict[str, np.ndarray]
    indices: np.ndarray
    unreadable: dict[int, str]


def extract(
    encoders: Mapping[str, nn.Module],
    images: ImageSet,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    image_size: int,
    batch_size: int,
    ranks: Ranks | None = None,
    workers: int = 0,
    blocks: Sequence[int] = (),
    stretch: bool = False,
    folder: Path | None = None,
    watch: Callable[[Iterable], Iterable] = iter,
) -> Extracted:
    """Pooled features, as pooled() has them, of the centre of each image. All ranks call it.

    Images are read once for all encoders, in the order of indices (None: all of the set). Each rank computes its share
    of them, batch_size at a time, in as many batches as any other: at ZeRO-3 ranks need each other in the forward.
    image_size: pixels a side that the centre is cut to (data/transforms.py). stretch: the whole image is resized to
    that instead. ranks: None: this process alone. workers: loader processes of a rank; 0: it loads itself. folder: the
    first rank writes NAME.npy of each encoder there as they come: memory grows by 8 bytes an image, its index. watch:
    is handed the batches to show how it goes.
    Raises BadImageError, on every rank, where no image can be read, ValueError where there is none, and leaves no file.
    """
    ranks, chosen = ranks or alone(), range(len(images)) if indices is None else indices
    if not len(chosen):
        raise ValueError(f"no images of {images.name} to compute features of; check the split and its filter")
    crops = _Crops(images, stretched if stretch else center_crop, image_size, chosen, ranks.rank, ranks.world_size)
    # A generator of its own: a loader draws from torch's global one, even where nothing is random.
    draws = torch.Generator()
    loader = DataLoader(crops, batch_size=batch_size, num_workers=workers, collate_fn=_stacked, generator=draws)
    kept = array("q")
    unreadable: dict[int, str] = {}
    wanted = iter(chosen)
    with contextlib.ExitStack() as stack:
        stores = {name: stack.enter_context(_store(folder, name)) for name in encoders} if ranks.first else {}
        for rows in _batches(list(encoders.values()), watch(loader), ranks, blocks):
            found = []
            for (vectors, reason), index in zip(rows, wanted, strict=False):  # the last ranks may be an image short
                if reason:
                    unreadable[index] = reason
                else:
                    kept.append(index)
                    found.append(vectors)
            ranks.together(functools.partial(_append, list(stores.values()), found))
        if not kept:
            index, reason = next(iter(unreadable.items()))
            raise BadImageError(
                f"{images.name}: none of {len(chosen)} images can be read, the first because: cannot read "
                f"{images.sample_id(index)}: {reason}"
            )
        for store in stores.values():
            store.end()
        ranks.together(stack.close)  # the files get their names
    return Extracted({name: store.rows_read() for name, store in stores.items()}, np.array(kept), unreadable)


def _batches(
    encoders: list[nn.Module], loader: Iterable, ranks: Ranks, blocks: Sequence[int]
) -> Iterator[list[tuple[list[np.ndarray], str]]]:
    """For each batch, of all ranks' images in order: every encoder's vector of it, and why it cannot be read."""
    for batch, reasons in loader:
        values = [pooled(encoder, batch, blocks).numpy() for encoder in encoders]
        shares = ranks.gather((values, reasons))
        yield [
            ([vectors[row] for vectors in values_there], reasons_there[row])
            for row in range(len(reasons))
            for values_there, reasons_there in shares
        ]


def _append(stores: list["_InMemory | _OnDisk"], found: list[list[np.ndarray]]) -> None:
    """found: of each image a vector for every store."""
    for store, rows in zip(stores, zip(*found, strict=True), strict=False):  # none was read, or not the first rank
        store.append(np.stack(rows))


@dataclass(frozen=True)
class _Crops(Dataset):
    """Item i: the centre of image i of a rank's share, (3, size, size) uint8, and why it cannot be read; then black.

    As is what lies past the last image: all ranks have as many items.
    """

    images: ImageSet
    crop: Callable[[Image.Image, int], np.ndarray]
    size: int
    indices: Sequence[int] | np.ndarray  # of all ranks; a range of a whole set takes no memory
    rank: int
    ranks: int

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.ranks)

    def __getitem__(self, item: int) -> tuple[np.ndarray, str]:
        place, reason = item * self.ranks + self.rank, ""
        if place < len(self.indices):
            try:
                return self.crop(self.images.read(self.indices[place]), self.size), reason
            except BadImageError as error:
                reason = error.reason
        return np.zeros((3, self.size, self.size), np.uint8), reason


def _stacked(items: list[tuple[np.ndarray, str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.from_numpy(np.stack([crop for crop, _ in items])), [reason for _, reason in items]


@contextlib.contextmanager
def _store(folder: Path | None, name: str) -> Iterator["_InMemory | _OnDisk"]:
    if folder is None:
        yield _InMemory()
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npy"
    with written_whole(path) as file:
        yield _OnDisk(file, path)


@dataclass
class _InMemory:
    parts: list[np.ndarray] = field(default_factory=list)

    def append(self, rows: np.ndarray) -> None:
        self.parts.append(rows)

    def end(self) -> None:
        """There is nothing to do."""

    def rows_read(self) -> np.ndarray:
        return np.concatenate(self.parts)


@dataclass
class _OnDisk:
    """Rows go to the end of a .npy file; how many they are is written at its beginning last."""

    file: Any
    path: Path
    rows: int = 0
    width: int = 0
    start: int = 0

    def append(self, rows: np.ndarray) -> None:
        if not self.rows:
            self.width = rows.shape[1]
            self._write_header()
            self.start = self.file.tell()
        rows.tofile(self.file)
        self.rows += len(rows)

    def end(self) -> None:
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.start, "NumPy keeps room for the number of rows to grow"

    def rows_read(self) -> np.ndarray:
        """Once the file has its name."""
        return np.load(self.path, mmap_mode="r")

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(self.file, header)
