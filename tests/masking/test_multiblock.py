import functools
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from ijepa_scale.data.order import generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import (
    BlockSizes,
    MultiBlock,
    block_sizes,
    check_feasible,
    expected_shares,
    place_blocks,
    size_shares,
)

PAPER_GRID = PatchGrid(16, 16)  # 224 pixels in patches of 14


@functools.cache
def context_lengths(compat, steps=400, batch=128):
    """(steps, batch): context tokens of each image, before any cut."""
    spec = MultiBlock(grid=PAPER_GRID, reference_compat=compat)
    lengths = np.empty((steps, batch))
    for step in range(steps):
        sizes, rng = block_sizes(spec, generator_for(0, step)), generator_for(1, step)
        lengths[step] = [place_blocks(spec, sizes, rng).context.size for _ in range(batch)]
    return lengths


@pytest.mark.parametrize("compat, mean, mean_of_minimum", [(True, 110.5, 70.0), (False, 108.0, 68.5)])
def test_context_lengths_at_the_published_settings(compat, mean, mean_of_minimum):
    """The reference implementation keeps 110.5 patches an image, and 70 after its cut, in batches of 128."""
    lengths = context_lengths(compat)
    assert abs(lengths.mean() - mean) < 2
    assert abs(lengths.min(axis=1).mean() - mean_of_minimum) < 2


def chi_square_is_small(counts, expected):
    """Below the mean of the chi-square distribution plus 5 of its standard deviations."""
    freedom = counts.size - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def corners(grid, block):
    """Top, left, height, width of a block, which must be a rectangle."""
    rows, columns = np.divmod(block, grid.columns)
    top, left, height, width = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
    assert block.tolist() == [(top + r) * grid.columns + left + c for r in range(height) for c in range(width)]
    return int(top), int(left), int(height), int(width)


@pytest.mark.parametrize("grid", [PatchGrid(7, 7), PatchGrid(6, 9)])
@pytest.mark.parametrize("compat", [False, True])
def test_target_places_are_uniform_over_the_legal_ones(grid, compat):
    """min_keep 0 rejects no layout, so each block is uniform by itself."""
    sizes = BlockSizes(target=(3, 2), context=(2, 2))
    spec = MultiBlock(grid=grid, min_keep=0, num_target_blocks=2, reference_compat=compat)
    rng = generator_for(2, compat, grid.rows)
    counts = np.zeros((2, grid.rows, grid.columns), dtype=int)
    for _ in range(6000):
        for block, target in enumerate(place_blocks(spec, sizes, rng).target_blocks):
            counts[block][corners(grid, target)[:2]] += 1
    legal = counts[:, : grid.rows - 3 + (not compat), : grid.columns - 2 + (not compat)]
    assert counts.sum() == legal.sum() == 2 * 6000
    for block in legal:
        assert chi_square_is_small(block, 6000 / block.size)


@pytest.mark.parametrize("compat", [False, True])
def test_context_places_are_uniform(compat):
    """A 1 x 1 target hides one patch of the context block at most: its place can always be told."""
    grid, sizes = PatchGrid(6, 8), BlockSizes(target=(1, 1), context=(3, 4))
    spec = MultiBlock(grid=grid, min_keep=0, num_target_blocks=1, reference_compat=compat)
    rng, draws = generator_for(3, compat), 6000
    counts = np.zeros((6, 8), dtype=int)
    for _ in range(draws):
        placed = place_blocks(spec, sizes, rng)
        tops, lefts = np.divmod(placed.context, grid.columns)
        assert np.ptp(tops) == 2 and np.ptp(lefts) == 3 and placed.context.size in (11, 12)
        counts[tops.min(), lefts.min()] += 1
    legal = counts[: 3 + (not compat), : 4 + (not compat)]
    assert counts.sum() == legal.sum()
    assert chi_square_is_small(legal, draws / legal.size)


@pytest.mark.parametrize("compat", [False, True])
def test_only_the_default_reaches_the_last_row_and_column(compat):
    spec = MultiBlock(grid=PAPER_GRID, reference_compat=compat)
    hit = np.zeros((2, 16, 16), dtype=bool)
    for step in range(100):
        sizes, rng = block_sizes(spec, generator_for(0, step)), generator_for(1, step)
        for _ in range(8):
            placed = place_blocks(spec, sizes, rng)
            hit[0].flat[placed.target_blocks] = True
            hit[1].flat[placed.context] = True
    for seen in hit:
        assert seen[:15, :15].all()
        assert seen[15].any() == seen[:, 15].any() == (not compat)
        assert seen[15, 15] == (not compat)


def covered_in_one_dimension(length, side, places):
    """Probability that a block of that side covers each position, if its start is uniform over the first places."""
    return np.array([sum(start <= i < start + side for start in range(places)) / places for i in range(length)])


@pytest.mark.parametrize("compat", [False, True])
def test_coverage_by_a_target_block_is_the_analytic_one(compat):
    grid, sizes = PatchGrid(9, 7), BlockSizes(target=(3, 4), context=(7, 6))
    spec = MultiBlock(grid=grid, min_keep=0, reference_compat=compat)
    rng, layouts = generator_for(4, compat), 4000
    covered = np.zeros(grid.num_patches)
    for _ in range(layouts):
        np.add.at(covered, place_blocks(spec, sizes, rng).target_blocks, 1)
    rows = covered_in_one_dimension(9, 3, 9 - 3 + (not compat))
    columns = covered_in_one_dimension(7, 4, 7 - 4 + (not compat))
    expected = np.outer(rows, columns).ravel()
    blocks = layouts * spec.num_target_blocks
    noise = np.sqrt(expected * (1 - expected) / blocks)
    assert (np.abs(covered / blocks - expected) <= 5 * noise).all()
    assert expected[0] > 0 and (expected[-1] > 0) == (not compat)


SPECS = [
    MultiBlock(grid=PAPER_GRID),
    MultiBlock(grid=PAPER_GRID, reference_compat=True),
    MultiBlock(grid=PatchGrid(14, 14)),
    MultiBlock(grid=PatchGrid(8, 8), min_keep=4),
    MultiBlock(grid=PatchGrid(8, 8), min_keep=4, reference_compat=True),
    MultiBlock(grid=PatchGrid(7, 11), min_keep=3, num_target_blocks=2),
    MultiBlock(grid=PatchGrid(20, 5), min_keep=5, num_target_blocks=1, target_scale=(0.3, 0.3)),
    MultiBlock(grid=PatchGrid(28, 28), num_target_blocks=6, target_scale=(0.05, 0.1), context_scale=(0.4, 1.0)),
    MultiBlock(grid=PatchGrid(3, 3), min_keep=1, num_target_blocks=1),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_layout_is_sound(spec):
    grid = spec.grid
    check_feasible(spec)
    for step in range(60):
        sizes, rng = block_sizes(spec, generator_for(0, step)), generator_for(1, step)
        for _ in range(4):
            placed = place_blocks(spec, sizes, rng)
            assert placed.target_blocks.shape == (spec.num_target_blocks, sizes.target[0] * sizes.target[1])
            assert placed.target_blocks.shape[1] >= spec.min_keep
            for block in placed.target_blocks:
                top, left, height, width = corners(grid, block)
                assert (height, width) == sizes.target
                assert top + height <= grid.rows and left + width <= grid.columns
            assert placed.context.size >= spec.min_keep
            assert (np.diff(placed.context) > 0).all()
            assert placed.context[0] >= 0 and placed.context[-1] < grid.num_patches
            assert not np.intersect1d(placed.context, placed.target_blocks).size
            rows, columns = np.divmod(placed.context, grid.columns)
            assert np.ptp(rows) < sizes.context[0] and np.ptp(columns) < sizes.context[1]


def test_the_context_is_its_block_less_the_targets_and_nothing_else():
    """With targets in the left half only, the right half of a context block of known place is whole."""
    grid = PatchGrid(6, 6)
    sizes = BlockSizes(target=(2, 2), context=(5, 5))
    spec = MultiBlock(grid=grid, min_keep=0, num_target_blocks=3)
    rng = generator_for(6)
    for _ in range(300):
        placed = place_blocks(spec, sizes, rng)
        hidden = set(placed.target_blocks.ravel().tolist())
        candidates = [
            set(grid.block(top, left, 5, 5).tolist()) - hidden for top, left in itertools.product(range(2), repeat=2)
        ]
        assert set(placed.context.tolist()) in candidates


def test_sizes_follow_scale_and_aspect_ratio():
    spec = MultiBlock(grid=PatchGrid(64, 64))
    sizes = [block_sizes(spec, generator_for(0, step)) for step in range(4000)]
    areas = np.array([height * width for height, width in (pair.target for pair in sizes)]) / 64**2
    ratios = np.array([height / width for height, width in (pair.target for pair in sizes)])
    assert 0.14 < areas.min() < 0.155 and 0.195 < areas.max() < 0.21 and abs(areas.mean() - 0.175) < 0.002
    assert 0.7 < ratios.min() < 0.8 and 1.4 < ratios.max() < 1.6 and abs(ratios.mean() - 1.125) < 0.02
    assert abs(np.corrcoef(areas, ratios)[0, 1]) < 0.1  # drawn apart
    heights, widths = np.array([pair.context for pair in sizes]).T
    assert (heights == widths).all() and heights.max() == 63 and heights.min() == round(math.sqrt(0.85 * 64**2))

    spec = MultiBlock(grid=PatchGrid(64, 64), reference_compat=True)
    compat = [block_sizes(spec, generator_for(0, step)).target for step in range(400)]
    areas, ratios = zip(*((height * width, height / width) for height, width in compat), strict=True)
    assert np.corrcoef(areas, ratios)[0, 1] > 0.95  # one random number for both


@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (14, 14), (28, 28), (9, 23), (2, 9), (37, 37)])
@pytest.mark.parametrize("compat", [False, True])
def test_size_shares_are_how_often_each_is_drawn(grid, compat):
    spec = MultiBlock(grid=PatchGrid(*grid), reference_compat=compat)
    listed, rng = size_shares(spec), generator_for(7)
    drawn = Counter(block_sizes(spec, rng) for _ in range(8000))
    assert set(drawn) <= set(listed) and sum(listed.values()) == pytest.approx(1.0)
    assert len(drawn) > 0.9 * len(listed)  # the rest are slivers of the range
    for sizes, share in listed.items():
        assert abs(drawn[sizes] / 8000 - share) <= 5 * math.sqrt(share * (1 - share) / 8000) + 1e-3


@pytest.mark.parametrize("compat", [False, True])
def test_expected_shares_are_those_of_all_layouts(compat):
    """Brute force: every size, every place of two target blocks and of the context block."""
    spec = MultiBlock(grid=PatchGrid(4, 5), num_target_blocks=2, min_keep=0, reference_compat=compat)
    context, target = np.zeros(20), np.zeros(20)
    for sizes, share in size_shares(spec).items():
        cut = 1 if compat else 0
        places = [
            [spec.grid.block(top, left, *size) for top in range(5 - size[0] - cut) for left in range(6 - size[1] - cut)]
            for size in (sizes.target, sizes.target, sizes.context)
        ]
        layouts = list(itertools.product(*places))
        for *targets, whole in layouts:
            hidden = np.isin(np.arange(20), targets)
            seen = np.isin(np.arange(20), whole) & ~hidden
            target += share / len(layouts) * hidden
            context += share / len(layouts) * seen
    for found, exact in zip(expected_shares(spec), (context, target), strict=True):
        np.testing.assert_allclose(found.reshape(-1), exact, atol=1e-12)


@pytest.mark.parametrize("compat", [False, True])
def test_expected_shares_are_those_of_drawn_layouts(compat, draws=3000):
    spec = MultiBlock(grid=PatchGrid(9, 7), min_keep=1, reference_compat=compat)
    counted = np.zeros((2, 63))
    for draw in range(draws):
        placed = place_blocks(spec, block_sizes(spec, generator_for(3, draw)), generator_for(4, draw))
        counted[0, placed.context] += 1
        counted[1, np.unique(placed.target_blocks)] += 1
    for found, exact in zip(counted.reshape(2, 9, 7) / draws, expected_shares(spec), strict=True):
        assert (np.abs(found - exact) <= 5 * np.sqrt(exact * (1 - exact) / draws) + 1e-9).all()
        assert np.ptp(exact) > 0.1  # what the tolerance, at most 0.046, is to be compared with


def test_same_generator_same_blocks():
    spec = MultiBlock(grid=PAPER_GRID)

    def draw(*key):
        sizes = block_sizes(spec, generator_for(0, *key))
        placed = place_blocks(spec, sizes, generator_for(1, *key))
        return sizes, placed.context.tolist(), placed.target_blocks.tolist()

    assert draw(5, 3) == draw(5, 3)
    assert len({str(draw(5, position)) for position in range(50)}) == 50


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("side", [3, 4, 5, 6, 7, 8])
def test_an_infeasible_grid_is_refused_and_the_advice_works(side, compat):
    """The 8 x 8 grid with min_keep 10 is what the reference loops for ever on."""
    spec = MultiBlock(grid=PatchGrid(side, side), min_keep=10, reference_compat=compat)
    with pytest.raises(
        ValueError, match=rf"mask.min_keep 10 on the {side} x {side} patch grid cannot be met"
    ) as caught:
        check_feasible(spec)
    works = int(str(caught.value).split("mask.min_keep <= ")[1].split(",")[0])
    assert 1 <= works < 10
    for min_keep in range(1, works + 1):
        good = MultiBlock(grid=spec.grid, min_keep=min_keep, reference_compat=compat)
        check_feasible(good)
        rng = generator_for(8, side)
        for sizes in size_shares(good):
            assert sizes.target[0] * sizes.target[1] >= min_keep
            for _ in range(30):
                assert place_blocks(good, sizes, rng).context.size >= min_keep
    with pytest.raises(ValueError, match="cannot be met"):
        check_feasible(MultiBlock(grid=spec.grid, min_keep=works + 1, reference_compat=compat))


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("grid", [(11, 11), (14, 14), (16, 16), (28, 28), (9, 23)])
def test_the_default_min_keep_works_on_larger_grids(grid, compat):
    check_feasible(MultiBlock(grid=PatchGrid(*grid), reference_compat=compat))


def test_a_grid_that_no_min_keep_suits_is_refused():
    with pytest.raises(ValueError, match=r"2 x 2 patch grid cannot be met.*use fewer mask.num_target_blocks, larger"):
        check_feasible(MultiBlock(grid=PatchGrid(2, 2), min_keep=1))


def test_too_many_target_blocks_are_refused():
    with pytest.raises(ValueError, match="leave at most"):
        check_feasible(MultiBlock(grid=PatchGrid(8, 8), min_keep=8, num_target_blocks=30))


def test_placing_gives_up_rather_than_hang():
    spec = MultiBlock(grid=PatchGrid(4, 4), min_keep=17)
    with pytest.raises(ValueError, match=r"leaves 17 context patches on the 4 x 4 grid; lower mask.min_keep"):
        place_blocks(spec, BlockSizes((2, 2), (3, 3)), generator_for(9))


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 8), (8, 1)])
def test_a_grid_of_one_row_is_refused(rows, columns):
    with pytest.raises(ValueError, match=rf"{rows} x {columns} patch grid is too small to mask"):
        MultiBlock(grid=PatchGrid(rows, columns))
