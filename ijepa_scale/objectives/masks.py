"""Which patches an objective sees and which it predicts, drawn for a micro-batch: a value that collate is handed."""

from dataclasses import dataclass

import numpy as np

from ijepa_scale.data.order import BLOCKS, CONTEXT, PATCHES, SIZES, generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.hidden import block_patches, random_patches
from ijepa_scale.masking.inverse_block import visible_patches
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes, place_blocks
from ijepa_scale.masking.packing import Masks, limit_context, pack_masks


@dataclass(frozen=True)
class BlockMasks:
    """Multi-block masks (arXiv:2301.08243, section 3) of any images of a run. Can be pickled, for loader processes.

    context: mask.context, how many of the context tokens stay; only "batch_min" depends on the micro-batch.
    """

    blocks: MultiBlock
    context: str = "all"
    seed: int = 0

    def __call__(self, step: int, positions: range) -> Masks:
        """The packed masks of the images at positions of the global batch of a step."""
        sizes = block_sizes(self.blocks, generator_for(self.seed, SIZES, step))
        placed = [place_blocks(self.blocks, sizes, generator_for(self.seed, BLOCKS, step, at)) for at in positions]
        rngs = [generator_for(self.seed, CONTEXT, step, at) for at in positions]
        contexts = limit_context([image.context for image in placed], self.context, rngs)
        target_blocks = [list(image.target_blocks) for image in placed]
        return pack_masks(contexts, target_blocks, self.blocks.grid.num_patches)


@dataclass(frozen=True)
class InverseBlockMasks:
    """Several masks of each image, of each of which a few blocks stay visible (arXiv:2212.07525). Can be pickled.

    visible: patches, as many of every mask; side: of a block, in patches. What is hidden is a mask's one target block.
    """

    grid: PatchGrid
    visible: int
    side: int
    masks_an_image: int
    seed: int = 0

    def __call__(self, step: int, positions: range) -> Masks:
        """The packed masks of the images at positions of the global batch of a step."""
        everything, seen = np.arange(self.grid.num_patches), []
        for at in positions:
            rng = generator_for(self.seed, BLOCKS, step, at)
            seen += [visible_patches(self.grid, self.visible, self.side, rng) for _ in range(self.masks_an_image)]
        hidden = [[np.delete(everything, part)] for part in seen]
        return pack_masks(seen, hidden, self.grid.num_patches, masks_an_image=self.masks_an_image)


@dataclass(frozen=True)
class HiddenMasks:
    """Some patches of each image are hidden, as many of each; all others are seen. Can be pickled, as BlockMasks.

    hidden: how many. in_blocks: whether they lie in blocks, as block_patches() draws them, or anywhere.
    """

    grid: PatchGrid
    hidden: int
    in_blocks: bool = False
    seed: int = 0

    @property
    def seen(self) -> int:
        """Patches of an image that are seen."""
        return self.grid.num_patches - self.hidden

    def __call__(self, step: int, positions: range) -> Masks:
        """The packed masks of the images at positions of the global batch of a step.

        context: what is seen. Each image has one target block: what is hidden.
        """
        draw, everything = block_patches if self.in_blocks else random_patches, np.arange(self.grid.num_patches)
        hidden = [draw(self.grid, self.hidden, generator_for(self.seed, PATCHES, step, at)) for at in positions]
        seen = [np.delete(everything, patches) for patches in hidden]
        return pack_masks(seen, [[patches] for patches in hidden], self.grid.num_patches)
