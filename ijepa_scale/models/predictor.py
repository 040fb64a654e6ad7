"""The predictor: a narrow ViT from context tokens to target tokens.

T packed tokens, D the encoder's width, P its own, F that of a prediction.
"""

import torch
from torch import nn

from ijepa_kernels.assemble import assemble
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.attention import Attend, Sequences
from ijepa_scale.models.blocks import Block, ViTSize, run_blocks
from ijepa_scale.models.positions import sincos_pos_embed


class Predictor(nn.Module):
    """For each target block: the image's context tokens and one mask token a target patch, through a narrow ViT.

    Parameters are named as in the reference's checkpoints.
    """

    predictor_pos_embed: torch.Tensor

    def __init__(
        self,
        size: ViTSize,
        *,
        encoder_width: int,
        grid: PatchGrid,
        out_width: int | None = None,
        attend: Attend | None = None,
    ):
        """out_width: of a prediction; None: the encoder's. attend: the kernel that attends; None: PyTorch's own."""
        super().__init__()
        self.size = size
        self.attend = attend
        self.predictor_embed = nn.Linear(encoder_width, size.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.register_buffer("predictor_pos_embed", sincos_pos_embed(size.width, grid)[None])
        self.predictor_blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.predictor_norm = nn.LayerNorm(size.width, eps=1e-6)
        self.predictor_proj = nn.Linear(size.width, out_width or encoder_width)

    def forward(self, context_TD: torch.Tensor, masks: Masks) -> torch.Tensor:
        """context_TD: (T_c, D), the context encoder's output -> (T_t, F), predictions in the order of target_blocks."""
        packed = masks.prediction
        tokens_TP = assemble(
            self.predictor_embed(context_TD).to(self.mask_token.dtype),  # which autocast lowers: what is added to stays
            self.mask_token.view(-1),
            self.predictor_pos_embed[0],
            source_R=masks.prediction_source_T,
            indices_R=packed.indices_T,
            copies_TM=masks.prediction_copies_TM,
            mask_rows_K=masks.target_rows_T,
        )
        sequences = Sequences(packed.cu_seqlens, packed.max_seqlen, packed.num_tokens, self.attend)
        # What follows the last attention is row-wise: the context's rows are dropped before it.
        tokens_TP = run_blocks(self.predictor_blocks, tokens_TP, sequences, masks.target_rows_T)
        return self.predictor_proj(self.predictor_norm(tokens_TP))
