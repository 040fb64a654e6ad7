"""Sketches: what a frozen encoder's features say of the pixels, drawn by a decoder that is trained on them.

B images, N patches, D width of the features, K = 3 * p * p pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_kernels.patchify import patchify
from ijepa_scale.data.order import BLOCKS, SIZES, generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes
from ijepa_scale.masking.packing import Masks, pack_masks
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.blocks import ViTSize, bytes_kept_in_all, count_recomputed, recompute, set_compiled
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.sketch import SketchDecoder, SketchFlow
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.flops import Counts, again, forward, scores
from ijepa_scale.objectives.objective import Expected, Shown, Total

FROZEN = {"encoder": "target", "context_encoder": "context", "predictor": "predictor"}  # and what load() calls them
PERCEIVED = 3  # depths of the encoder, evenly, at which a decoder's image is compared with the true one
TIME_MEAN, TIME_STD = -0.8, 0.8  # of the logit of a flow's time (arXiv:2511.13720, section 4)
PREDICTED = 0.5  # the share of images whose box a flow is told predictions of, in the place of the truth
LEAST_NOISE = 0.05  # a flow's error is divided by the share of noise that is left, or by this


@dataclass(frozen=True)
class SketchDraw:
    """What is drawn at random for the images of a micro-batch.

    noise_B: (B,) fp32, how strong the noise on an image's features is. seeds: of that noise, one an image: numbers on
    the host, which the device draws from. Of a flow alone: masks, a box of each image and all around it; time_B: (B,)
    fp32; predicted_B: (B,) bool, whether it is told what is predicted of the box, or the truth.
    """

    noise_B: torch.Tensor
    seeds: tuple[int, ...]
    masks: Masks | None = None
    time_B: torch.Tensor | None = None
    predicted_B: torch.Tensor | None = None

    @property
    def num_images(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class SketchDraws:
    """Draws for any images of a run: a value that loader processes hold.

    noise: as in the config. box_scale: of a flow, as in the config; None: of a decoder.
    """

    grid: PatchGrid
    noise: float
    box_scale: tuple[float, float] | None = None
    seed: int = 0

    def __call__(self, step: int, positions: range) -> SketchDraw:
        rngs = [generator_for(self.seed, BLOCKS, step, at) for at in positions]
        noise_B = torch.tensor([abs(rng.standard_normal()) * self.noise for rng in rngs], dtype=torch.float32)
        seeds = tuple(int(rng.integers(0, 2**62)) for rng in rngs)
        if not self.box_scale:
            return SketchDraw(noise_B, seeds)
        spec = MultiBlock(grid=self.grid, target_scale=self.box_scale)
        size = block_sizes(spec, generator_for(self.seed, SIZES, step)).target  # the predictor takes boxes of one size
        tops, lefts = (of - side + 1 for of, side in zip(self.grid.shape, size, strict=True))
        boxes = [self.grid.block(int(rng.integers(0, tops)), int(rng.integers(0, lefts)), *size) for rng in rngs]
        everything = np.arange(self.grid.num_patches)
        masks = pack_masks([np.delete(everything, box) for box in boxes], [[box] for box in boxes], len(everything))
        logits = torch.tensor([TIME_MEAN + TIME_STD * rng.standard_normal() for rng in rngs], dtype=torch.float32)
        predicted_B = torch.tensor([rng.random() < PREDICTED for rng in rngs])
        return SketchDraw(noise_B, seeds, masks, logits.sigmoid(), predicted_B)


class Sketch(nn.Module):
    """A frozen encoder, and a decoder that draws images by its features."""

    def __init__(self, encoder: VisionTransformer, decoder: SketchDecoder, *, layer: int, perceptual: float):
        """layer: the block whose features are drawn, from 1. perceptual: as in the config."""
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.decoder = decoder
        self.layer, self.perceptual = layer, perceptual
        depth = len(encoder.blocks)
        self.perceived = tuple(np.unique(np.linspace(0, depth, PERCEIVED + 1)[1:].round().astype(int)).tolist())

    def forward(self, images_BCHW: torch.Tensor, draw: SketchDraw) -> dict[str, torch.Tensor]:
        """images_BCHW: (B, 3, H, W) uint8. Returns "loss", and with a perceptual term "pixels" and "features".

        pixels: the mean absolute error of normalized pixels. features: the mean squared error of the frozen encoder's
        normalized features, over some of its blocks.
        """
        pixels_BNK = self.pixels(images_BCHW)
        wanted = tuple(sorted({self.layer, *self.perceived})) if self.perceptual else (self.layer,)
        with torch.no_grad():
            true = dict(zip(wanted, features_of(self.encoder, pixels_BNK, wanted), strict=True))
        drawn_BNK = self.decoder(noisy(true[self.layer], draw)).float()
        pixels = F.l1_loss(drawn_BNK, pixels_BNK)
        if not self.perceptual:
            return {"loss": pixels}
        seen = features_of(self.encoder, drawn_BNK, self.perceived)
        errors = [F.mse_loss(one, true[layer]) for layer, one in zip(self.perceived, seen, strict=True)]
        features = torch.stack(errors).mean()
        terms = {"pixels": pixels.detach(), "features": features.detach()}
        return {"loss": pixels + self.perceptual * features, **terms}

    def pixels(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalized pixels by patches, (B, N, K) fp32, channels first (fp64 where the encoder is)."""
        dtype = torch.promote_types(self.encoder.dtype, torch.float32)
        patch_size = self.encoder.patch_embed.patch_size
        return patchify(images_BCHW, patch_size, dtype=dtype).unflatten(0, (len(images_BCHW), -1))


class FlowSketch(Sketch):
    """Frozen networks of I-JEPA, and a flow that draws images by the features of a box: true ones, or predictions."""

    decoder: SketchFlow

    def __init__(
        self,
        encoder: VisionTransformer,
        context_encoder: VisionTransformer,
        predictor: Predictor,
        decoder: SketchFlow,
        *,
        layer: int,
        condition: str,
    ):
        """layer: the last that the predictor predicts, from 1. condition: as in the config."""
        super().__init__(encoder, decoder, layer=layer, perceptual=0.0)
        self.context_encoder = context_encoder.requires_grad_(False)
        self.predictor = predictor.requires_grad_(False)
        self.condition = condition

    def forward(self, images_BCHW: torch.Tensor, draw: SketchDraw) -> dict[str, torch.Tensor]:
        """images_BCHW: (B, 3, H, W) uint8. Returns "loss", the mean squared error of the flow's velocity."""
        assert draw.masks is not None and draw.time_B is not None and draw.predicted_B is not None
        pixels_BNK, time_B11 = self.pixels(images_BCHW), draw.time_B[:, None, None]
        with torch.no_grad():
            (true_BND,) = features_of(self.encoder, pixels_BNK, (self.layer,))
            told_BND, box_BN = self.told(images_BCHW, noisy(true_BND, draw), draw.masks, draw.predicted_B)
            noise_BNK = standard_normal([seed + 1 for seed in draw.seeds], pixels_BNK)
        noisy_BNK = time_B11 * pixels_BNK + (1 - time_B11) * noise_BNK
        drawn_BNK = self.decoder(told_BND, box_BN, draw.predicted_B, noisy_BNK, draw.time_B).float()
        return {"loss": ((drawn_BNK - pixels_BNK) / (1 - time_B11).clamp(min=LEAST_NOISE)).square().mean()}

    def told(
        self, images_BCHW: torch.Tensor, true_BND: torch.Tensor, masks: Masks, predicted_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the flow is told, (B, N, D), and of which patches, (B, N) bool."""
        rows_T, width = masks.target_blocks.indices_T.long(), true_BND.shape[-1]
        pred_TD = self.predictor(self.context_encoder(images_BCHW, masks.context), masks)[:, -width:]
        filled_TD = true_BND.flatten(0, 1).index_copy(0, rows_T, pred_TD.to(true_BND.dtype))
        told_BND = torch.where(predicted_B[:, None, None], filled_TD.view_as(true_BND), true_BND)
        box_T = torch.zeros(len(filled_TD), dtype=torch.bool, device=rows_T.device).index_fill(0, rows_T, True)
        box_BN = box_T.view(true_BND.shape[:2])
        return conditioned(told_BND, box_BN, self.condition), box_BN


def noisy(features_BND: torch.Tensor, draw: SketchDraw) -> torch.Tensor:
    return features_BND + draw.noise_B[:, None, None] * standard_normal(draw.seeds, features_BND)


def features_of(encoder: VisionTransformer, pixels_BNK: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
    """Of whole images the outputs of some blocks, (B, N, D) fp32 of each, normalized as I-JEPA's loss normalizes them.

    pixels_BNK: as of Sketch.pixels(); gradients flow to them. layers: from 1, ascending.
    """
    outputs = encoder.of_pixels(pixels_BNK, layers)
    if layers[-1] == len(encoder.blocks):
        outputs[-1] = encoder.norm(outputs[-1])
    dtype = torch.promote_types(encoder.dtype, torch.float32)
    return [F.layer_norm(one.to(dtype), one.shape[-1:]) for one in outputs]


def conditioned(features_BND: torch.Tensor, box_BN: torch.Tensor, condition: str) -> torch.Tensor:
    """What a flow is told of the patches of a box, (B, N, D): their features, or for "mean" the mean of these."""
    if condition == "tokens":
        return features_BND
    box_BN1 = box_BN[..., None].to(features_BND.dtype)
    mean_B1D = (features_BND * box_BN1).sum(dim=1, keepdim=True) / box_BN1.sum(dim=1, keepdim=True)
    return mean_B1D.expand_as(features_BND)


def standard_normal(seeds: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Of each image by its seed: the same whichever images stand beside it. Another device draws others."""
    generator, drawn = torch.Generator(like.device), torch.empty_like(like)
    for image, seed in zip(drawn, seeds, strict=True):
        image.normal_(generator=generator.manual_seed(seed))
    return drawn


@dataclass(frozen=True, kw_only=True)
class SketchObjective:
    """Sketches as one of the objectives; objective.py says what each answer is.

    encoder, decoder, predictor: sizes; the last of a flow, None: a decoder. layers: blocks that the predictor predicts,
    from 1; the last one's features are drawn. condition, perceptual: as in the config. Weights of frozen networks are
    not drawn: run/frozen.py reads them.
    """

    encoder: ViTSize
    decoder: ViTSize
    predictor: ViTSize | None
    image_size: int
    patch_size: int
    layers: tuple[int, ...]
    condition: str
    perceptual: float
    draw_masks: SketchDraws
    recompute_every: tuple[int, int] = (0, 0)
    compiled: bool = False
    seed: int = 0

    @property
    def grid(self) -> PatchGrid:
        return self.draw_masks.grid

    @property
    def name(self) -> str:
        return "sketch"

    @property
    def pixels(self) -> int:
        """Of a patch."""
        return 3 * self.patch_size**2

    def attention_heads(self) -> dict[str, tuple[int, int]]:
        if not self.predictor:
            return {}  # all its sequences are whole images
        sizes = {"encoder": self.encoder, "predictor": self.predictor}
        return {network: (size.heads, size.width // size.heads) for network, size in sizes.items()}

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> Sketch:
        of_encoder, of_predictor = ((attend or {}).get(network) for network in ("encoder", "predictor"))
        sides: Any = {"image_size": self.image_size, "patch_size": self.patch_size}
        encoder = VisionTransformer(self.encoder, **sides)
        kind, width = SketchFlow if self.predictor else SketchDecoder, self.encoder.width
        decoder = kind(self.decoder, feature_width=width, pixels=self.pixels, grid=self.grid)
        module: Sketch
        if isinstance(decoder, SketchFlow) and self.predictor:
            predictor = Predictor(
                self.predictor,
                encoder_width=width,
                grid=self.grid,
                out_width=len(self.layers) * width,
                attend=of_predictor,
            )
            context = VisionTransformer(self.encoder, **sides, attend=of_encoder)
            module = FlowSketch(encoder, context, predictor, decoder, layer=self.layers[-1], condition=self.condition)
        else:
            module = Sketch(encoder, decoder, layer=self.layers[-1], perceptual=self.perceptual)
        recompute(encoder.blocks, self.recompute_every[0])
        recompute(decoder.blocks, self.recompute_every[1])
        set_compiled(module, self.compiled)
        return module

    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        return {"decoder": module.get_submodule("decoder")}

    def averaged(self, module: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        return ()

    def initial_weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        return initial_weight(name, shape, self.seed)

    def encoders(self, module: nn.Module) -> dict[str, VisionTransformer]:
        return {}  # none is trained

    def flops(self, draws: Sequence[SketchDraw]) -> tuple[dict[str, float], float]:
        """Of the images of some micro-batches: what the method needs by network, and in all what is computed."""
        encoder, decoder, patches = self.encoder, self.decoder, self.grid.num_patches
        images, every, flow = sum(draw.num_images for draw in draws), self.recompute_every, self.predictor is not None
        embed = 2 * self.pixels * encoder.width
        whole = embed * patches + forward(encoder, encoder.depth, patches, patches**2)
        deep = embed * patches + forward(encoder, self.layers[-1], patches, patches**2)
        looked = not flow and self.perceptual > 0
        # Its weights are frozen: of their products the backward costs once the forward, of attention's twice.
        seen = 2 * whole + 2 * scores(encoder, patches**2)
        into = 2 * decoder.width * (encoder.width + self.pixels * flow) * patches
        out = 2 * decoder.width * self.pixels * patches
        of_time = 2 * 2 * decoder.width**2 * flow
        blocks = forward(decoder, decoder.depth, patches, patches**2)
        parts = {
            "encoder": images * (whole + seen if looked else deep),
            # What goes into it awaits no gradient.
            "decoder": images * (3 * (blocks + out + of_time) + 2 * into - of_time / 2),
        }
        if self.predictor:
            parts["prediction"] = sum(self._prediction_flops(Counts.of(draw.masks)) for draw in draws if draw.masks)
        encoded, decoded = map(count_recomputed, (encoder.depth, decoder.depth), every)
        repeated = (
            scores(encoder, patches**2) * looked
            + scores(decoder, patches**2)
            + again(encoder, encoded * looked, patches, patches**2, 0.0, self.compiled)
            + again(decoder, decoded, patches, patches**2, 0.0, self.compiled)
        )
        return parts, sum(parts.values()) + images * repeated

    def _prediction_flops(self, counts: Counts) -> float:
        """Of the context encoder's and the predictor's forward."""
        encoder, predictor = self.encoder, self.predictor
        assert predictor is not None
        ends = encoder.width * counts.context + len(self.layers) * encoder.width * counts.blocks
        dropped = counts.prediction - counts.blocks
        return (
            2 * self.pixels * encoder.width * counts.context
            + forward(encoder, encoder.depth, counts.context, counts.context_pairs)
            + forward(predictor, predictor.depth, counts.prediction, counts.prediction_pairs, dropped)
            + 2 * predictor.width * ends
        )

    def done(self, masks: SketchDraw) -> dict[str, float]:
        needed, computed = self.flops([masks])
        return {"model_flops": sum(needed.values()), "hardware_flops": computed}

    def expected(self, masks: Sequence[SketchDraw]) -> Expected:
        patches, every = self.grid.num_patches, self.recompute_every
        images = sum(draw.num_images for draw in masks)
        boxes = sum(draw.masks.target_blocks.num_tokens for draw in masks if draw.masks) / images
        kept = {"decoder": bytes_kept_in_all(self.decoder, every[1], itemsize=2, tokens=patches)}
        if self.perceptual and not self.predictor:
            kept["encoder"] = bytes_kept_in_all(self.encoder, every[0], itemsize=2, tokens=patches)
        return Expected(
            tokens=f"encoder {patches}, decoder {patches}" + f", features of {boxes:.1f} known" * bool(boxes),
            flops={name: part / images for name, part in self.flops(masks)[0].items()},
            kept_bytes=kept,
        )

    def shown(self, masks: SketchDraw) -> list[Shown]:
        """Of a flow what the predictor sees and predicts. A decoder is told of all patches."""
        if not masks.masks:
            return [Shown(np.arange(self.grid.num_patches), [])] * masks.num_images
        seen, boxes = (
            packed.patches(self.grid.num_patches) for packed in (masks.masks.context, masks.masks.target_blocks)
        )
        return [Shown(part, [box]) for part, box in zip(seen, boxes, strict=True)]

    def architecture(self) -> dict[str, Any]:
        sizes = {"": self.encoder, "decoder_": self.decoder}
        if self.predictor:
            sizes["predictor_"] = self.predictor
        found = {
            f"{network}{key}": getattr(size, key)
            for network, size in sizes.items()
            for key in ("width", "depth", "heads", "mlp_width")
        }
        return {"image_size": self.image_size, "patch_size": self.patch_size, "layers": list(self.layers), **found}

    def batch_facts(self) -> tuple[str, ...]:
        return ()

    def advice(self) -> str:
        return ""

    def check(self) -> None:
        if self.layers[-1] > self.encoder.depth:
            raise ValueError(
                f"loss.target_layers names block {self.layers[-1]}, and the encoder has {self.encoder.depth}; use "
                f"numbers from 1 to {self.encoder.depth}"
            )

    def check_micro_step(self, images: int) -> None:
        """Any number will do."""
