import math

import pytest
import torch

from ijepa_kernels.adamw_ema import adamw_ema
from ijepa_kernels.ema import ema_update
from tests.kernels.accuracy import INTERPRETED, values
from tests.kernels.test_ema import ulp

RATES = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.04}
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts bf16 off where hardware rounds


def shard(count, device="cpu", dtype=torch.float32):
    """A shard in the midst of training, as the arguments of adamw_ema()."""
    master, exp_avg = values(count, scale=0.02), values(count, seed=1, scale=1e-3)
    exp_avg_sq = values(count, seed=2, scale=1e-3).square()
    ema = master + values(count, seed=3, scale=1e-4)
    state = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    return {name: tensor.to(device, dtype) for name, tensor in state.items()}


def exactly(state, grad, *, step, lr, betas, eps, weight_decay, momentum, scale=1.0):
    """The formulas in float64, out of place."""
    state = {name: tensor.double() for name, tensor in state.items()}
    grad = grad.double() * scale
    exp_avg = betas[0] * state["exp_avg"] + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * grad**2
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    update = lr * (exp_avg / (1 - betas[0] ** step)) / denominator
    master = state["master"] * (1 - lr * weight_decay) - update
    ema = momentum * state["ema"] + (1 - momentum) * master
    return {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}, update


@pytest.mark.parametrize("count", [1, 7, 2048, 4099])
@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize("grad_dtype, scale", [(torch.float32, 1.0), (HALF, 0.37)])
def test_one_step_is_within_roundings_of_float64(count, step, grad_dtype, scale, device):
    state = shard(count, device)
    if step == 1:
        state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
    grad = values(count, seed=4, scale=1e-2).to(device, grad_dtype)
    weight, target = (torch.full((count,), 7.0, dtype=HALF, device=device) for _ in range(2))
    rates = {**RATES, "lr": 1e-3, "step": step, "momentum": 0.996}
    exact, update = exactly(state, grad, **rates, scale=float(torch.tensor(scale)))
    before = {name: tensor.clone() for name, tensor in state.items()}
    grad_before = grad.clone()
    adamw_ema(grad=grad, grad_scale=torch.tensor(scale, device=device), weight=weight, target=target, **state, **rates)
    assert torch.equal(grad, grad_before)
    larger = torch.maximum(before["exp_avg"].abs(), grad.float().abs() * scale)  # what exp_avg is made of may cancel
    allowed = {
        "exp_avg": 2 * ulp(larger),
        "exp_avg_sq": 4 * ulp(exact["exp_avg_sq"]),
        "master": ulp(before["master"]) + 8 * ulp(update * larger / exact["exp_avg"]),
        "ema": ulp(torch.maximum(before["ema"].abs(), exact["master"].abs())) + ulp(before["master"]),
    }
    for name, error in allowed.items():
        assert ((state[name].double() - exact[name]).abs() <= error).all(), name
    assert torch.equal(weight, state["master"].to(HALF)) and torch.equal(target, state["ema"].to(HALF))
    assert torch.equal(state["ema"], ema_update(before["ema"], state["master"], 0.996))


def test_fifty_steps_are_those_of_float64_and_of_torch(device):
    """With another rate and momentum at each step, and a norm that is clipped, from torch's own initial state."""
    state = shard(513, device)
    state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
    exact = {name: tensor.double() for name, tensor in state.items()}
    parameter, average = torch.nn.Parameter(state["master"].clone()), state["ema"].clone()
    weight, target = (torch.zeros(513, dtype=HALF, device=device) for _ in range(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.0, fused=True, **RATES)
    for step in range(1, 51):
        grad = values(513, seed=step, scale=1e-2 * step).to(device, HALF)
        scale = torch.clamp(2.0 / grad.float().norm(), max=1.0)
        lr, momentum = 1e-3 * math.sin(step / 20), 0.99 + step / 1e4
        exact, _ = exactly(exact, grad, step=step, lr=lr, momentum=momentum, scale=scale.double(), **RATES)
        parameter.grad = grad.float() * scale
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        ema_update(average, parameter.detach(), momentum)
        rates = {"lr": lr, "step": optimizer.state[parameter]["step"], "momentum": momentum, **RATES}
        adamw_ema(grad=grad, grad_scale=scale, weight=weight, target=target, **state, **rates)
    kept = optimizer.state[parameter]
    theirs = {"master": parameter.detach(), "ema": average, **{name: kept[name] for name in ("exp_avg", "exp_avg_sq")}}
    for name, tensor in state.items():
        size = exact[name].abs().max().item()
        torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-5, atol=1e-6 * size)
        if device == "cpu" and not INTERPRETED:
            assert torch.equal(tensor, theirs[name]), name
    assert kept["step"] == 50, "the step is the caller's to count"
    assert (state["master"] - shard(513, device)["master"]).abs().mean() > 0.002, "fifty steps went somewhere"


def test_what_is_left_out_changes_nothing_else(device):
    whole, alone = shard(100, device), shard(100, device)
    grad = values(100, seed=4).float().to(device)
    weight = torch.zeros(100, dtype=HALF, device=device)
    adamw_ema(grad=grad, lr=1e-3, step=3, momentum=0.9, weight=weight, **whole, **RATES)
    ema = alone.pop("ema")
    adamw_ema(grad=grad, lr=1e-3, step=torch.tensor(3.0, device=device), grad_scale=1.0, **alone, **RATES)
    assert all(torch.equal(whole[name], alone[name]) for name in alone)
    assert torch.equal(ema, shard(100, device)["ema"]) and not torch.equal(ema, whole["ema"])


def test_momentum_zero_and_one_and_no_rate_are_exact(device):
    state, grad = shard(100, device), values(100, seed=4).float().to(device)
    before = {name: tensor.clone() for name, tensor in state.items()}
    adamw_ema(grad=grad, lr=0.0, step=1, momentum=1.0, **state, **RATES)
    assert torch.equal(state["master"], before["master"]) and torch.equal(state["ema"], before["ema"])
    assert not torch.equal(state["exp_avg"], before["exp_avg"])
    adamw_ema(grad=grad, lr=1e-3, step=2, momentum=0.0, **state, **RATES)
    assert torch.equal(state["ema"], state["master"]) and not torch.equal(state["master"], before["master"])


def test_parts_of_buffers_that_start_anywhere_and_empty_ones(device):
    """As the shards of ranks: nothing outside of the part is written."""
    state, grad = shard(100, device), values(100, seed=4).float().to(device)
    part = {name: tensor[3:90] for name, tensor in state.items()}
    expected = {name: tensor.clone() for name, tensor in part.items()}
    target = torch.full((100,), 7.0, dtype=HALF, device=device)
    adamw_ema(grad=grad[3:90].clone(), lr=1e-3, step=2, momentum=0.9, **expected, **RATES)
    adamw_ema(grad=grad[3:90], lr=1e-3, step=2, momentum=0.9, target=target[1:88], **part, **RATES)
    for name, before in shard(100, device).items():
        assert torch.equal(state[name][3:90], expected[name])
        assert torch.equal(state[name][:3], before[:3]) and torch.equal(state[name][90:], before[90:])
    assert torch.equal(target[1:88], part["ema"].to(HALF)) and (target[:1] == 7).all() and (target[88:] == 7).all()
    adamw_ema(grad=grad[:0], lr=1e-3, step=2, **{name: tensor[:0] for name, tensor in state.items()}, **RATES)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_rates_and_steps_compile_nothing_anew():
    """Triton compiles anew for another constant, and for integers and pointers that it takes for special."""
    from ijepa_kernels import dispatch

    def launched(**changed):
        state = shard(64)
        rates = {"lr": 1e-3, "step": 3, "momentum": 0.9, "grad_scale": torch.tensor(0.5), **RATES}
        with dispatch.recording() as recorded:
            adamw_ema(grad=state["master"], **state, **{**rates, **changed})
        ((_, arguments, options),) = recorded
        kinds = [argument if isinstance(argument, int) else type(argument) for argument in arguments]
        return kinds, options

    for changed in ({"lr": 0}, {"step": 1}, {"step": 16}, {"momentum": 1}, {"weight_decay": 0}, {"grad_scale": 2}):
        assert launched(**changed) == launched(), changed
    assert launched(grad_scale=1.0) != launched(), "a change is seen"


def test_float64_goes_to_the_definition():
    state, grad = shard(9, dtype=torch.float64), values(9, seed=4)
    exact, _ = exactly(state, grad, lr=1e-3, step=3, momentum=0.9, **RATES)
    adamw_ema(grad=grad, lr=1e-3, step=3, momentum=0.9, **state, **RATES)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-12, atol=1e-15)


def test_wrong_arguments_are_named():
    four = torch.zeros(4)
    good = {**shard(4), "grad": four, "lr": 1e-3, "step": 1, **RATES}
    for changed, message in (
        ({"master": four.bfloat16()}, "master must be float32, got torch.bfloat16"),
        ({"exp_avg": four.half()}, "exp_avg must be torch.float32 as master, got torch.float16"),
        ({"ema": four.double()}, "ema must be torch.float32 as master"),
        ({"grad": torch.zeros(5)}, r"grad must be \(4,\) as master, got \(5,\)"),
        ({"weight": four.long()}, "weight must be of a floating type"),
        ({"weight": four.to("meta")}, "weight must be on cpu, got meta"),
        ({"ema": None, "target": four}, "target is a copy of ema, and ema is None"),
        ({"betas": (0.9, 1.0)}, r"betas must be 0 or more and below 1, got \(0.9, 1.0\)"),
        ({"momentum": 1.5}, "momentum must lie in 0..1, got 1.5"),
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"eps": float("nan")}, "eps must be 0 or more, got nan"),
        ({"step": torch.ones(2)}, "step must be a number, or one in float32 on cpu"),
        ({"grad_scale": torch.ones(1).double()}, r"grad_scale must be a number.* got \(1,\), torch.float64"),
        *([({"weight": torch.zeros(8)[::2]}, "weight must be contiguous")] if INTERPRETED else []),
    ):
        with pytest.raises(ValueError, match=message):
            adamw_ema(**{**good, **changed})
