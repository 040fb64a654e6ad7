"""Objectives whose target is the pixels of hidden patches: what MAE and CAE have in common.

T hidden patches of all images, K = 3 * p * p pixels of one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_kernels.patchify import patchify
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.masks import HiddenMasks
from ijepa_scale.objectives.objective import Shown

PIXEL_EPS = 1e-6  # on the variance of a patch, as MAE's released code


def pixel_loss(
    pred_TK: torch.Tensor, images_BCHW: torch.Tensor, indices_T: torch.Tensor, patch_size: int
) -> torch.Tensor:
    """Mean squared error against pixels normalized within each patch (MAE, arXiv:2111.06377, section 3).

    pred_TK: (T, K), any float dtype, channels first. images_BCHW: (B, 3, H, W) uint8. indices_T: (T,) integers, image *
    N + patch. Each patch is less its mean and divided by its standard deviation, that of a sample (over K - 1), as in
    MAE's released code. Returns a scalar, fp32 (fp64 for fp64 input).
    """
    dtype = torch.promote_types(pred_TK.dtype, torch.float32)
    pixels_TK = patchify(images_BCHW, patch_size, indices_T=indices_T, dtype=dtype)
    variance_T1, mean_T1 = torch.var_mean(pixels_TK, dim=1, keepdim=True)
    return F.mse_loss(pred_TK.to(dtype), (pixels_TK - mean_T1) * (variance_T1 + PIXEL_EPS).rsqrt())


@dataclass(frozen=True, kw_only=True)
class HiddenPixels(ABC):
    """What MAE and CAE answer alike: one encoder, trained by gradients alone, no target encoder and no EMA.

    encoder: its size. image_size, patch_size: pixels. recompute_every: every which block of the encoder, and of what
    follows it, is computed again in the backward; 0: none. compiled: whether blocks run through torch.compile.
    Their modules have the encoder as context_encoder, as I-JEPA's: from one seed all start from the same encoder.
    """

    encoder: ViTSize
    image_size: int
    patch_size: int
    draw_masks: HiddenMasks
    recompute_every: tuple[int, int] = (0, 0)
    compiled: bool = False
    seed: int = 0

    @property
    def grid(self) -> PatchGrid:
        return self.draw_masks.grid

    @property
    def pixels(self) -> int:
        """Of a patch."""
        return 3 * self.patch_size**2

    def averaged(self, module: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        return ()

    def initial_weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        return initial_weight(name, shape, self.seed)

    def encoders(self, module: nn.Module) -> dict[str, VisionTransformer]:
        encoder = module.get_submodule("context_encoder")
        assert isinstance(encoder, VisionTransformer)
        return {"context": encoder}

    @abstractmethod
    def flops(self, images: float) -> tuple[dict[str, float], float]:
        """Of so many images: what the method needs by network, and in all what is computed."""

    def done(self, masks: Masks) -> dict[str, float]:
        needed, computed = self.flops(masks.num_images)
        return {
            "model_flops": sum(needed.values()),
            "hardware_flops": computed,
            "context_tokens": masks.context.num_tokens,
            "target_tokens": masks.target_blocks.num_tokens,
        }

    def shown(self, masks: Masks) -> list[Shown]:
        seen, hidden = (packed.patches(masks.num_patches) for packed in (masks.context, masks.target_blocks))
        return [Shown(part, [other]) for part, other in zip(seen, hidden, strict=True)]

    def batch_facts(self) -> tuple[str, ...]:
        return ()

    def advice(self) -> str:
        return ""

    def check(self) -> None:  # noqa: B027
        """There is nothing to refuse: some patches are hidden and some seen."""

    def check_micro_step(self, images: int) -> None:  # noqa: B027
        """Any number will do."""
