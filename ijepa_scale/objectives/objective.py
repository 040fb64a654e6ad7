"""What every objective answers. Parts are handed these answers; none of them knows an objective's words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.vit import VisionTransformer

Total = Callable[[torch.Tensor], torch.Tensor]  # this rank's tensor -> the sum of all ranks', with gradients


@dataclass(frozen=True)
class Shown:
    """One image's masks, to be drawn: patch indices that the encoder sees, and blocks of those it does not."""

    seen: np.ndarray
    hidden: list[np.ndarray]


@dataclass(frozen=True)
class Expected:
    """Means over layouts. tokens: in words. flops: an image's, by network. kept_bytes: for the backward, in bf16."""

    tokens: str
    flops: dict[str, float]
    kept_bytes: dict[str, float]


class Objective(Protocol):
    """A frozen value that says what is learned from a batch. It can be pickled: loader processes hold it.

    masks, wherever it stands: what draw_masks() gives, a frozen dataclass of tensors (packing.map_tensors moves it).
    """

    @property
    def grid(self) -> PatchGrid:
        """The patch grid of an image."""

    @property
    def name(self) -> str:
        """What a checkpoint calls it: a run is never gone on from as another objective."""

    def attention_heads(self) -> dict[str, tuple[int, int]]:
        """(heads, width of a head) of each network that attends over packed tokens, for a kernel to be tested at.

        predictor.attention is of the one named "predictor", model.attention of all others.
        """

    def draw_masks(self, step: int, positions: range) -> Any:
        """The masks of the images at positions of the global batch of a step, on the CPU: a pure function of these.

        It has num_images.
        """

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> nn.Module:
        """The module, its weights not drawn yet. Its forward(images, masks) gives scalars: "loss", to be minimized.

        Whatever else it gives is a term of the loss, for the records, without gradients. images: (B, 3, H, W) uint8.
        attend: kernels for packed tokens, by the names of attention_heads(); None, or none there: PyTorch's. total: for
        terms over all ranks' images; None: one rank.
        """

    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        """The networks that the optimizer trains, by their names in the module."""

    def averaged(self, module: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs of a trained parameter and the one that is its EMA; none where the objective has no target."""

    def initial_weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A parameter's initial value, fp32 on the CPU, by its name in the module."""

    def encoders(self, module: nn.Module) -> dict[str, VisionTransformer]:
        """What is worth evaluating, the best first: "target" where there is one, and "context"."""

    def done(self, masks: Any) -> dict[str, float]:
        """What a micro-step works on, to be summed: "model_flops", "hardware_flops", and counts for the records."""

    def expected(self, masks: Sequence[Any]) -> Expected:
        """What an image takes, by masks of some micro-batches."""

    def shown(self, masks: Any) -> list[Shown]:
        """The masks of each image, for a picture."""

    def architecture(self) -> dict[str, Any]:
        """What fixes the weights' shapes and what they are for, in JSON's types: a checkpoint is compared with it."""

    def batch_facts(self) -> tuple[str, ...]:
        """Which of "micro_batch_size" and "images_in_statistics" (those of all ranks) alter what is learned."""

    def advice(self) -> str:
        """What to set where features collapse, in words; "" where nothing is known."""

    def check(self) -> None:
        """Raise ValueError for settings that cannot be met, such as masks that cannot be drawn."""

    def check_micro_step(self, images: int) -> None:
        """Raise ValueError for micro-steps that it cannot learn from. images: of all ranks in one."""
