"""The exponential moving average of weights."""

import torch


@torch.no_grad()
def ema_update(
    ema: torch.Tensor, source: torch.Tensor, momentum: float, target: torch.Tensor | None = None
) -> torch.Tensor:
    """ema = momentum * ema + (1 - momentum) * source, in place; its copy goes to target.

    ema: any shape, fp32: in bf16 an average loses nearly all of its small updates. source: same shape. target: same
    shape, bf16 or fp32, or None. Momentum 1 leaves ema as it is, bit for bit.
    """
    ema.lerp_(source.to(ema.dtype), 1.0 - momentum)
    if target is not None:
        target.copy_(ema)
    return ema
