import numpy as np
import pytest

from ijepa_scale.data.order import generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.inverse_block import visible_patches

SQUARE, FLAT = PatchGrid(8, 8), PatchGrid(3, 14)


def naive(grid, visible, side, rng):
    """Patch by patch: which squares of which starting points hold it, then one at a time hidden or shown."""
    first, second = rng.random(grid.num_patches).tolist(), rng.random(grid.num_patches).tolist()
    points = sorted(range(grid.num_patches), key=first.__getitem__)
    points = points[: max(1, round((visible + 0.07 * grid.num_patches) / side**2))]
    shown = set()
    for patch in range(grid.num_patches):
        for point in points:
            down = patch // grid.columns - point // grid.columns + side // 2
            right = patch % grid.columns - point % grid.columns + side // 2
            if 0 <= down < side and 0 <= right < side:
                shown.add(patch)
    while len(shown) > visible:
        shown.remove(max(shown, key=second.__getitem__))
    while len(shown) < visible:
        shown.add(min(set(range(grid.num_patches)) - shown, key=second.__getitem__))
    return sorted(shown)


@pytest.mark.parametrize("side", [1, 2, 3, 9])
@pytest.mark.parametrize("grid, visible", [(SQUARE, 13), (SQUARE, 1), (SQUARE, 63), (FLAT, 8), (PatchGrid(1, 2), 1)])
def test_it_is_what_one_patch_at_a_time_gives(grid, visible, side):
    for key in range(20):
        patches = visible_patches(grid, visible, side, generator_for(1, key))
        assert patches.dtype == np.int64 and len(patches) == visible
        assert patches.tolist() == naive(grid, visible, side, generator_for(1, key))


def adjacent(patches):
    shown = np.zeros(SQUARE.num_patches, dtype=int)
    shown[patches] = 1
    shown = shown.reshape(SQUARE.shape)
    return (shown[1:] * shown[:-1]).sum() + (shown[:, 1:] * shown[:, :-1]).sum()


def test_squares_lie_together_and_single_patches_anywhere():
    drawn = {side: [visible_patches(SQUARE, 13, side, generator_for(2, key)) for key in range(400)] for side in (1, 3)}
    pairs = {side: np.mean([adjacent(patches) for patches in found]) for side, found in drawn.items()}
    assert pairs[1] == pytest.approx(112 * 13 * 12 / (64 * 63), rel=0.1) and pairs[3] > 2 * pairs[1]
    share = {side: np.bincount(np.concatenate(found), minlength=64) / 400 for side, found in drawn.items()}
    assert np.abs(share[1] - 13 / 64).max() < 4.5 * (13 / 64 * 51 / 64 / 400) ** 0.5
    assert share[3].min() > 0.03  # corners are in fewer squares
