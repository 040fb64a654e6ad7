"""Pictures of the masking: of some images what is seen and what is predicted, and how often each patch is either."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ijepa_scale.visualize.curves import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_IMAGES = 8
GREY = 200  # of a hidden patch, 0 to 255
# Okabe and Ito's colours, told apart with colour-blind eyes too; more blocks than colours start over.
BLOCK_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
TITLES = ("image", "context (encoder sees it)", "target blocks (predicted)", "both")


def draw_masks(
    path: str | Path,
    images_BCHW: np.ndarray,
    grid_rows: int,
    grid_columns: int,
    context: Sequence[np.ndarray],
    target_blocks: Sequence[Sequence[np.ndarray]],
) -> None:
    """Write a PNG with a row for each of the first MAX_IMAGES images.

    images_BCHW: uint8 RGB; height and width are multiples of grid_rows and grid_columns.
    context: B arrays of patch indices (row * columns + column). target_blocks: B sequences of M such arrays.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    _check(images_BCHW, grid_rows, grid_columns, context, target_blocks)
    grid = (grid_rows, grid_columns)
    rows = min(len(images_BCHW), MAX_IMAGES)
    height_inches = 1.92 * rows + 0.75
    figure = Figure(figsize=(7.6, height_inches), dpi=120, facecolor="white")
    axes = figure.subplots(rows, len(TITLES), squeeze=False)
    figure.subplots_adjust(
        left=0.02, right=0.98, top=1 - 0.3 / height_inches, bottom=0.5 / height_inches, wspace=0.06, hspace=0.12
    )
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=9)
    for row in range(rows):
        image = images_BCHW[row].transpose(1, 2, 0)
        blocks = [_patch_mask(indices, grid) for indices in target_blocks[row]]
        visible = _patch_mask(context[row], grid)
        seen = np.where(_to_pixels(visible, image)[..., None], image, GREY).astype(np.uint8)
        tinted = image.astype(np.float32)
        for block, mask in enumerate(blocks):
            tinted = _tint(tinted, _to_pixels(mask, image), _rgb(block), 0.35)
        both = seen.astype(np.float32)
        for block, mask in enumerate(blocks):
            both = _tint(both, _to_pixels(mask & ~visible, image), _rgb(block), 0.35)
        for axis, pixels in zip(axes[row], (image, seen, tinted.astype(np.uint8), both.astype(np.uint8)), strict=True):
            axis.imshow(pixels, interpolation="nearest", extent=(0, grid_columns, grid_rows, 0), aspect="equal")
            axis.set(xticks=[], yticks=[])
        for axis in axes[row, 2:]:
            for block, mask in enumerate(blocks):
                _outline(axis, mask, BLOCK_COLOURS[block % len(BLOCK_COLOURS)])
        block_sizes = " + ".join(str(int(mask.sum())) for mask in blocks)
        axes[row, 1].set_xlabel(f"{visible.sum()} of {visible.size} patches", fontsize=7, labelpad=2)
        axes[row, 2].set_xlabel(f"{block_sizes} patches", fontsize=7, labelpad=2)
    num_blocks = max(len(blocks) for blocks in target_blocks[:rows])
    handles = [
        Patch(color=BLOCK_COLOURS[b % len(BLOCK_COLOURS)], label=f"target block {b + 1}") for b in range(num_blocks)
    ]
    handles.append(Patch(color=f"{GREY / 255}", label="hidden from the encoder"))
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    save(figure, path)


def draw_mask_shares(
    path: str | Path, names: Sequence[str], counted: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> None:
    """Write a PNG with a row for each of the names: how often each patch was it, how often it should be, and the rest.

    counted, expected: (rows, columns) shares of 0 to 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 2.35 * len(names) + 0.3), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(len(names), 3, squeeze=False)
    largest = 100 * max(max(np.abs(one - two).max() for one, two in zip(counted, expected, strict=True)), 0.005)
    for row, (name, one, two) in zip(axes, zip(names, counted, expected, strict=True), strict=True):
        for axis, title, shares in zip(row, ("drawn", "expected", "difference"), (one, two, one - two), strict=True):
            limits = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"} if title == "difference" else {"vmin": 0}
            image = axis.imshow(100 * shares, **({"vmax": 100 * max(one.max(), two.max())} | limits))
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{name}: {title}", fontsize=9)
            if title != "drawn":  # which has the colours of the expected
                bar = figure.colorbar(image, ax=row[:2] if title == "expected" else axis, shrink=0.9)
                bar.set_label("% of layouts" if title == "expected" else "percent points", fontsize=8)
                bar.ax.tick_params(labelsize=7)
    save(figure, path)


def _check(
    images: np.ndarray,
    grid_rows: int,
    grid_columns: int,
    context: Sequence[np.ndarray],
    target_blocks: Sequence[Sequence[np.ndarray]],
) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images must be uint8 (B, 3, H, W) with B >= 1, got {images.dtype} {images.shape}")
    if images.shape[2] % grid_rows or images.shape[3] % grid_columns:
        raise ValueError(
            f"images of {images.shape[2]} x {images.shape[3]} pixels do not divide into "
            f"a grid of {grid_rows} x {grid_columns} patches"
        )
    if not len(images) == len(context) == len(target_blocks):
        raise ValueError(
            f"one context and one list of target blocks an image are needed, got {len(images)} images, "
            f"{len(context)} contexts and {len(target_blocks)} lists of target blocks"
        )


def _patch_mask(indices: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[np.asarray(indices, dtype=np.int64)] = True
    return mask.reshape(grid)


def _to_pixels(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(rows, columns) patches -> (H, W) pixels of an (H, W, 3) image."""
    return mask.repeat(image.shape[0] // mask.shape[0], axis=0).repeat(image.shape[1] // mask.shape[1], axis=1)


def _rgb(block: int) -> np.ndarray:
    colour = BLOCK_COLOURS[block % len(BLOCK_COLOURS)]
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32)


def _tint(image: np.ndarray, where: np.ndarray, colour: np.ndarray, strength: float) -> np.ndarray:
    return np.where(where[..., None], (1 - strength) * image + strength * colour, image)


def _outline(axis: "Axes", mask: np.ndarray, colour: str) -> None:
    """Draw the border of a set of patches, whatever its shape: the sides at which it changes."""
    from matplotlib.collections import LineCollection

    padded = np.pad(mask, 1)
    sides = [((x, y), (x + 1, y)) for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])]
    sides += [((x, y), (x, y + 1)) for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])]
    axis.add_collection(LineCollection(sides, colors=colour, linewidths=2.0, capstyle="projecting", clip_on=False))
