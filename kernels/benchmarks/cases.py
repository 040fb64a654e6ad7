"""The shapes of configs/: what training draws for a micro-batch."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ijepa_scale import build
from ijepa_scale.benchmark.step import sampled_masks
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.masking.packing import Masks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# (config, images): micro-batches of 32 to 128
BATCHES = [("vitb16", 128), ("vitl16", 128), ("vith14", 32), ("vith14", 128), ("vitg16", 32)]
CASES = BATCHES if ON_GPU else [("vits16", 4)]
COMPILED = [("vitb16", 128), ("vith14", 128)]  # torch.compile takes too long for all


@dataclass(frozen=True)
class Case:
    config: PretrainConfig
    masks: Masks
    images: int
    width: int

    @property
    def label(self) -> str:
        return f"{self.config.model.name}/{self.config.model.patch_size} x {self.images}"


@cache
def case_of(name: str, images: int) -> Case:
    config = load_config(CONFIGS / f"{name}.yaml", [])
    masks = sampled_masks(build.build_ijepa(config), images, 0, "all").to(DEVICE)
    return Case(config, masks, images, build.vit_size(config.model).width)


def tokens(rows: int, width: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(rows, width, device=DEVICE, dtype=dtype)


def num_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
