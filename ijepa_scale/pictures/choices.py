"""A patch and a box as they are typed."""

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.visualize.sheet import Box


def patch_of(text: str, grid: PatchGrid) -> int | None:
    """The index of a patch given as ROW,COL; None where none is given."""
    if not text:
        return None
    row, column = _numbers("--patch", text, "ROW,COL")
    if not (0 <= row < grid.rows and 0 <= column < grid.columns):
        raise ValueError(
            f"--patch {text} is outside the grid of {grid.rows} x {grid.columns} patches: rows are 0..{grid.rows - 1}, "
            f"columns 0..{grid.columns - 1}"
        )
    return row * grid.columns + column


def box_of(text: str, grid: PatchGrid) -> Box | None:
    """A box given as ROW,COL,HEIGHT,WIDTH; None where none is given."""
    if not text:
        return None
    top, left, height, width = _numbers("--box", text, "ROW,COL,HEIGHT,WIDTH")
    inside = top >= 0 <= left and height >= 1 <= width and top + height <= grid.rows and left + width <= grid.columns
    if not inside or height * width == grid.num_patches:
        raise ValueError(
            f"--box {text} (row, column, height, width) must lie in the grid of {grid.rows} x {grid.columns} patches "
            "and leave some of it; rows and columns count from 0"
        )
    return top, left, height, width


def _numbers(option: str, text: str, form: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != form.count(",") + 1:
        raise ValueError(f"{option} wants {form} in whole numbers with commas between, got {text!r}")
    return numbers
