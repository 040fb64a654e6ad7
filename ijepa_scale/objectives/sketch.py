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
from ijepa_scale.data.order import BLOCKS, generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.blocks import ViTSize, bytes_kept, count_recomputed, recompute, set_compiled
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.sketch import SketchDecoder, SketchFlow
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.flops import again, forward, scores
from ijepa_scale.objectives.objective import Expected, Shown, Total

FROZEN = "encoder."  # how names of its parameters begin
PERCEIVED = 3  # depths of the encoder, evenly, at which a decoder's image is compared with the true one
TIME_MEAN, TIME_STD = -0.8, 0.8  # of the logit of a flow's time (arXiv:2511.13720, section 4)
LEAST_NOISE = 0.05  # a flow's error is divided by the share of noise that is left, or by this


@dataclass(frozen=True)
class SketchDraw:
    """What is drawn at random for the images of a micro-batch.

    noise_B: (B,) fp32, how strong the noise on an image's features is. time_B: (B,) fp32, of a flow. box_BN: (B, N)
    bool, the patches of its box. seeds: of an image's noise, one each: numbers on the host, that device draws them.
    """

    noise_B: torch.Tensor
    time_B: torch.Tensor
    box_BN: torch.Tensor
    seeds: tuple[int, ...]

    @property
    def num_images(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class SketchDraws:
    """Draws for any images of a run: a value that loader processes hold. noise, box_scale: as in the config."""

    grid: PatchGrid
    noise: float
    box_scale: tuple[float, float]
    seed: int = 0

    def __call__(self, step: int, positions: range) -> SketchDraw:
        noise, times, seeds = [], [], []
        boxes = np.zeros((len(positions), self.grid.num_patches), dtype=bool)
        spec = MultiBlock(grid=self.grid, target_scale=self.box_scale)
        for image, at in enumerate(positions):
            rng = generator_for(self.seed, BLOCKS, step, at)
            height, width = block_sizes(spec, rng).target
            top, left = rng.integers(0, self.grid.rows - height + 1), rng.integers(0, self.grid.columns - width + 1)
            boxes[image, self.grid.block(int(top), int(left), height, width)] = True
            noise.append(abs(rng.standard_normal()) * self.noise)
            times.append(1 / (1 + np.exp(-(TIME_MEAN + TIME_STD * rng.standard_normal()))))
            seeds.append(int(rng.integers(0, 2**62)))
        noise_B, time_B = (torch.tensor(values, dtype=torch.float32) for values in (noise, times))
        return SketchDraw(noise_B, time_B, torch.from_numpy(boxes), tuple(seeds))


class Sketch(nn.Module):
    """A frozen encoder, and what draws images by its features."""

    def __init__(
        self, encoder: VisionTransformer, decoder: SketchDecoder, *, layer: int, condition: str, perceptual: float
    ):
        """layer: the block whose features are drawn, from 1. condition, perceptual: as in the config."""
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.decoder = decoder
        self.layer, self.condition, self.perceptual = layer, condition, perceptual
        depth = len(encoder.blocks)
        self.perceived = tuple(np.unique(np.linspace(0, depth, PERCEIVED + 1)[1:].round().astype(int)).tolist())

    def forward(self, images_BCHW: torch.Tensor, draw: SketchDraw) -> dict[str, torch.Tensor]:
        """images_BCHW: (B, 3, H, W) uint8. Returns "loss", and of a decoder its parts "pixels" and "features".

        pixels: the mean absolute error of normalized pixels. features: the mean squared error of the frozen encoder's
        normalized features, over some of its blocks. Of a flow: the mean squared error of its velocity.
        """
        pixels_BNK = self.pixels(images_BCHW)
        flow = isinstance(self.decoder, SketchFlow)
        with torch.no_grad():
            wanted = (self.layer,) if flow or not self.perceptual else tuple(sorted({self.layer, *self.perceived}))
            true = dict(zip(wanted, features_of(self.encoder, pixels_BNK, wanted), strict=True))
            features_BND = true[self.layer]
            noise_BND = standard_normal(draw.seeds, features_BND)
            features_BND = features_BND + draw.noise_B[:, None, None] * noise_BND
        if isinstance(self.decoder, SketchFlow):
            return {"loss": self._velocity_loss(pixels_BNK, features_BND, draw)}
        drawn_BNK = self.decoder(features_BND).float()
        pixels = F.l1_loss(drawn_BNK, pixels_BNK)
        if not self.perceptual:
            return {"loss": pixels}
        seen = features_of(self.encoder, drawn_BNK, self.perceived)
        errors = [F.mse_loss(one, true[layer]) for layer, one in zip(self.perceived, seen, strict=True)]
        features = torch.stack(errors).mean()
        return {
            "loss": pixels + self.perceptual * features,
            "pixels": pixels.detach(),
            "features": features.detach(),
        }

    def _velocity_loss(self, pixels_BNK: torch.Tensor, features_BND: torch.Tensor, draw: SketchDraw) -> torch.Tensor:
        time_B11 = draw.time_B[:, None, None]
        noise_BNK = standard_normal([seed + 1 for seed in draw.seeds], pixels_BNK)
        noisy_BNK = time_B11 * pixels_BNK + (1 - time_B11) * noise_BNK
        known_BND = conditioned(features_BND, draw.box_BN, self.condition)
        drawn_BNK = self.decoder(known_BND, draw.box_BN, noisy_BNK, draw.time_B).float()
        return ((drawn_BNK - pixels_BNK) / (1 - time_B11).clamp(min=LEAST_NOISE)).square().mean()

    def pixels(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalized pixels by patches, (B, N, K) fp32, channels first (fp64 where the encoder is)."""
        dtype = torch.promote_types(self.encoder.dtype, torch.float32)
        patch_size = self.encoder.patch_embed.patch_size
        return patchify(images_BCHW, patch_size, dtype=dtype).unflatten(0, (len(images_BCHW), -1))


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

    encoder, decoder: sizes. layer: the block whose features are drawn, from 1. flow: whether a flow is trained.
    condition, perceptual: as in the config. Weights of the frozen encoder are not drawn: run/frozen.py reads them.
    """

    encoder: ViTSize
    decoder: ViTSize
    image_size: int
    patch_size: int
    layer: int
    flow: bool
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

    def attention_heads(self) -> dict[str, tuple[int, int]]:
        return {}  # all its sequences are whole images

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> Sketch:
        encoder = VisionTransformer(self.encoder, image_size=self.image_size, patch_size=self.patch_size)
        kind = SketchFlow if self.flow else SketchDecoder
        decoder = kind(self.decoder, feature_width=self.encoder.width, pixels=3 * self.patch_size**2, grid=self.grid)
        recompute(encoder.blocks, self.recompute_every[0])
        recompute(decoder.blocks, self.recompute_every[1])
        module = Sketch(encoder, decoder, layer=self.layer, condition=self.condition, perceptual=self.perceptual)
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

    def flops(self, images: float) -> tuple[dict[str, float], float]:
        """Of so many images: what the method needs by network, and in all what is computed."""
        encoder, decoder, patches = self.encoder, self.decoder, self.grid.num_patches
        embed = 2 * 3 * self.patch_size**2 * encoder.width * patches
        looked = not self.flow and self.perceptual > 0
        deep = encoder.depth if looked else self.layer
        # Its weights are frozen: of their products the backward costs once the forward, of attention's twice.
        seen = 2 * (embed + forward(encoder, encoder.depth, patches, patches**2)) + 2 * scores(encoder, patches**2)
        into = 2 * decoder.width * (encoder.width + 3 * self.patch_size**2 * self.flow) * patches
        out = 2 * decoder.width * 3 * self.patch_size**2 * patches
        of_time = 2 * 2 * decoder.width**2 * self.flow
        parts = {
            "encoder": embed + forward(encoder, deep, patches, patches**2) + seen * looked,
            # What goes into it awaits no gradient.
            "decoder": 3 * (forward(decoder, decoder.depth, patches, patches**2) + out + of_time)
            + 2 * into
            - of_time / 2,
        }
        every = self.recompute_every
        viewed, drawn = count_recomputed(encoder.depth, every[0]) * looked, count_recomputed(decoder.depth, every[1])
        computed = (
            sum(parts.values())
            + scores(encoder, patches**2) * looked
            + scores(decoder, patches**2)
            + again(encoder, viewed, patches, patches**2, 0.0, self.compiled)
            + again(decoder, drawn, patches, patches**2, 0.0, self.compiled)
        )
        return {name: images * part for name, part in parts.items()}, images * computed

    def done(self, masks: SketchDraw) -> dict[str, float]:
        needed, computed = self.flops(masks.num_images)
        return {"model_flops": sum(needed.values()), "hardware_flops": computed}

    def expected(self, masks: Sequence[SketchDraw]) -> Expected:
        patches, every = self.grid.num_patches, self.recompute_every
        known = np.mean([masked.box_BN.sum(dim=1).float().mean().item() for masked in masks])
        words = f", of which {known:.1f} have known features" if self.flow else ""
        kept: dict[str, float] = {"decoder": patches * bytes_kept(self.decoder, every[1], itemsize=2)}
        if self.perceptual and not self.flow:
            kept["encoder"] = patches * bytes_kept(self.encoder, every[0], itemsize=2)
        return Expected(tokens=f"encoder {patches}, decoder {patches}{words}", flops=self.flops(1)[0], kept_bytes=kept)

    def shown(self, masks: SketchDraw) -> list[Shown]:
        """Of a flow: what it draws without features, and the box of known ones. A decoder is given all of them."""
        everything = np.arange(self.grid.num_patches)
        boxes = [np.flatnonzero(box) for box in masks.box_BN.numpy()] if self.flow else [everything] * masks.num_images
        return [Shown(box, []) for box in boxes]

    def architecture(self) -> dict[str, Any]:
        sizes = {"": self.encoder, "decoder_": self.decoder}
        found = {
            f"{network}{key}": getattr(size, key)
            for network, size in sizes.items()
            for key in ("width", "depth", "heads", "mlp_width")
        }
        return {"image_size": self.image_size, "patch_size": self.patch_size, "flow": self.flow, **found}

    def batch_facts(self) -> tuple[str, ...]:
        return ()

    def advice(self) -> str:
        return ""

    def check(self) -> None:
        if not 1 <= self.layer <= self.encoder.depth:
            raise ValueError(
                f"sketch.target_layer names block {self.layer}, and the encoder has {self.encoder.depth}; use a number "
                f"from 1 to {self.encoder.depth}, or 0 for the last"
            )

    def check_micro_step(self, images: int) -> None:
        """Any number will do."""
