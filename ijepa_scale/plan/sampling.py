"""Masks as training draws them, which tokens, FLOPs and activations are means over."""

from dataclasses import dataclass
from typing import Any

from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.objective import Objective

SAMPLED_STEPS, SAMPLED_IMAGES = 200, 16  # images of each
LARGEST_IMAGES = 64  # at least, of the step with the most tokens: its mean is that of more images than its size is


@dataclass(frozen=True, kw_only=True, eq=False)  # told apart by what they are, not by what is in them
class Sampled:
    """Masks of some steps, and those of the step with the most tokens, drawn for more images."""

    masks: list[Any]
    largest: Any

    @property
    def counts(self) -> Counts:
        return Counts.mean([Counts.of(one) for one in self.masks])


def is_fixed(objective: Objective) -> bool:
    """Whether the micro-batch alters what is learned: then the config's own is kept."""
    return bool(objective.batch_facts())


def sample(objective: Objective, micro_batch: int) -> Sampled:
    """Masks of micro-batches as they are where these alter what is learned, else of a few images of many steps."""
    images = micro_batch if is_fixed(objective) else SAMPLED_IMAGES
    steps = max(1, SAMPLED_STEPS * SAMPLED_IMAGES // images)
    masks = [objective.draw_masks(step, range(images)) for step in range(steps)]
    kept = [sum(objective.expected([one]).kept_bytes.values()) for one in masks]
    most = max(range(steps), key=lambda step: kept[step])
    return Sampled(masks=masks, largest=objective.draw_masks(most, range(max(images, LARGEST_IMAGES))))
