"""data2vec: the mean of the target encoder's last blocks, from some patches (arXiv:2202.03555, 2212.07525).

In its efficient form: the context encoder sees visible patches alone, and an image has several masks, all answered from
one pass of the target encoder. The decoder is I-JEPA's predictor, a narrow transformer, in place of convolutions, over
one sequence a mask: its visible tokens and a mask token at every other patch. There is no class token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ijepa_kernels.target_loss import target_loss
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.encoder_pair import EncoderPair, PairObjective
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.masks import InverseBlockMasks
from ijepa_scale.objectives.objective import Total

TARGET_EPS = 1e-5  # of the targets' LayerNorm, PyTorch's own


class Data2Vec(EncoderPair):
    """The mean of what the target encoder's last blocks put out is predicted."""

    def __init__(
        self,
        context_encoder: VisionTransformer,
        predictor: Predictor,
        target_encoder: VisionTransformer,
        *,
        layers: Sequence[int],
        loss_kind: str,
    ):
        """layers: blocks of the target encoder that are averaged, counted from 1, ascending."""
        super().__init__(context_encoder, predictor, target_encoder)
        self.layers, self.loss_kind = tuple(layers), loss_kind

    def forward(self, images_BCHW: torch.Tensor, masks: Masks) -> dict[str, torch.Tensor]:
        """images_BCHW: (B, 3, H, W) uint8. Returns "loss", to be minimized, averaged over all hidden tokens."""
        context_TD = self.context_encoder(images_BCHW, masks.context)
        with torch.no_grad():  # second: meanwhile other ranks' parts of its weights come in (engine/ema.py)
            outputs = self.target_encoder(images_BCHW, rows_K=masks.target_patches_U, layers=self.layers)
            target_UD = normalized_mean(outputs)
        pred_TD = self.predictor(context_TD, masks)
        return {"loss": target_loss(pred_TD, target_UD, masks.target_index_T, self.loss_kind, norm=False)}


def normalized_mean(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of tokens of several layers, each token layer-normalized without affine (arXiv:2202.03555, section 3.3).

    A block's output is taken, as the residual stream has it; released code takes its MLP's, before the sum.

    outputs: (U, D) of each layer, any float dtype. Returns (U, D), fp32 (fp64 for fp64 input).
    """
    mean_UD = torch.zeros_like(outputs[0], dtype=torch.promote_types(outputs[0].dtype, torch.float32))
    for tokens_UD in outputs:
        mean_UD += F.layer_norm(tokens_UD.to(mean_UD.dtype), tokens_UD.shape[-1:], eps=TARGET_EPS)
    return mean_UD / len(outputs)


@dataclass(frozen=True, kw_only=True)
class Data2VecObjective(PairObjective):
    """data2vec as one of the objectives. top_layers: how many of the target encoder's last blocks are averaged."""

    draw_masks: InverseBlockMasks
    top_layers: int

    @property
    def name(self) -> str:
        return "data2vec"

    @property
    def grid(self) -> PatchGrid:
        return self.draw_masks.grid

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.encoder.depth - self.top_layers + 1, self.encoder.depth + 1))

    @property
    def out_width(self) -> int:
        return self.encoder.width

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> Data2Vec:
        return Data2Vec(*self.networks(attend), layers=self.layers, loss_kind=self.loss_kind)

    def tokens_in_words(self, means: Counts) -> str:
        masks, visible, patches = self.draw_masks.masks_an_image, self.draw_masks.visible, self.grid.num_patches
        return f"target encoder {patches}, context {masks} x {visible}, predictor {masks} x {patches}"

    def advice(self) -> str:
        return ""

    def batch_facts(self) -> tuple[str, ...]:
        return ()

    def check(self) -> None:
        if self.top_layers > self.encoder.depth:
            raise ValueError(
                f"data2vec.top_layers {self.top_layers} are more than the encoder's {self.encoder.depth} blocks; use "
                f"{self.encoder.depth} or fewer, or a larger model.depth"
            )

    def check_micro_step(self, images: int) -> None:
        """Any number will do."""
