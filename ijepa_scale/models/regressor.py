"""CAE's latent contextual regressor and its decoder (arXiv:2202.03026, section 3.2), in the encoder's width.

B images, V patches seen and M hidden ones of each, as many of all, T = B * M, N patches of the grid, D width.
"""

import torch
from torch import nn

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Masks, Packed
from ijepa_scale.models.attention import Attend, Sequences
from ijepa_scale.models.blocks import NORM_EPS, Block, CrossBlock, ViTSize, run_blocks, run_cross_block
from ijepa_scale.models.positions import sincos_pos_embed


class Regressor(nn.Module):
    """From what the encoder makes of the patches seen to what it would make of the hidden ones.

    Queries begin as one mask token; keys and values are of the patches seen and of the queries. Every image must hide
    as many patches.
    """

    pos_embed: torch.Tensor

    def __init__(self, size: ViTSize, *, grid: PatchGrid):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.register_buffer("pos_embed", sincos_pos_embed(size.width, grid)[None])
        self.blocks = nn.ModuleList(CrossBlock(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

    def forward(self, seen_TD: torch.Tensor, masks: Masks) -> torch.Tensor:
        """seen_TD: (B * V, D), the encoder's output -> (B * M, D), in the order of target_blocks."""
        images = masks.num_images
        places_T = masks.prediction.indices_T % masks.num_patches  # of what is seen, then of what is hidden
        positions_BND = self.pos_embed[0].to(seen_TD.dtype).index_select(0, places_T).unflatten(0, (images, -1))
        seen_BVD = seen_TD.unflatten(0, (images, -1))
        hidden_BMD = self.mask_token.expand(images, masks.target_blocks.max_seqlen, -1)
        for block in self.blocks:
            hidden_BMD = run_cross_block(block, hidden_BMD, seen_BVD, positions_BND)
        return self.norm(hidden_BMD).flatten(0, 1)


class LatentDecoder(nn.Module):
    """From the regressor's output to pixels: blocks over the hidden patches of an image alone."""

    pos_embed: torch.Tensor

    def __init__(self, size: ViTSize, *, grid: PatchGrid, out_width: int, attend: Attend | None = None):
        """attend: the kernel that attends; None: PyTorch's own."""
        super().__init__()
        self.attend = attend
        self.register_buffer("pos_embed", sincos_pos_embed(size.width, grid)[None])
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.proj = nn.Linear(size.width, out_width)

    def forward(self, latents_TD: torch.Tensor, hidden: Packed) -> torch.Tensor:
        """latents_TD: (T, D), in the order of hidden, a sequence an image -> (T, out_width)."""
        positions_ND = self.pos_embed[0].to(latents_TD.dtype)
        tokens_TD = latents_TD + positions_ND.index_select(0, hidden.indices_T % len(positions_ND))
        sequences = Sequences(hidden.cu_seqlens, hidden.max_seqlen, hidden.num_tokens, self.attend)
        return self.proj(self.norm(run_blocks(self.blocks, tokens_TD, sequences)))
