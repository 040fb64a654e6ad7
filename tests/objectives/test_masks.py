"""Masks are pure functions of the step and the positions, drawn as masking's functions say."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from ijepa_scale.data.order import BLOCKS, CONTEXT, SIZES, generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes, place_blocks
from ijepa_scale.objectives.masks import BlockMasks

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
