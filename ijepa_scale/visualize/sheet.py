"""A sheet of small pictures in rows and columns, and the words that go beside a PNG."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ijepa_scale.data.files import write_whole
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.visualize.curves import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECTIONS = ("masks", "features", "neighbours", "predictions", "sketches")
MARK = "#D55E00"  # Okabe and Ito's vermilion
DIMMED = 0.35  # of an image's contrast that is left under a heat map
APART, FONT = 0.06, 8  # inches between cells; points
Box = tuple[int, int, int, int]  # top, left, height and width in patches


@dataclass(frozen=True)
class Cell:
    """One small picture: an image, a map over its patches, or both, the map where it is not NaN over the grey image.

    pixels: (H, W, 3), uint8 or floats of 0 to 1. heat: (rows, columns). box: outlined. text: below it.
    """

    pixels: np.ndarray | None = None
    heat: np.ndarray | None = None
    box: Box | None = None
    text: str = ""


@dataclass(frozen=True)
class Bar:
    """What colours of heat maps mean. label: with the unit."""

    label: str
    low: float
    high: float
    colours: str = "viridis"


def describe(path: Path, *, title: str, caption: str, alt: str, section: str, step: int | None) -> None:
    """Write NAME.json beside NAME.png: what a page shows the picture by. step: of the checkpoint, where it is known."""
    assert section in SECTIONS, section
    facts = {"title": title, "caption": caption, "alt": alt, "section": section, "step": step}
    write_whole(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")


def draw_sheet(
    path: Path,
    cells: Sequence[Sequence[Cell]],
    grid: PatchGrid,
    *,
    headings: Mapping[int, str],
    labels: Sequence[str] = (),
    gap_before: int = 0,
    bar: Bar | None = None,
    side: float = 1.0,
) -> None:
    """Write a PNG of rows of cells, all placed by the inch so that no text meets another.

    headings: over these columns, from their left edge on. labels: of the rows. gap_before: a column that stands apart
    from those to its left; 0: none. bar: of all heat maps. side: inches of a cell.
    """
    from matplotlib.figure import Figure

    rows, columns = len(cells), max(map(len, cells))
    lines = max((text.count("\n") + 1 for text in headings.values()), default=0)
    top, below = 0.08 + 0.15 * lines, 0.17 if any(cell.text for row in cells for cell in row) else 0.0
    left, gap = 0.12 + 0.068 * max(map(len, labels), default=0), 0.22 if gap_before else 0.0
    bottom = 0.1 + (0.62 if bar else 0.0)
    high = side * grid.rows / grid.columns
    width = left + columns * (side + APART) + gap + 0.1
    height = top + rows * (high + below + APART) + bottom
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    shown: Any = None
    for row, across in enumerate(cells):
        y = height - top - row * (high + below + APART) - high
        if labels:
            figure.text((left - 0.06) / width, (y + high / 2) / height, labels[row], ha="right", va="center", size=FONT)
        for column, cell in enumerate(across):
            x = left + column * (side + APART) + (gap if column >= gap_before else 0.0)
            axis = figure.add_axes((x / width, y / height, side / width, high / height))
            shown = _draw_cell(axis, cell, grid, bar) or shown
            if row == 0 and column in headings:
                place = (x / width, (height - top + 0.04) / height)
                figure.text(*place, headings[column], ha="left", va="bottom", size=FONT, linespacing=1.15)
    if bar and shown is not None:
        long = min(3.0, width - left - 0.3)
        from matplotlib.ticker import MaxNLocator

        colours = figure.colorbar(
            shown,
            cax=figure.add_axes((left / width, 0.42 / height, long / width, 0.1 / height)),
            orientation="horizontal",
            ticks=MaxNLocator(5),
        )
        colours.set_label(bar.label, size=FONT, labelpad=2)
        colours.ax.tick_params(labelsize=FONT - 1, length=2, pad=2)
    save(figure, path)


def _draw_cell(axis: "Axes", cell: Cell, grid: PatchGrid, bar: Bar | None) -> Any:
    """What a colour bar is made of; None where there is no heat map."""
    from matplotlib.patches import Rectangle

    axis.set(xticks=[], yticks=[], xlim=(0, grid.columns), ylim=(grid.rows, 0))
    axis.spines[:].set(linewidth=0.4, color="0.6")
    place: Any = {"extent": (0, grid.columns, grid.rows, 0), "aspect": "auto", "interpolation": "nearest"}
    shown = None
    if cell.pixels is not None:
        axis.imshow(cell.pixels if cell.heat is None else dimmed(cell.pixels), **place)
    if cell.heat is not None:
        assert bar is not None
        heat = np.ma.masked_invalid(cell.heat)
        shown = axis.imshow(heat, cmap=bar.colours, vmin=bar.low, vmax=bar.high, **place)
    if cell.pixels is None and cell.heat is None:
        axis.set_axis_off()
    if cell.box:
        y, x, height, width = cell.box
        for colour, line in (("white", 2.2), (MARK, 1.3)):  # seen on dark and on light
            axis.add_patch(
                Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=line, clip_on=False, zorder=3)
            )
    if cell.text:
        axis.set_xlabel(cell.text, fontsize=FONT - 1.5, labelpad=2, parse_math=False)
    return shown


def dimmed(pixels_HWC: np.ndarray) -> np.ndarray:
    """A pale grey version of an image, (H, W, 3) floats of 0 to 1, that colours stand out from."""
    pixels = pixels_HWC / 255.0 if pixels_HWC.dtype == np.uint8 else pixels_HWC
    grey = pixels @ np.array([0.299, 0.587, 0.114])  # luminance (ITU-R BT.601)
    return np.repeat(((1 - DIMMED) + DIMMED * grey)[..., None], 3, axis=2)


def upright(images_BCHW: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) -> (B, H, W, 3), as pictures are drawn."""
    return images_BCHW.transpose(0, 2, 3, 1)
