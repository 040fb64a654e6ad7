import pytest

from ijepa_scale.masking.grid import PatchGrid


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (5, 3), (14, 14)])
def test_a_block_is_its_patches_in_raster_order(rows, columns):
    grid = PatchGrid(rows, columns)
    assert grid.num_patches == rows * columns
    number = iter(range(rows * columns))
    table = [[next(number) for _ in range(columns)] for _ in range(rows)]
    for top in range(rows):
        for left in range(columns):
            for height in range(1, rows - top + 1):
                for width in range(1, columns - left + 1):
                    naive = [table[r][c] for r in range(top, top + height) for c in range(left, left + width)]
                    assert grid.block(top, left, height, width).tolist() == naive


def test_the_grid_of_an_image():
    assert PatchGrid.of_image(28, 42, 14) == PatchGrid(2, 3) and PatchGrid(2, 3).shape == (2, 3)
    for height, width in ((28, 40), (27, 42), (0, 42), (14, 7)):
        with pytest.raises(ValueError, match=f"multiples of the patch, 14 pixels, got {height} x {width}"):
            PatchGrid.of_image(height, width, 14)
