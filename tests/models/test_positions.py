import math

import pytest
import torch

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.positions import resized_pos_embed, sincos_pos_embed


@pytest.mark.parametrize("width, rows, columns", [(4, 1, 1), (8, 2, 3), (192, 14, 14), (24, 5, 2), (1280, 3, 4)])
def test_position_embedding_is_the_published_formula(width, rows, columns):
    table = sincos_pos_embed(width, PatchGrid(rows, columns))
    assert table.shape == (rows * columns, width) and table.dtype == torch.float32
    quarter = width // 4
    expected = []
    for row in range(rows):
        for column in range(columns):
            vector = []
            for position in (column, row):  # the first half of the width encodes the column
                angles = [position / 10000 ** (k / quarter) for k in range(quarter)]
                vector += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            expected.append(vector)
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=1e-7)


def test_a_grid_of_its_own_is_not_touched_and_bf16_is_resized_in_fp32():
    """Against transformers: test_intermediate.py."""
    grid = PatchGrid(4, 6)
    stored = sincos_pos_embed(8, grid)[None]
    assert resized_pos_embed(stored, grid, PatchGrid(4, 6)) is stored
    wider = resized_pos_embed(stored.bfloat16(), grid, PatchGrid(4, 12))
    assert wider.shape == (1, 48, 8) and wider.dtype == torch.float32
    assert torch.equal(wider, resized_pos_embed(stored.bfloat16().float(), grid, PatchGrid(4, 12)))
    rows = wider.unflatten(1, (4, 12))
    assert (rows[..., 4:] - rows[:, :, :1, 4:]).abs().max() < 1e-6  # the half of the rows' positions: alike along one
