"""Another objective, tiny: the pixels of hidden patches, by a linear head. It has no target encoder."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_scale.data.order import generator_for
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Packed
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.objective import Expected, Shown, Total

SIZE = ViTSize(width=32, depth=1, heads=2, mlp_width=64)  # not the config's
IMAGE, PATCH = 32, 4


@dataclass(frozen=True)
class HalfMasks:
    """seen: one sequence an image. hidden_TB: (B, N / 2) patches."""

    seen: Packed
    hidden_BK: torch.Tensor

    @property
    def num_images(self) -> int:
        return len(self.hidden_BK)


class PixelModel(nn.Module):
    def __init__(self, attend: Attend | None):
        super().__init__()
        self.encoder = VisionTransformer(SIZE, image_size=IMAGE, patch_size=PATCH, attend=attend)
        self.head = nn.Linear(SIZE.width, 3 * PATCH**2)

    def forward(self, images_BCHW: torch.Tensor, masks: HalfMasks) -> dict[str, torch.Tensor]:
        """Each hidden patch from the mean of what is seen of its image, and where it is."""
        seen_BKD = self.encoder(images_BCHW, masks.seen).unflatten(0, (masks.num_images, -1))
        where_BKD = self.encoder.pos_embed[0, masks.hidden_BK].to(seen_BKD.dtype)
        pixels = F.unfold(images_BCHW.float() / 255, PATCH, stride=PATCH).transpose(1, 2)  # (B, N, 3 * PATCH**2)
        wanted = pixels.gather(1, masks.hidden_BK[..., None].expand(-1, -1, pixels.shape[-1]))
        loss = F.mse_loss(self.head(seen_BKD.mean(dim=1, keepdim=True) + where_BKD).float(), wanted)
        return {"loss": loss, "pixels": loss.detach()}


@dataclass(frozen=True)
class PixelObjective:
    """Half of the patches are seen."""

    seed: int = 0

    @property
    def name(self) -> str:
        return "pixels"

    def attention_heads(self) -> dict[str, tuple[int, int]]:
        return {"encoder": (SIZE.heads, SIZE.width // SIZE.heads)}

    @property
    def grid(self) -> PatchGrid:
        return PatchGrid(IMAGE // PATCH, IMAGE // PATCH)

    def draw_masks(self, step: int, positions: range) -> HalfMasks:
        number = self.grid.num_patches
        orders = np.stack([generator_for(self.seed, 9, step, position).permutation(number) for position in positions])
        seen = torch.from_numpy(np.sort(orders[:, : number // 2]) + number * np.arange(len(orders))[:, None])
        bounds = torch.arange(len(orders) + 1, dtype=torch.int32) * (number // 2)
        packed = Packed(seen.flatten().int(), bounds, number // 2, len(orders) * (number // 2) ** 2)
        return HalfMasks(packed, torch.from_numpy(orders[:, number // 2 :]))

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> PixelModel:
        return PixelModel((attend or {}).get("encoder"))

    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        return {"encoder": module.get_submodule("encoder"), "head": module.get_submodule("head")}

    def averaged(self, module: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        return ()

    def initial_weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        return initial_weight(name, shape, self.seed)

    def encoders(self, module: nn.Module) -> dict[str, VisionTransformer]:
        assert isinstance(module, PixelModel)
        return {"context": module.encoder}

    def done(self, masks: HalfMasks) -> dict[str, float]:
        return {"model_flops": 1e6, "hardware_flops": 1e6, "seen_tokens": masks.seen.num_tokens}

    def expected(self, masks: Sequence[HalfMasks]) -> Expected:
        return Expected("half of the patches", {"encoder": 1e6}, {"encoder": 1e3})

    def shown(self, masks: HalfMasks) -> list[Shown]:
        seen = masks.seen.patches(self.grid.num_patches)
        return [Shown(part, [hidden]) for part, hidden in zip(seen, masks.hidden_BK.numpy(), strict=True)]

    def architecture(self) -> dict[str, int]:
        return {"width": SIZE.width}

    def batch_facts(self) -> tuple[str, ...]:
        return ()

    def advice(self) -> str:
        return ""

    def check(self) -> None:
        """There is nothing to refuse."""

    def check_micro_step(self, images: int) -> None:
        """Any number will do."""


def pretrain_pixels(config: str, *overrides: str) -> None:
    """A run of this objective; inside a rank."""
    from ijepa_scale.config import load_config
    from ijepa_scale.train import pretrain

    assert pretrain(load_config(config, list(overrides)), objective=PixelObjective()) == 0
