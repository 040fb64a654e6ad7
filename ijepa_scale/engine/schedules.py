"""Learning rate, weight decay and EMA momentum as pure functions of the step, so that there is no state to save."""

import math
from dataclasses import dataclass


def learning_rate(step: int, total_steps: int, *, warmup_steps: int, start: float, peak: float, final: float) -> float:
    """Linear from start to peak over warmup_steps, then cosine to final at total_steps (arXiv:2301.08243, A.1)."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    return cosine(step - warmup_steps, max(1, total_steps - warmup_steps), peak, final)


def cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from start at step 0 to end at total_steps; also the weight decay's schedule."""
    progress = min(step / total_steps, 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_momentum(step: int, total_steps: int, start: float, end: float) -> float:
    """Linear from start at step 0 to end at total_steps."""
    return start + (end - start) * min(step / total_steps, 1.0)


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """What of the optimization depends on the step. total, warmup: steps; pairs are (from, to)."""

    total: int
    warmup: int
    start_lr: float
    lr: float
    final_lr: float
    weight_decay: tuple[float, float]
    ema: tuple[float, float]

    def at(self, step: int) -> dict[str, float]:
        """lr, weight_decay and ema_momentum of a step."""
        return {
            "lr": learning_rate(
                step, self.total, warmup_steps=self.warmup, start=self.start_lr, peak=self.lr, final=self.final_lr
            ),
            "weight_decay": cosine(step, self.total, *self.weight_decay),
            "ema_momentum": ema_momentum(step, self.total, *self.ema),
        }
