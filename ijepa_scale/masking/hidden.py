"""A fixed number of hidden patches of an image: at random, or in blocks. (n,) int64 patch indices in raster order."""

import math

import numpy as np

from ijepa_scale.masking.grid import PatchGrid

LEAST_BLOCK = 16 / 196  # area of a block / area of the patch grid, and a block's aspect ratios: as in BEiT
FLATTEST, TALLEST = 0.3, 1 / 0.3


def random_patches(grid: PatchGrid, hidden: int, rng: np.random.Generator) -> np.ndarray:
    """So many patches, each choice of them as likely as any other (MAE, arXiv:2111.06377, section 3)."""
    return np.sort(_some(np.arange(grid.num_patches), hidden, rng))


def block_patches(grid: PatchGrid, hidden: int, rng: np.random.Generator) -> np.ndarray:
    """So many patches in blocks that are drawn until these hold enough (BEiT, arXiv:2106.08254, algorithm 1).

    There the last block may hide more than was asked for; here it keeps a random part, so that all images hide as many.
    hidden: fewer than the grid has.
    """
    assert hidden < grid.num_patches
    is_hidden = np.zeros(grid.num_patches, dtype=bool)
    while missing := hidden - int(is_hidden.sum()):
        least = LEAST_BLOCK * grid.num_patches
        area = least + rng.random() * max(0.0, missing - least)
        ratio = math.exp(math.log(FLATTEST) + rng.random() * math.log(TALLEST / FLATTEST))
        height = max(1, min(grid.rows, round(math.sqrt(area * ratio))))
        width = max(1, min(grid.columns, round(math.sqrt(area / ratio))))
        top = int(rng.random() * (grid.rows - height + 1))
        left = int(rng.random() * (grid.columns - width + 1))
        block = grid.block(top, left, height, width)
        is_hidden[_some(block[~is_hidden[block]], missing, rng)] = True
    return np.flatnonzero(is_hidden)


def _some(patches: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A random choice of at most so many of them, in any order."""
    return patches[np.argsort(rng.random(len(patches)), kind="stable")[:count]]
