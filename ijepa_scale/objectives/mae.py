"""MAE: the pixels of hidden patches, from the others (arXiv:2111.06377). Here without a class token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.blocks import ViTSize, bytes_kept_in_all, count_recomputed, recompute, set_compiled
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.flops import again, forward, scores
from ijepa_scale.objectives.objective import Expected, Total
from ijepa_scale.objectives.pixels import HiddenPixels, pixel_loss


class Mae(nn.Module):
    """An encoder of the patches that are seen, and a light decoder over all of them.

    The decoder is I-JEPA's predictor with pixels for its outputs: what is seen, projected, and a mask token for each
    hidden patch, with their positions.
    """

    def __init__(self, context_encoder: VisionTransformer, decoder: Predictor):
        super().__init__()
        self.context_encoder = context_encoder
        self.decoder = decoder

    def forward(self, images_BCHW: torch.Tensor, masks: Masks) -> dict[str, torch.Tensor]:
        """images_BCHW: (B, 3, H, W) uint8. Returns "loss", to be minimized, averaged over all hidden patches."""
        context_TD = self.context_encoder(images_BCHW, masks.context)
        pred_TK = self.decoder(context_TD, masks)  # of hidden patches alone: no loss is on the others
        patch_size = self.context_encoder.patch_embed.patch_size
        return {"loss": pixel_loss(pred_TK, images_BCHW, masks.target_blocks.indices_T, patch_size)}


@dataclass(frozen=True, kw_only=True)
class MaeObjective(HiddenPixels):
    """MAE as one of the objectives; objective.py says what each answer is. decoder: its size."""

    decoder: ViTSize

    @property
    def name(self) -> str:
        return "mae"

    def attention_heads(self) -> dict[str, tuple[int, int]]:
        sizes = {"encoder": self.encoder, "decoder": self.decoder}
        return {network: (size.heads, size.width // size.heads) for network, size in sizes.items()}

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> Mae:
        of_encoder, of_decoder = ((attend or {}).get(network) for network in ("encoder", "decoder"))
        encoder = VisionTransformer(
            self.encoder, image_size=self.image_size, patch_size=self.patch_size, attend=of_encoder
        )
        decoder = Predictor(
            self.decoder, encoder_width=self.encoder.width, grid=self.grid, out_width=self.pixels, attend=of_decoder
        )
        recompute(encoder.blocks, self.recompute_every[0])
        recompute(decoder.predictor_blocks, self.recompute_every[1])
        module = Mae(encoder, decoder)
        set_compiled(module, self.compiled)
        return module

    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: module.get_submodule(name) for name in ("context_encoder", "decoder")}

    def flops(self, images: float) -> tuple[dict[str, float], float]:
        """Of so many images: what the method needs by network, as StepFlops counts it, and in all what is computed."""
        encoder, decoder, seen, hidden = self.encoder, self.decoder, self.draw_masks.seen, self.draw_masks.hidden
        patches = self.grid.num_patches
        ends = 2 * decoder.width * (encoder.width * seen + self.pixels * hidden)
        parts = {
            "encoder": 2 * 2 * self.pixels * encoder.width * seen + 3 * forward(encoder, encoder.depth, seen, seen**2),
            "decoder": 3 * (forward(decoder, decoder.depth, patches, patches**2, seen) + ends),
        }
        encoded, decoded = map(count_recomputed, (encoder.depth, decoder.depth), self.recompute_every)
        dropped = seen * (decoded == decoder.depth)
        computed = (
            sum(parts.values())
            + scores(encoder, seen**2)
            + scores(decoder, patches**2)
            + again(encoder, encoded, seen, seen**2, 0.0, self.compiled)
            + again(decoder, decoded, patches, patches**2, dropped, self.compiled)
        )
        return {name: images * part for name, part in parts.items()}, images * computed

    def expected(self, masks: Sequence[Masks]) -> Expected:
        seen, hidden, patches = self.draw_masks.seen, self.draw_masks.hidden, self.grid.num_patches
        encoder_every, decoder_every = self.recompute_every
        return Expected(
            tokens=f"encoder {seen}, decoder {patches}, of which {hidden} are predicted",
            flops=self.flops(1)[0],
            kept_bytes={
                "encoder": 2 * self.pixels * seen
                + bytes_kept_in_all(self.encoder, encoder_every, itemsize=2, tokens=seen),
                "decoder": bytes_kept_in_all(self.decoder, decoder_every, itemsize=2, tokens=patches, rows=hidden),
                "loss": 8 * self.pixels * hidden,  # predictions and pixels, in fp32
            },
        )

    def architecture(self) -> dict[str, int]:
        sizes = {"": self.encoder, "decoder_": self.decoder}
        found = {
            f"{network}{key}": getattr(size, key)
            for network, size in sizes.items()
            for key in ("width", "depth", "heads", "mlp_width")
        }
        return {"image_size": self.image_size, "patch_size": self.patch_size, **found}
