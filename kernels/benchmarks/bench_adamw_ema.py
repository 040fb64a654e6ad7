"""The end of a step on one flat shard, in one pass and in the passes that it replaces."""

import pytest
import torch

from benchmarks.bench_ema import MODELS
from benchmarks.cases import CASES, DEVICE, case_of, num_bytes
from ijepa_kernels.adamw_ema import adamw_ema, adamw_ema_definition
from ijepa_kernels.ema import ema_update
from ijepa_scale import build

RATES = {"lr": 1e-3, "weight_decay": 0.04, "betas": (0.9, 0.999), "eps": 1e-8}
MOMENTUM = 0.996
GRADIENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def passes(master, grad, exp_avg, exp_avg_sq, *, step, grad_scale, weight, ema, target):
    """What the passes of a step are apart: gradients in fp32, their clipping, AdamW, copy, average with its copy."""
    grad = grad.float().mul_(grad_scale)
    state = [[tensor] for tensor in (master, grad, exp_avg, exp_avg_sq)]
    rates = {"lr": 1e-3, "weight_decay": 0.04, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    torch._fused_adamw_(*state, [], [step], **rates, amsgrad=False, maximize=False)
    weight.copy_(master)
    ema_update(ema, master, MOMENTUM, target)


def formulas(master, grad, exp_avg, exp_avg_sq, *, step, grad_scale, weight, ema, target):
    """As torch.compile fuses them."""
    grad = grad.float() * grad_scale
    exp_avg.lerp_(grad, 0.1)
    exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
    root = exp_avg_sq.sqrt() / (1 - 0.999**step).sqrt() + 1e-8
    master.mul_(1 - 1e-3 * 0.04).sub_(1e-3 / (1 - 0.9**step) * exp_avg / root)
    weight.copy_(master)
    ema.lerp_(master, 1 - MOMENTUM)
    target.copy_(ema)


PROVIDERS = {
    "ours": lambda *state, **rest: adamw_ema(*state, **RATES, momentum=MOMENTUM, **rest),
    "definition": lambda *state, **rest: adamw_ema_definition(*state, **RATES, momentum=MOMENTUM, **rest),
    "compiled": torch.compile(formulas, dynamic=False),
    "torch._fused_adamw_, copy, ema_update": passes,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_all_weights(name, gradient, provider, row):
    case = case_of(*next(one for one in CASES if one[0] == name))
    with torch.device("meta"):
        count = sum(p.numel() for p in build.build_encoder(case.config).parameters())
    master, ema, exp_avg = (torch.randn(count, device=DEVICE) * 0.02 for _ in range(3))
    exp_avg_sq, grad = exp_avg.square(), torch.randn(count, device=DEVICE).to(GRADIENTS[gradient])
    weight, target = (torch.empty(count, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    step, scale = torch.tensor(100.0, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    rest = {"step": step, "grad_scale": scale, "weight": weight, "ema": ema, "target": target}
    moved = num_bytes(grad, weight, target) + 2 * num_bytes(master, exp_avg, exp_avg_sq, ema)
    row(
        lambda: PROVIDERS[provider](master, grad, exp_avg, exp_avg_sq, **rest),
        op=f"adamw_ema, {gradient} gradients",
        shape=f"{case.config.model.name}, {count / 1e6:,.0f} M",
        provider=provider,
        bytes_moved=moved,
    )
