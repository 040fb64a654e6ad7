"""CAE: what an encoder would make of hidden patches, and from that their pixels (arXiv:2202.03026).

The paper predicts the codes of a discrete tokenizer; here its targets are normalized pixels, as MAE's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.blocks import ViTSize, bytes_kept_in_all, count_recomputed, recompute, set_compiled
from ijepa_scale.models.regressor import LatentDecoder, Regressor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.flops import again, forward, scores
from ijepa_scale.objectives.objective import Expected, Total
from ijepa_scale.objectives.pixels import HiddenPixels, pixel_loss


class Cae(nn.Module):
    """An encoder of the patches that are seen, a regressor from these to the hidden ones, and a decoder of them."""

    def __init__(
        self, context_encoder: VisionTransformer, regressor: Regressor, decoder: LatentDecoder, *, alignment: float
    ):
        """alignment: the weight of its loss."""
        super().__init__()
        self.context_encoder = context_encoder
        self.regressor = regressor
        self.decoder = decoder
        self.alignment = alignment

    def forward(self, images_BCHW: torch.Tensor, masks: Masks) -> dict[str, torch.Tensor]:
        """images_BCHW: (B, 3, H, W) uint8. Returns scalars: "loss", to be minimized, averaged over all hidden patches.

        Also its parts before their weights, without gradients: "pixels", and "alignment", the mean squared error
        against what the same encoder makes of the hidden patches alone, a constant.
        """
        seen_TD = self.context_encoder(images_BCHW, masks.context)
        with torch.no_grad():
            target_TD = self.context_encoder(images_BCHW, masks.target_blocks)
        latent_TD = self.regressor(seen_TD, masks)
        dtype = torch.promote_types(latent_TD.dtype, torch.float32)
        alignment = F.mse_loss(latent_TD.to(dtype), target_TD.to(dtype))
        pred_TK = self.decoder(latent_TD, masks.target_blocks)
        patch_size = self.context_encoder.patch_embed.patch_size
        pixels = pixel_loss(pred_TK, images_BCHW, masks.target_blocks.indices_T, patch_size)
        loss = pixels + self.alignment * alignment
        return {"loss": loss, "pixels": pixels.detach(), "alignment": alignment.detach()}


@dataclass(frozen=True, kw_only=True)
class CaeObjective(HiddenPixels):
    """CAE as one of the objectives; objective.py says what each answer is.

    regressor_depth, decoder_depth: blocks of the encoder's width, heads and mlp_width. alignment: weight of its loss.
    """

    regressor_depth: int
    decoder_depth: int
    alignment: float

    @property
    def name(self) -> str:
        return "cae"

    @property
    def regressor(self) -> ViTSize:
        return replace(self.encoder, depth=self.regressor_depth)

    @property
    def decoder(self) -> ViTSize:
        return replace(self.encoder, depth=self.decoder_depth)

    def attention_heads(self) -> dict[str, tuple[int, int]]:
        """The regressor's sequences are all of one length, for which there is PyTorch's own."""
        return dict.fromkeys(("encoder", "decoder"), (self.encoder.heads, self.encoder.width // self.encoder.heads))

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> Cae:
        of_encoder, of_decoder = ((attend or {}).get(network) for network in ("encoder", "decoder"))
        encoder = VisionTransformer(
            self.encoder, image_size=self.image_size, patch_size=self.patch_size, attend=of_encoder
        )
        regressor = Regressor(self.regressor, grid=self.grid)
        decoder = LatentDecoder(self.decoder, grid=self.grid, out_width=self.pixels, attend=of_decoder)
        recompute(encoder.blocks, self.recompute_every[0])
        for blocks in (regressor.blocks, decoder.blocks):
            recompute(blocks, self.recompute_every[1])
        module = Cae(encoder, regressor, decoder, alignment=self.alignment)
        set_compiled(module, self.compiled)
        return module

    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: module.get_submodule(name) for name in ("context_encoder", "regressor", "decoder")}

    def flops(self, images: float) -> tuple[dict[str, float], float]:
        """Of so many images: what the method needs by network, as StepFlops counts it, and in all what is computed."""
        size, seen, hidden = self.encoder, self.draw_masks.seen, self.draw_masks.hidden
        regressor, decoder = self.regressor, self.decoder
        embed = 2 * self.pixels * size.width
        # of a block: queries and the projection; keys and values; attention; the MLP
        attends = 4 * size.width**2 * hidden + (4 * size.width**2 + 4 * size.width * hidden) * self.grid.num_patches
        mlp = 4 * size.width * size.mlp_width * hidden
        parts = {
            "encoder": 2 * embed * seen + 3 * forward(size, size.depth, seen, seen**2),
            "encoder of hidden patches": embed * hidden + forward(size, size.depth, hidden, hidden**2),
            "regressor": 3 * regressor.depth * (attends + mlp),
            "decoder": 3 * (forward(decoder, decoder.depth, hidden, hidden**2) + embed * hidden),
        }
        every = self.recompute_every
        encoded, regressed, decoded = map(
            count_recomputed, (size.depth, regressor.depth, decoder.depth), (*every, every[1])
        )
        computed = (
            sum(parts.values())
            + scores(size, seen**2)
            + scores(regressor, hidden * self.grid.num_patches)
            + scores(decoder, hidden**2)
            + again(size, encoded, seen, seen**2, 0.0, self.compiled)
            + regressed * (attends + mlp / 2)  # to the input of the MLP's second layer: no block of its is compiled
            + again(decoder, decoded, hidden, hidden**2, 0.0, self.compiled)
        )
        return {name: images * part for name, part in parts.items()}, images * computed

    def expected(self, masks: Sequence[Masks]) -> Expected:
        seen, hidden, patches = self.draw_masks.seen, self.draw_masks.hidden, self.grid.num_patches
        encoder_every, after = self.recompute_every
        width, recomputed = self.encoder.width, count_recomputed(self.regressor_depth, after)
        # A block keeps of all patches what it normalizes, that with and without positions, keys and values.
        block = 2 * (5 * width * patches + (5 * width + 2 * self.encoder.mlp_width) * hidden)
        return Expected(
            tokens=f"encoder {seen}, regressor {hidden} from {patches}, decoder {hidden}; encoder, without a gradient, "
            f"of the {hidden} hidden",
            flops=self.flops(1)[0],
            kept_bytes={
                "encoder": 2 * self.pixels * seen
                + bytes_kept_in_all(self.encoder, encoder_every, itemsize=2, tokens=seen),
                "regressor": 2 * width * patches  # positions
                + (self.regressor_depth - recomputed) * block
                + recomputed * 2 * width * hidden,
                "decoder": bytes_kept_in_all(self.decoder, after, itemsize=2, tokens=hidden),
                "loss": 8 * (width + self.pixels) * hidden,  # of both losses what is compared, in fp32
            },
        )

    def architecture(self) -> dict[str, int]:
        sizes = {key: getattr(self.encoder, key) for key in ("width", "depth", "heads", "mlp_width")}
        of_others = {"regressor_depth": self.regressor_depth, "decoder_depth": self.decoder_depth}
        return {"image_size": self.image_size, "patch_size": self.patch_size, **sizes, **of_others}
