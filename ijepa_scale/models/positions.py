"""Fixed position embeddings, of the grid that a network is made for and of others. N patches, D width."""

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_scale.masking.grid import PatchGrid


def sincos_pos_embed(width: int, grid: PatchGrid) -> torch.Tensor:
    """Fixed 2-D sine-cosine position embedding, (N, width) float32.

    The first half of the width encodes the column, the second the row, each as [sin(omega * x), cos(omega * x)] with
    omega_k = 10000 ** (-k / (width / 4)), as in the reference's checkpoints.
    """
    # In NumPy: inside zero.Init torch's constructors round to the model's dtype, and bf16 angles are wrong by 0.02.
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(grid.num_patches), grid.columns)
    angles = [axis[:, None] * omega for axis in (columns, rows)]
    parts = [part for angle in angles for part in (np.sin(angle), np.cos(angle))]
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))


def resized_pos_embed(stored_1ND: torch.Tensor, grid: PatchGrid, wanted: PatchGrid) -> torch.Tensor:
    """Position embeddings for another grid, (1, N, D), bicubically interpolated from those of a grid; at least fp32.

    stored_1ND: (1, N, D), those of `grid`; returned as they are where that is the wanted one.
    As transformers' interpolate_pos_encoding (align_corners=False, no antialiasing), so that a model gives the same
    features here and there. The sine-cosine formula could be evaluated on the new grid instead: its positions would go
    on past the last that was trained on, where interpolated ones stay within, edge on edge.
    """
    if wanted == grid:
        return stored_1ND
    table = stored_1ND.to(torch.promote_types(stored_1ND.dtype, torch.float32)).unflatten(1, grid.shape)
    table = F.interpolate(table.movedim(-1, 1), size=wanted.shape, mode="bicubic", align_corners=False)
    return table.movedim(1, -1).flatten(1, -2)
