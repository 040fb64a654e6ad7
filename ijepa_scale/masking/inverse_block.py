"""Inverse block masking: small blocks of patches stay visible, all else is hidden (data2vec 2.0, arXiv:2212.07525)."""

import numpy as np

from ijepa_scale.masking.grid import PatchGrid

MORE = 0.07  # of all patches, that blocks are drawn for beyond those asked for: they overlap, and reach over the edge


def visible_patches(grid: PatchGrid, visible: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """The patches of an image that stay visible, (visible,) int64 in raster order, in squares of side x side patches.

    As section 3 of the paper has it: (visible + MORE * N) / side**2 starting points without replacement, at least one,
    each widened to a square about it as far as the grid goes; then single patches are hidden or shown, at random, until
    there are as many as asked for. Squares of side 1 are random masks.
    """
    points = max(1, round((visible + MORE * grid.num_patches) / side**2))
    rows, columns = np.divmod(rng.random(grid.num_patches).argsort()[:points], grid.columns)
    shown = np.zeros(grid.shape, dtype=bool)
    for top, left in zip(rows - side // 2, columns - side // 2, strict=True):
        shown[max(0, top) : top + side, max(0, left) : left + side] = True
    # In random order, those in squares first.
    order = (rng.random(grid.num_patches) + ~shown.reshape(-1)).argsort()
    return np.sort(order[:visible])
