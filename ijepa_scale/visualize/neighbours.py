"""A picture of nearest neighbours: a row a query, the nearest images beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.patches import Rectangle


def draw_neighbours(path: str | Path, rows: Sequence[tuple[np.ndarray, str, Sequence[tuple[np.ndarray, str]]]]) -> None:
    """Write a PNG. rows: (query image, its name, [(neighbour image, its caption)]); images are (3, H, W) uint8."""
    from matplotlib.figure import Figure

    columns = 1 + max(len(nearest) for _, _, nearest in rows)
    figure = Figure(figsize=(1.3 * columns, 1.5 * len(rows) + 0.3), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (query, name, nearest) in zip(axes, rows, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, (image, caption) in zip(row, [(query, name), *nearest], strict=False):
            axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            short = caption if len(caption) <= 20 else caption[:8] + "..." + caption[-9:]
            axis.set_title(short, fontsize=7, parse_math=False)
        row[0].add_patch(_frame(query))
    figure.savefig(path, format="png")


def _frame(image: np.ndarray) -> "Rectangle":
    from matplotlib.patches import Rectangle

    height, width = image.shape[1:]
    return Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor="#D55E00", linewidth=3, clip_on=False)
