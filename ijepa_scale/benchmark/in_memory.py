"""A run as training sets it up, of random images in memory, whose weights are drawn on the device."""

import contextlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.collate import Batch, micro_batch_stream
from ijepa_scale.data.images import BadImage, ImageSet
from ijepa_scale.data.transforms import RandomCrop
from ijepa_scale.engine import distributed
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.objectives.ijepa import IJepa, IJepaObjective
from ijepa_scale.run.setup import Run, set_up

DISTINCT = 64  # images that differ: beyond these they come again


class RandomImages(ImageSet):
    """num_images square images of uint8 noise, that no crop changes."""

    def __init__(self, size: int, num_images: int) -> None:
        self.name, self.split, self.num_images = "random images in memory", "train", num_images
        self._pixels = np.random.default_rng(0).integers(256, size=(DISTINCT, size, size, 3), dtype=np.uint8)

    def crop_or_substitute(self, index: int, crop: RandomCrop) -> tuple[np.ndarray, tuple[BadImage, ...]]:
        return self._pixels[index % DISTINCT].transpose(2, 0, 1), ()


@dataclass(frozen=True, kw_only=True)
class DrawnOnDevice(IJepaObjective):
    """I-JEPA whose module is made on the device and whose weights are drawn there.

    Drawing ViT-H's on the host takes as long as timing it. They have the usual standard deviation.
    """

    device: torch.device

    @classmethod
    def of(cls, objective: IJepaObjective, device: torch.device) -> "DrawnOnDevice":
        return cls(**{item.name: getattr(objective, item.name) for item in fields(IJepaObjective)}, device=device)

    def build(self, *, attend: Any = None, total: Any = None) -> IJepa:
        with self.device:
            return super().build(attend=attend, total=total)

    def initial_weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A pure function of the name; the target encoder starts as the context encoder."""
        if len(shape) < 2:
            return initial_weight(name, shape, self.seed)
        seed = zlib.crc32(name.replace("target_encoder.", "context_encoder.").encode())
        generator = torch.Generator(self.device).manual_seed(seed)
        return 0.02 * torch.randn(shape, generator=generator, device=self.device)


@contextlib.contextmanager
def one_process() -> Iterator[Ranks]:
    """The process group of this process alone, and its device. ValueError where a launcher has started several."""
    ranks = distributed.start()
    try:
        if ranks.world_size > 1:
            raise ValueError(f"the benchmark is one process, got {ranks.world_size}; start it with python")
        yield ranks
    finally:
        ranks.close()


def run_in_memory(
    config: PretrainConfig, objective: IJepaObjective, ranks: Ranks, *, batch: int, steps: int, folder: Path
) -> Run:
    """A run of `steps` steps of one micro-batch of `batch` images, set up anew as training does it, in folder.

    Raises ValueError where training would be refused.
    """
    optimization = replace(
        config.optimization, global_batch_size=batch, micro_batch_size=batch, max_steps=steps, stop_at_step=0
    )
    data = replace(config.data, workers=0, streaming=False)
    config = replace(config, optimization=optimization, data=data, run_dir=str(folder))
    images = RandomImages(config.data.image_size, batch * steps)
    return set_up(config, objective, ranks, resume="never", allow_changes=False, given=images)


def batches_of(run: Run, steps: int) -> list[Batch]:
    """Its first micro-batches as its loader makes them: in page-locked memory where there is a GPU."""
    pinned = run.ranks.device.type == "cuda"
    return list(micro_batch_stream(run.dataset, start_step=0, stop_step=steps, workers=0, pinned=pinned))


def attention_of(run: Run) -> str:
    """The kernel that it attends with, as its folder records it."""
    return json.loads((run.folder.path / "environment.json").read_text())["attention"]
