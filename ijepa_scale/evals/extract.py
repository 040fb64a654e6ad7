"""Images -> one feature vector each, from frozen encoders: the one way, alone or over ranks, to memory or to disk."""

import contextlib
import functools
import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import ImageSet
from ijepa_scale.engine.distributed import Ranks, alone
from ijepa_scale.evals.shares import ImageBatch, image_batches
from ijepa_scale.evals.stores import open_stores


@torch.no_grad()
def pooled(encoder: Any, images_BCHW: torch.Tensor, blocks: Sequence[int] = ()) -> torch.Tensor:
    """Average of an encoder's tokens over the patches of each image (I-JEPA, arXiv:2301.08243, A.2: no [cls] token).

    encoder: images -> (B, N, D) tokens after the final LayerNorm, in any float dtype.
    images_BCHW: (B, 3, H, W) uint8; they are moved to the encoder's device, and normalized inside it.
    blocks: the averages of these blocks' outputs instead, each after the final LayerNorm, side by side, as with the
    paper's last four, (-4, -3, -2, -1): as of VisionTransformer.intermediate().
    Returns (B, D), or (B, len(blocks) * D), float32 on the CPU. Each module's training mode is as before on return.
    """
    return _mean_of(_tokens(encoder, images_BCHW, blocks))


def _tokens(encoder: Any, images_BCHW: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
    """Of each of the blocks, or of the last one, (B, N, D) after the final LayerNorm."""
    tensor = next(chain(encoder.parameters(), encoder.buffers()), None)
    images_BCHW = images_BCHW.to("cpu" if tensor is None else tensor.device, non_blocking=True)
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        return encoder.intermediate(images_BCHW, blocks) if len(blocks) else [encoder(images_BCHW)]
    finally:
        for module, training in modes:
            module.training = training


def _mean_of(tokens: list[torch.Tensor]) -> torch.Tensor:
    # Averaged in fp32: a bf16 sum over hundreds of patches would lose the small differences between images.
    return torch.cat([tokens_BND.float().mean(dim=1) for tokens_BND in tokens], dim=1).cpu()


@torch.no_grad()
def _features(encoder: Any, images_BCHW: torch.Tensor, blocks: Sequence[int], patches: bool) -> list[np.ndarray]:
    """What goes to a row of each of an encoder's stores: pooled, (B, D), and with patches each one's, (B, N, D)."""
    tokens = _tokens(encoder, images_BCHW, blocks)
    each = [torch.cat([tokens_BND.float() for tokens_BND in tokens], dim=2).cpu().numpy()] if patches else []
    return [_mean_of(tokens).numpy(), *each]


@dataclass(frozen=True)
class Extracted:
    """Features of the images that could be read.

    features: by the encoders' names, (n, D) float32 arrays (read-only maps of files, where they went to disk); on the
    first rank alone. Patch features are (n, N, D), under NAME.patches. indices: (n,) int64, which image each row is of,
    and unreadable: why the others have none, on every rank.
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
    patches: bool = False,
    folder: Path | None = None,
    facts: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    watch: Callable[[Iterable], Iterable] = iter,
) -> Extracted:
    """Pooled features, as pooled() has them, of the centre of each image. All ranks call it.

    Images are read once for all encoders, in the order of indices (None: all of the set). Each rank computes its share
    of them, batch_size at a time, in as many batches as any other: at ZeRO-3 ranks need each other in the forward.
    image_size: pixels a side that the centre is cut to (data/transforms.py). stretch: the whole image is resized to
    that instead. ranks: None: this process alone. workers: loader processes of a rank; 0: it loads itself. patches:
    also the features of each patch, which pooled() averages. folder: the first rank writes NAME.npy of each encoder
    there as they come, and NAME.patches.npy: memory grows by 8 bytes an image, its index. watch: is handed the batches
    to show how it goes.
    facts: all that the features depend on, as JSON holds it. What a stop leaves half done in the folder is then gone on
    with by a call of the same facts, number of images and batch_size, to the same bits; what lies there of others is
    deleted. say is told of it. A journal stays, until stores.forget_half(): call it when what goes with the features is
    there, too.
    Raises BadImageError, on every rank, where no image can be read, ValueError where there is none, and leaves no file.
    """
    ranks, chosen = ranks or alone(), range(len(images)) if indices is None else indices
    if not len(chosen):
        raise ValueError(f"no images of {images.name} to compute features of; check the split and its filter")
    names = [f"{name}{part}" for name in encoders for part in ("", ".patches")[: 1 + patches]]
    if facts is not None:
        facts = {"of": facts, "images": _digest(indices) if indices is not None else len(chosen), "batch": batch_size}
        facts |= {"image_size": image_size, "blocks": list(blocks), "names": names, "stretch": stretch}
    with contextlib.ExitStack() as stack:
        opened = open_stores(folder, names, facts, len(chosen))
        stores = ranks.together(lambda: stack.enter_context(opened) if ranks.first else None)
        done, unreadable = ranks.gather((stores.done, dict(stores.unreadable)) if stores else (0, {}))[0]
        if stores and (told := stores.begun(len(chosen))):
            say(told)
        kept = array("q", (index for index in chosen[:done] if index not in unreadable))
        batches = image_batches(
            images,
            chosen,
            image_size=image_size,
            batch_size=batch_size,
            ranks=ranks,
            workers=workers,
            stretch=stretch,
            start=done,
        )
        loaded = watch(stack.enter_context(batches))
        wanted = iter(chosen[done:])
        for rows in _batches(list(encoders.values()), loaded, ranks, blocks, patches):
            found = []
            for (vectors, reason), index in zip(rows, wanted, strict=False):  # the last ranks may be an image short
                if reason:
                    unreadable[int(index)] = reason
                else:
                    kept.append(index)
                    found.append(vectors)
            done = min(done + len(rows), len(chosen))
            ranks.together(functools.partial(stores.append, found, done, unreadable) if stores else _nothing)
        if not kept:
            ranks.together(stores.discard if stores else _nothing)
            index, reason = next(iter(unreadable.items()))
            raise BadImageError(
                f"{images.name}: none of {len(chosen)} images can be read, the first because: cannot read "
                f"{images.sample_id(index)}: {reason}"
            )
        ranks.together(stores.end if stores else _nothing)
        ranks.together(stack.close)  # the files get their names
    return Extracted(stores.rows_read() if stores else {}, np.array(kept, np.int64), unreadable)


def _digest(indices: Sequence[int] | np.ndarray) -> str:
    return hashlib.blake2b(np.asarray(indices, np.int64).tobytes(), digest_size=16).hexdigest()


def _nothing() -> None:
    """What ranks but the first do where it writes."""


def _batches(
    encoders: list[nn.Module], loaded: Iterable[ImageBatch], ranks: Ranks, blocks: Sequence[int], patches: bool
) -> Iterator[list[tuple[list[np.ndarray], str]]]:
    """For each batch, of all ranks' images in order: a row for every store of it, and why it cannot be read."""
    for batch in loaded:
        values = [part for encoder in encoders for part in _features(encoder, batch.images, blocks, patches)]
        shares = ranks.gather((values, batch.reasons))
        yield [
            ([vectors[row] for vectors in values_there], reasons_there[row])
            for row in range(len(batch.reasons))
            for values_there, reasons_there in shares
        ]
