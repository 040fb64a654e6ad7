"""Ragged lists of patch indices -> packed tokens: flat indices and cu_seqlens, on the host, without a device sync."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")


def map_tensors(value: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """A frozen dataclass with every tensor in it, and in dataclasses in it, changed."""

    def changed(part: Any) -> Any:
        return change(part) if isinstance(part, torch.Tensor) else map_tensors(part, change)

    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{item.name: changed(getattr(value, item.name)) for item in fields(value)})


@dataclass(frozen=True)
class Packed:
    """S sequences of tokens end to end.

    indices_T: (T,) int32, image * num_patches + patch, for every token. cu_seqlens: (S + 1,) int32; sequence s is rows
    cu_seqlens[s]:cu_seqlens[s + 1]. On the host: max_seqlen, the longest sequence; num_pairs, the sum of squared
    lengths, which attention's cost grows with.
    """

    indices_T: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_pairs: int

    @property
    def num_tokens(self) -> int:
        return self.indices_T.shape[0]

    def patches(self, num_patches: int) -> list[np.ndarray]:
        """The patches of each sequence, numbered within its image. On the CPU."""
        indices, bounds = self.indices_T.numpy() % num_patches, self.cu_seqlens.numpy()
        return [indices[low:high] for low, high in pairwise(bounds)]

    def to(self, device: torch.device | str) -> "Packed":
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Masks:
    """What the networks see of each image.

    context: one sequence an image, or one a mask of it, image-major. target_blocks: M sequences for each of these, all
    of one length.
    prediction: the predictor's sequences, one a target block: its mask's context tokens, then the block's mask
    tokens; its indices_T name the patches. prediction_source_T: (T_p,) int32, row among the context tokens, -1 for a
    mask token. prediction_copies_TM: (T_c, M) int32, the rows that hold each context token. target_rows_T: (T_t,)
    int64, rows of the predictor's input that hold mask tokens and of its output that answer target_blocks, in order.
    target_patches_U: (U,) int64, ascending, the patches that some target block holds, image * num_patches + patch;
    target_index_T: (T_t,) int64, the place among them of each token of target_blocks.
    """

    context: Packed
    target_blocks: Packed
    prediction: Packed
    prediction_source_T: torch.Tensor
    prediction_copies_TM: torch.Tensor
    target_rows_T: torch.Tensor
    target_patches_U: torch.Tensor
    target_index_T: torch.Tensor
    num_patches: int
    masks_an_image: int = 1

    @property
    def num_images(self) -> int:
        return (self.context.cu_seqlens.shape[0] - 1) // self.masks_an_image

    def to(self, device: torch.device | str) -> "Masks":
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def _packed(indices: list[np.ndarray], offsets: list[int]) -> Packed:
    lengths = np.array([len(part) for part in indices])
    flat = np.concatenate([part + offset for part, offset in zip(indices, offsets, strict=True)])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    return Packed(
        torch.from_numpy(flat.astype(np.int32)),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_pairs=int((lengths**2).sum()),
    )


def _patches(name: str, part: Any, num_patches: int) -> np.ndarray:
    """Patch indices as they were given, any integers, (n,) int64."""
    kind = part.dtype if isinstance(part, torch.Tensor) else None
    if kind is None or not (kind.is_floating_point or kind.is_complex or kind == torch.bool):
        part = np.asarray(part.cpu() if isinstance(part, torch.Tensor) else part).reshape(-1)
        if part.size == 0:
            raise ValueError(f"{name} holds an empty list of patches; every one needs at least one patch")
        kind = part.dtype
        if part.dtype.kind in "iu":
            if part.min() < 0 or part.max() >= num_patches:
                raise ValueError(f"{name} holds patch {part.min()}..{part.max()}; the image has 0..{num_patches - 1}")
            return part.astype(np.int64)
    raise ValueError(f"{name} holds {kind}; wants integers, the numbers of patches: of a mask, numpy.flatnonzero(mask)")


def pack_masks(
    context: Sequence[np.ndarray],
    target_blocks: Sequence[Sequence[np.ndarray]],
    num_patches: int,
    *,
    masks_an_image: int = 1,
) -> Masks:
    """Pack explicit patch indices.

    context[b]: (n_b,) patch indices of image b, integers of any type, n_b >= 1. target_blocks[b][m]: (K,) patch indices
    of its block m; K is the same for all. With several masks an image, context[b] and target_blocks[b] are of image
    b // masks_an_image. Raises ValueError on what is no integer, an index outside 0..num_patches - 1, an empty list,
    unequal blocks or masks that some image lacks.
    """
    if not len(context) or len(context) != len(target_blocks):
        raise ValueError(
            f"need context and target blocks for the same images, got {len(context)}, {len(target_blocks)}"
        )
    contexts = [_patches("context", part, num_patches) for part in context]
    blocks = [[_patches("target_blocks", block, num_patches) for block in image] for image in target_blocks]
    if len({block.size for image in blocks for block in image}) != 1 or len({len(image) for image in blocks}) != 1:
        raise ValueError("every image needs as many target blocks, all of one size, so that the loss is one plain mean")

    if len(contexts) % masks_an_image:
        raise ValueError(f"{len(contexts)} masks are not {masks_an_image} of each image; give as many of each")

    starts = [mask // masks_an_image * num_patches for mask in range(len(contexts))]
    rows = np.concatenate([[0], np.cumsum([part.size for part in contexts])])
    sequences: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    copies: list[np.ndarray] = []  # a block's sequence is as long as every other of its image
    row = 0  # of the prediction
    for image, (visible, image_blocks) in enumerate(zip(contexts, blocks, strict=True)):
        length = visible.size + image_blocks[0].size
        copies.append(row + np.arange(visible.size)[:, None] + length * np.arange(len(image_blocks)))
        row += length * len(image_blocks)
        for block in image_blocks:
            sequences.append(np.concatenate([visible, block]))
            sources.append(np.concatenate([np.arange(rows[image], rows[image + 1]), np.full(block.size, -1)]))
    blocks_an_image = len(blocks[0])
    source_T = np.concatenate(sources).astype(np.int32)
    targets = _packed([block for image in blocks for block in image], np.repeat(starts, blocks_an_image).tolist())
    target_patches, target_index = torch.unique(targets.indices_T.long(), return_inverse=True)
    return Masks(
        context=_packed(contexts, starts),
        target_blocks=targets,
        prediction=_packed(sequences, np.repeat(starts, blocks_an_image).tolist()),
        prediction_source_T=torch.from_numpy(source_T),
        prediction_copies_TM=torch.from_numpy(np.concatenate(copies).astype(np.int32)),
        target_rows_T=torch.from_numpy(np.flatnonzero(source_T < 0)),
        target_patches_U=target_patches,
        target_index_T=target_index,
        num_patches=num_patches,
        masks_an_image=masks_an_image,
    )


def limit_context(context: Sequence[np.ndarray], budget: str, rngs: Sequence[np.random.Generator]) -> list[np.ndarray]:
    """Apply mask.context to one micro-batch.

    all: every token stays. batch_min: each image keeps its first tokens in raster order, as many as the micro-batch's
    shortest has (what the reference does). A number: each image keeps a random subset of that size, in raster order.
    """
    if budget == "all":
        return list(context)
    if budget == "batch_min":
        shortest = min(part.size for part in context)
        return [part[:shortest] for part in context]
    keep = int(budget)
    return [
        part if part.size <= keep else part[np.sort(rng.choice(part.size, keep, replace=False))]
        for part, rng in zip(context, rngs, strict=True)
    ]
