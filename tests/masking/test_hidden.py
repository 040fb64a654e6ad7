import numpy as np
import pytest

from ijepa_scale.data.order import generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.hidden import block_patches, random_patches

SQUARE, FLAT = PatchGrid(8, 8), PatchGrid(3, 14)


def neighbours(grid, hidden):
    """Pairs of adjacent patches that are both hidden."""
    mask = np.zeros(grid.num_patches, dtype=int)
    mask[hidden] = 1
    mask = mask.reshape(grid.shape)
    return (mask[1:] * mask[:-1]).sum() + (mask[:, 1:] * mask[:, :-1]).sum()


@pytest.mark.parametrize("draw", [random_patches, block_patches])
@pytest.mark.parametrize("grid, hidden", [(SQUARE, 48), (SQUARE, 32), (SQUARE, 1), (FLAT, 41), (PatchGrid(1, 2), 1)])
def test_as_many_as_asked_for_each_once_in_order(draw, grid, hidden):
    for key in range(50):
        patches = draw(grid, hidden, generator_for(1, key))
        assert patches.dtype == np.int64 and patches.size == hidden
        assert (np.diff(patches) > 0).all() and patches.min() >= 0 and patches.max() < grid.num_patches
        assert np.array_equal(patches, draw(grid, hidden, generator_for(1, key)))


def test_at_random_every_patch_and_every_pair_is_hidden_as_often():
    drawn = np.zeros((2000, 16))
    for key, row in enumerate(drawn):
        row[random_patches(PatchGrid(4, 4), 12, generator_for(2, key))] = 1
    assert np.abs(drawn.mean(0) - 0.75).max() < 5 * (0.75 * 0.25 / 2000) ** 0.5
    together = (drawn.T @ drawn / 2000)[~np.eye(16, dtype=bool)]
    expected = 12 * 11 / (16 * 15)
    assert np.abs(together - expected).max() < 5 * (expected * (1 - expected) / 2000) ** 0.5


def test_in_blocks_hidden_patches_lie_side_by_side_and_anywhere():
    at_random, in_blocks = (
        [draw(SQUARE, 32, generator_for(3, key)) for key in range(300)] for draw in (random_patches, block_patches)
    )
    pairs = [np.mean([neighbours(SQUARE, hidden) for hidden in drawn]) for drawn in (at_random, in_blocks)]
    assert pairs[0] == pytest.approx(112 * 32 * 31 / (64 * 63), rel=0.05) and pairs[1] > 1.4 * pairs[0]
    share = np.bincount(np.concatenate(in_blocks), minlength=64) / 300
    assert share.min() > 0.07 and share.max() < 0.93  # corners are in few blocks, the middle in many
