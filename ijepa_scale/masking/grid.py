"""The patch grid of an image, and the patch indices of a block on it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PatchGrid:
    """Rows and columns of patches; a patch's index is row * columns + column."""

    rows: int
    columns: int

    @classmethod
    def of_image(cls, height: int, width: int, patch_size: int) -> "PatchGrid":
        """The grid of an image of height x width pixels. ValueError for sides that are not multiples of the patch."""
        if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
            raise ValueError(
                f"an image's sides must be multiples of the patch, {patch_size} pixels, got {height} x {width}; resize "
                "or crop it"
            )
        return cls(height // patch_size, width // patch_size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    def block(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Patch indices of a block in raster order, (height * width,) int64."""
        rows = np.arange(top, top + height)[:, None] * self.columns
        return (rows + np.arange(left, left + width)).reshape(-1)
