"""A picture of what the networks see, drawn before the first step."""

import itertools

import numpy as np

from ijepa_scale.masking.packing import Packed
from ijepa_scale.run.setup import Run
from ijepa_scale.visualize.masks import draw_masks

MASK_PREVIEW_IMAGES = 8


def preview_masks(run: Run) -> None:
    """masks.png: what the networks see of the run's first images."""
    batch = run.dataset.preview(run.start_step)
    count = min(MASK_PREVIEW_IMAGES, len(batch.indices))
    num_patches = batch.masks.num_patches

    def per_image(packed: Packed) -> list[np.ndarray]:
        indices, bounds = packed.indices_T.numpy(), packed.cu_seqlens.numpy()
        return [indices[low:high] % num_patches for low, high in itertools.pairwise(bounds)]

    blocks = per_image(batch.masks.target_blocks)
    each = len(blocks) // len(batch.indices)
    grid = run.dataset.blocks.grid
    draw_masks(
        run.folder.path / "masks.png",
        batch.images[:count].numpy(),
        grid.rows,
        grid.columns,
        per_image(batch.masks.context)[:count],
        [blocks[i * each : (i + 1) * each] for i in range(count)],
    )
