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
