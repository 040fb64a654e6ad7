"""Masks are pure functions of the step and the positions, drawn as masking's functions say."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from ijepa_scale.data.order import BLOCKS, CONTEXT, SIZES, generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.inverse_block import visible_patches
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes, place_blocks
from ijepa_scale.objectives.masks import BlockMasks, InverseBlockMasks

SPEC = MultiBlock(grid=PatchGrid(4, 4), min_keep=2)
POSITIONS = range(3, 9)


def sequences(packed):
    return [packed.indices_T[low:high] % 16 for low, high in pairwise(packed.cu_seqlens.tolist())]


@pytest.mark.parametrize("context", ["all", "batch_min", "3"])
def test_masks_are_what_step_and_positions_say(context):
    masks = pickle.loads(pickle.dumps(BlockMasks(SPEC, context, seed=3)))(4, POSITIONS)
    sizes = block_sizes(SPEC, generator_for(3, SIZES, 4))
    placed = [place_blocks(SPEC, sizes, generator_for(3, BLOCKS, 4, position)) for position in POSITIONS]
    shortest = min(image.context.size for image in placed)
    blocks = sequences(masks.target_blocks)
    for i, (position, image, kept) in enumerate(zip(POSITIONS, placed, sequences(masks.context), strict=True)):
        want = image.context
        if context == "batch_min":
            want = want[:shortest]
        elif context != "all" and want.size > int(context):
            want = want[np.sort(generator_for(3, CONTEXT, 4, position).choice(want.size, 3, replace=False))]
        assert np.array_equal(kept, want)
        assert torch.equal(torch.stack(blocks[4 * i : 4 * i + 4]), torch.from_numpy(image.target_blocks).int())


def test_inverse_blocks_are_what_step_and_positions_say():
    masks = pickle.loads(pickle.dumps(InverseBlockMasks(PatchGrid(4, 4), 5, 2, 3, seed=3)))(4, POSITIONS)
    assert masks.num_images == len(POSITIONS) and masks.masks_an_image == 3
    drawn = iter(zip(sequences(masks.context), sequences(masks.target_blocks), strict=True))
    for position in POSITIONS:
        rng = generator_for(3, BLOCKS, 4, position)
        for _ in range(3):
            want, (seen, hidden) = visible_patches(PatchGrid(4, 4), 5, 2, rng), next(drawn)
            assert np.array_equal(seen, want)
            assert sorted([*seen.tolist(), *hidden.tolist()]) == list(range(16))
    assert next(drawn, None) is None
