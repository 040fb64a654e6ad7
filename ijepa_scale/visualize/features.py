"""What an encoder's features say of patches: their main axes as colours, similarity, attention.

B images, N patches, P patches of all images, D width, H heads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.visualize.sheet import Bar, Box, Cell, draw_sheet, upright

AT_ONCE = 64  # images
BACKGROUND = 0.9  # of a patch that is not foreground, of 1
SIMILARITY = Bar("cosine with the marked patch", -1, 1, "RdBu_r")


@torch.no_grad()
def patch_features(encoder: Any, images_BCHW: np.ndarray, layers: Sequence[int]) -> list[np.ndarray]:
    """Of each of the layers (B, N, D) float32, after the final LayerNorm: as VisionTransformer.intermediate()."""
    device = encoder.norm.weight.device
    parts = [
        [tokens.float().cpu().numpy() for tokens in encoder.intermediate(images.to(device), layers)]
        for images in torch.from_numpy(images_BCHW).split(AT_ONCE)
    ]
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]


def place_means(encoder: Any, images_BCHW: np.ndarray, layers: Sequence[int]) -> list[np.ndarray]:
    """Of each of the layers the mean feature at each place of the patch grid, over all images, (N, D) float64."""
    sums: list[Any] = [0.0] * len(layers)
    for start in range(0, len(images_BCHW), AT_ONCE):
        for place, part in enumerate(patch_features(encoder, images_BCHW[start : start + AT_ONCE], layers)):
            sums[place] += part.sum(axis=0, dtype=np.float64)
    return [total / len(images_BCHW) for total in sums]


def principal_components(features_PD: np.ndarray, count: int) -> np.ndarray:
    """Scores of all patches on their first principal axes, (P, count) float64.

    An axis points to where its largest weight is positive, so that the same features always have the same colours.
    """
    centred = features_PD.astype(np.float64) - features_PD.mean(axis=0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    axes = axes[:, ::-1][:, :count]
    return centred @ (axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]))


def foreground(features_BND: np.ndarray, threshold: float) -> np.ndarray:
    """Which patches lie beyond a threshold along the first principal axis, (B, N) bool (DINOv2, arXiv:2304.07193).

    The axis goes from 0 to 1 over all patches. threshold: more than it is foreground; below 0: less than its size is.
    ValueError where fewer than four patches would be.
    """
    first = principal_components(features_BND.reshape(-1, features_BND.shape[-1]), 1)[:, 0]
    share = (first - first.min()) / max(np.ptp(first), 1e-12)
    kept = share > threshold if threshold >= 0 else share < -threshold
    if kept.sum() < 4:
        raise ValueError(
            f"--foreground {threshold:g} keeps {kept.sum()} of {kept.size:,} patches, and colours need 4; the first "
            "component goes from 0 to 1 over all patches: give one between, or a negative one for the other side"
        )
    return kept.reshape(features_BND.shape[:2])


def pca_scores(features_BND: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """One PCA of all patches of all images: scores on its first three axes, (B, N, 3), each of standard deviation 1.

    threshold: of foreground(); the PCA is then of the foreground alone, and the rest is NaN.
    """
    kept = np.ones(features_BND.shape[:2], bool) if threshold is None else foreground(features_BND, threshold)
    found = principal_components(features_BND[kept], 3)
    scores = np.full((*kept.shape, 3), np.nan)
    scores[kept] = found / np.maximum(found.std(axis=0), 1e-12)
    return scores


def turned(scores_BN3: np.ndarray, others_BN3: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores turned, or mirrored, as one to come as near as they can to others of the same patches; and how near.

    By the orthogonal transformation of least squared distance (Procrustes; Schönemann, 1966): which patches are alike
    stays as it was. How near: the correlation of all turned scores with the others', 1 where they are the same. Patches
    that are NaN on either side do not count.
    """
    both = np.isfinite(scores_BN3) & np.isfinite(others_BN3)
    own, other = (np.where(both, scores, 0.0).reshape(-1, 3) for scores in (scores_BN3, others_BN3))
    left, sizes, right = np.linalg.svd(own.T @ other)
    return scores_BN3 @ (left @ right), float(sizes.sum() / max(np.linalg.norm(own) * np.linalg.norm(other), 1e-12))


def colours(scores_BN3: np.ndarray) -> np.ndarray:
    """Three scores of each patch as red, green and blue, (B, N, 3) of 0 to 1; those that are NaN grey."""
    low, high = np.nanpercentile(scores_BN3, [1, 99], axis=(0, 1))
    shown = np.clip((scores_BN3 - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.where(np.isfinite(shown), shown, BACKGROUND)


def similarity(features_BND: np.ndarray, patches_B: np.ndarray) -> np.ndarray:
    """Cosine between one patch of each image and all patches of that image, (B, N).

    Of features less their mean over all patches of all images: what all share says nothing.
    """
    units_BND = unit(features_BND - features_BND.mean(axis=(0, 1)))
    return np.einsum("bnd,bd->bn", units_BND, units_BND[np.arange(len(units_BND)), patches_B])


def attention_maps(weights_BHNN: np.ndarray, patch: int | None) -> np.ndarray:
    """How much each head attends to each patch, (B, H, N), in multiples of even attention, 1 / N.

    patch: that attends; None: the average over all patches that do.
    """
    attended = weights_BHNN.mean(axis=2) if patch is None else weights_BHNN[:, :, patch]
    return attended * weights_BHNN.shape[-1]


@torch.no_grad()
def attention_weights(encoder: Any, images_BCHW: np.ndarray, layer: int) -> np.ndarray:
    """(B, H, N, N) as VisionTransformer.attention_weights(), one image at a time: they are large."""
    device = encoder.norm.weight.device
    images = torch.from_numpy(images_BCHW).to(device).split(1)
    return torch.cat([encoder.attention_weights(one, [layer])[0].cpu() for one in images]).numpy()


def busiest_patches(images_BCHW: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Of each image the patch whose pixels vary most, (B,): rarely sky or floor."""
    batch, _, height, width = images_BCHW.shape
    tall, wide = height // grid.rows, width // grid.columns
    patches = images_BCHW.reshape(batch, 3, grid.rows, tall, grid.columns, wide).astype(np.float32)
    return patches.std(axis=(3, 5)).mean(axis=1).reshape(batch, -1).argmax(axis=1)


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def patch_box(patch: int, grid: PatchGrid) -> Box:
    return (*divmod(int(patch), grid.columns), 1, 1)


def draw_step(
    path: Path,
    images_BCHW: np.ndarray,
    colours_BN3: np.ndarray,
    similarity_BN: np.ndarray,
    grid: PatchGrid,
    *,
    heading: str,
    marked: np.ndarray,
) -> None:
    """Write a PNG of three rows: the images with a marked patch each, the colours of their patches, and similarity."""
    count, pixels = len(images_BCHW), upright(images_BCHW)
    rows = [
        [Cell(pixels[i], box=patch_box(marked[i], grid)) for i in range(count)],
        [Cell(one.reshape(*grid.shape, 3)) for one in colours_BN3],
        [Cell(heat=one.reshape(grid.shape)) for one in similarity_BN],
    ]
    draw_sheet(path, rows, grid, headings={0: heading}, labels=("image", "colours", "similarity"), bar=SIMILARITY)


def draw_beside(
    path: Path,
    images_BCHW: np.ndarray,
    rows: Sequence[tuple[str, np.ndarray, np.ndarray]],
    grid: PatchGrid,
    *,
    headings: tuple[str, str],
    marked: np.ndarray | None = None,
    bar: Bar | None = None,
) -> None:
    """Write a PNG: the images, and a row of each of `rows` below, of one network to the left, of another to the right.

    rows: (label, of the one, of the other), each (B, N, 3) colours, or with a bar (B, N) values. marked: a patch each.
    """
    count, pixels = len(images_BCHW), upright(images_BCHW)
    boxes = [None if marked is None else patch_box(marked[i], grid) for i in range(count)]
    cells = [[Cell(pixels[i], box=boxes[i]) for i in range(count)] * 2]
    for _, *sides in rows:
        maps = [one.reshape(*grid.shape, *one.shape[1:]) for side in sides for one in side]
        cells.append([Cell(heat=one) if bar else Cell(one) for one in maps])
    labels, over = ["image", *(label for label, *_ in rows)], {0: headings[0], count: headings[1]}
    draw_sheet(path, cells, grid, headings=over, labels=labels, gap_before=count, bar=bar)
