"""The patch grid of an image, and the patch indices of a block on it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PatchGrid:
    """Rows and columns of patches; a patch's index is row * columns + column."""

    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    def block(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Patch indices of a block in raster order, (height * width,) int64."""
        rows = np.arange(top, top + height)[:, None] * self.columns
        return (rows + np.arange(left, left + width)).reshape(-1)
