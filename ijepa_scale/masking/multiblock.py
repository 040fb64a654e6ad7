"""Multi-block masking: M target blocks and a context block for each image (I-JEPA, arXiv:2301.08243, section 3)."""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ijepa_scale.masking.grid import PatchGrid

MAX_DRAWS = 1000  # layouts tried for one image before giving up; check_feasible() makes reaching it all but impossible


@dataclass(frozen=True, kw_only=True)
class MultiBlock:
    """What is drawn. Scales are areas relative to the grid, aspect ratios are height / width."""

    grid: PatchGrid
    num_target_blocks: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_keep: int = 10
    reference_compat: bool = False

    def __post_init__(self) -> None:
        if min(self.grid.rows, self.grid.columns) < 2:
            raise ValueError(
                f"a {self.grid.rows} x {self.grid.columns} patch grid is too small to mask; "
                "use larger images (data.image_size) or smaller patches (model.patch_size)"
            )


@dataclass(frozen=True)
class BlockSizes:
    """Height and width, in patches, shared by all images of a step."""

    target: tuple[int, int]
    context: tuple[int, int]


@dataclass(frozen=True)
class ImageBlocks:
    """One image's blocks. context: (n,) patch indices less all target blocks; target_blocks: (M, K) patch indices."""

    context: np.ndarray
    target_blocks: np.ndarray


def _block_size(grid: PatchGrid, area: int, aspect_ratio: float) -> tuple[int, int]:
    height, width = round(math.sqrt(area * aspect_ratio)), round(math.sqrt(area / aspect_ratio))
    # A side is at most the grid's less one, so that no block is the whole image (as the reference).
    return max(1, min(height, grid.rows - 1)), max(1, min(width, grid.columns - 1))


def block_sizes(spec: MultiBlock, rng: np.random.Generator) -> BlockSizes:
    """One draw a step, the same for all ranks: every micro-batch's loss then averages over as many target tokens.

    Scale and aspect ratio are drawn apart; the reference (reference_compat) uses one random number for both.
    """
    u_scale, u_aspect, u_context = rng.random(3)
    if spec.reference_compat:
        u_aspect = u_scale
    low, high = spec.target_scale
    flat, tall = spec.target_aspect_ratio
    area = int(spec.grid.num_patches * (low + u_scale * (high - low)))
    target = _block_size(spec.grid, area, flat + u_aspect * (tall - flat))
    low, high = spec.context_scale
    area = int(spec.grid.num_patches * (low + u_context * (high - low)))
    return BlockSizes(target, _block_size(spec.grid, area, 1.0))


def _places(spec: MultiBlock, size: tuple[int, int]) -> tuple[int, int]:
    """Numbers of legal top and left positions; the reference never uses the last of each."""
    compat = 1 if spec.reference_compat else 0
    return spec.grid.rows - size[0] + 1 - compat, spec.grid.columns - size[1] + 1 - compat


def place_blocks(spec: MultiBlock, sizes: BlockSizes, rng: np.random.Generator) -> ImageBlocks:
    """One image's blocks, each uniform over its legal positions, given that the context keeps min_keep patches.

    Raises ValueError when no layout of MAX_DRAWS keeps enough context.
    """
    grid = spec.grid
    tops, lefts = _places(spec, sizes.target)
    context_tops, context_lefts = _places(spec, sizes.context)
    offsets = grid.block(0, 0, *sizes.target)
    for _ in range(MAX_DRAWS):
        corners = rng.integers(0, tops, spec.num_target_blocks) * grid.columns + rng.integers(
            0, lefts, spec.num_target_blocks
        )
        target_blocks = corners[:, None] + offsets
        visible = np.zeros(grid.num_patches, dtype=bool)
        top, left = int(rng.integers(0, context_tops)), int(rng.integers(0, context_lefts))
        visible[grid.block(top, left, *sizes.context)] = True
        visible[target_blocks] = False
        context = np.flatnonzero(visible)
        if context.size >= spec.min_keep:
            return ImageBlocks(context, target_blocks)
    raise ValueError(
        f"no layout in {MAX_DRAWS} leaves {spec.min_keep} context patches on the {grid.rows} x {grid.columns} grid; "
        "lower mask.min_keep, mask.target_scale or mask.num_target_blocks"
    )


def _area_shares(grid: PatchGrid, scale: tuple[float, float]) -> dict[int, float]:
    """The areas, in patches, that a scale drawn from [low, high) gives, and how often each."""
    low, high = (grid.num_patches * side for side in scale)
    areas = range(int(low), max(int(low) + 1, math.ceil(high)))
    return {area: (min(area + 1, high) - max(area, low)) / (high - low) if high > low else 1.0 for area in areas}


def _target_sizes(spec: MultiBlock, area: int) -> dict[tuple[int, int], float]:
    """Every size a target block of that area can have, and how often: its sides' rounding changes at some ratios."""
    low, high = (spec.grid.num_patches * side for side in spec.target_scale)
    flat, tall = spec.target_aspect_ratio
    if spec.reference_compat and high > low:  # an area comes with its own slice of aspect ratios
        ends = (min(max((end - low) / (high - low), 0.0), 1.0) for end in (area, area + 1))
        flat, tall = (flat + u * (tall - flat) for u in ends)
    halves = [(side + 0.5) ** 2 for side in range(max(spec.grid.rows, spec.grid.columns))]
    changes = [ratio for half in halves for ratio in (half / max(area, 1), area / half) if flat < ratio < tall]
    sizes: defaultdict[tuple[int, int], float] = defaultdict(float)
    for a, b in pairwise(sorted([flat, *changes, tall])):
        sizes[_block_size(spec.grid, area, (a + b) / 2)] += (b - a) / (tall - flat) if tall > flat else 1.0
    return dict(sizes)


def size_shares(spec: MultiBlock) -> dict[BlockSizes, float]:
    """Every pair of sizes that block_sizes() can draw, and how often it does."""
    targets: defaultdict[tuple[int, int], float] = defaultdict(float)
    contexts: defaultdict[tuple[int, int], float] = defaultdict(float)
    for area, share in _area_shares(spec.grid, spec.target_scale).items():
        for size, part in _target_sizes(spec, area).items():
            targets[size] += share * part
    for area, share in _area_shares(spec.grid, spec.context_scale).items():
        contexts[_block_size(spec.grid, area, 1.0)] += share
    return {
        BlockSizes(target, context): targets[target] * contexts[context] for target in targets for context in contexts
    }


def expected_shares(spec: MultiBlock) -> tuple[np.ndarray, np.ndarray]:
    """How often each patch is context, and how often it is in a target block, each (rows, columns): exactly.

    Over all sizes and places, those included that keep fewer than min_keep patches and are drawn again.
    """
    context, target = np.zeros(spec.grid.shape), np.zeros(spec.grid.shape)
    for sizes, share in size_shares(spec).items():
        tops, lefts = _places(spec, sizes.target)
        context_tops, context_lefts = _places(spec, sizes.context)
        free = (1 - _covered(spec.grid, sizes.target, tops, lefts)) ** spec.num_target_blocks
        target += share * (1 - free)
        context += share * free * _covered(spec.grid, sizes.context, context_tops, context_lefts)
    return context, target


def _covered(grid: PatchGrid, size: tuple[int, int], tops: int, lefts: int) -> np.ndarray:
    """How often each patch is in a block that begins in any of the first `tops` rows and `lefts` columns alike."""
    shares = []
    for length, side, places in ((grid.rows, size[0], tops), (grid.columns, size[1], lefts)):
        lines, starts = np.arange(length)[:, None], np.arange(places)
        shares.append(((starts <= lines) & (lines < starts + side)).mean(axis=1))
    return np.outer(*shares)


def check_feasible(spec: MultiBlock, *, layouts: int = 32) -> None:
    """Refuse, before training, a grid on which min_keep cannot be met, or so rarely that sampling would crawl.

    Raises ValueError naming the largest min_keep that works.
    """
    rng = np.random.Generator(np.random.Philox(key=0))
    name = f"mask.min_keep {spec.min_keep} on the {spec.grid.rows} x {spec.grid.columns} patch grid"
    sizes = sorted(size_shares(spec), key=lambda pair: (pair.target, pair.context))
    smallest_target = min(pair.target[0] * pair.target[1] for pair in sizes)
    free = replace(spec, min_keep=0)
    # In every size at least half of the layouts must do: then MAX_DRAWS is never reached (1 in 2**1000).
    median_context = min(
        sorted(place_blocks(free, pair, rng).context.size for _ in range(layouts))[layouts // 2 - 1] for pair in sizes
    )
    largest = min(smallest_target, median_context)
    if spec.min_keep > largest:
        what = (
            f"a target block can be as small as {smallest_target}"
            if smallest_target <= median_context
            else f"half of the layouts leave at most {median_context} for the context"
        )
        hint = f"mask.min_keep <= {largest}" if largest >= 1 else "fewer mask.num_target_blocks"
        raise ValueError(f"{name} cannot be met: {what}; use {hint}, larger images or smaller patches")
