import math

import pytest
import torch

from ijepa_scale.engine.optim import make_optimizer, set_schedules
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.ijepa import IJepa
from tests.engine.tiny import groups_of


def tiny_model():
    encoder, target = (
        VisionTransformer(ViTSize(width=8, depth=1, heads=2, mlp_width=12), image_size=8, patch_size=4)
        for _ in range(2)
    )
    predictor = Predictor(ViTSize(width=4, depth=1, heads=1, mlp_width=6), encoder_width=8, grid=encoder.grid)
    return IJepa(encoder, predictor, target)


def test_each_trained_parameter_is_in_one_group_and_the_target_in_none():
    model = tiny_model()
    groups = groups_of(model)
    assert [group["name"] for group in groups] == [
        "context_encoder.decay",
        "context_encoder.no_decay",
        "predictor.decay",
        "predictor.no_decay",
    ]
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(group_of)
    for name, parameter in model.named_parameters():
        if name.startswith("target_encoder."):
            assert parameter not in group_of
            continue
        group = group_of[parameter]
        decays = name.endswith("mask_token") or (name.endswith("weight") and "norm" not in name)
        assert group["decay"] == decays, name
        assert group["ema"] == name.startswith("context_encoder.")
        assert group["name"] == f"{name.split('.')[0]}.{'decay' if decays else 'no_decay'}"


def test_partitioned_parameters_are_grouped_by_their_whole_shape():
    """Under ZeRO-3 a parameter is empty between uses and carries ds_shape."""
    whole, partitioned = tiny_model(), tiny_model()
    for parameter in partitioned.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    names = [
        [[names[p] for p in group["params"]] for group in groups_of(model)]
        for model in (whole, partitioned)
        for names in [{parameter: name for name, parameter in model.named_parameters()}]
    ]
    assert names[0] == names[1] and all(names[0])


def test_set_schedules():
    groups = groups_of(tiny_model())
    set_schedules(groups, lr=0.3, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [0.3] * 4
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    set_schedules(groups, lr=0.2, weight_decay=0.4)
    assert [group["lr"] for group in groups] == [0.2] * 4
    assert [group["weight_decay"] for group in groups] == [0.4, 0.0, 0.4, 0.0]


def naive_adamw(value, grads, lrs, decays, beta1, beta2, eps=1e-8):
    """One number, in Python floats (Loshchilov and Hutter, arXiv:1711.05101)."""
    m = v = 0.0
    for step, (grad, lr, decay) in enumerate(zip(grads, lrs, decays, strict=True), start=1):
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad * grad
        value -= lr * decay * value
        value -= lr * (m / (1 - beta1**step)) / (math.sqrt(v / (1 - beta2**step)) + eps)
    return value


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_adamw_matches_the_formula_under_changing_schedules(betas):
    model = tiny_model().double()
    groups = groups_of(model)
    optimizer = make_optimizer(groups, betas)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    lrs, decays, grads = [0.1, 0.02, 0.05], [0.04, 0.2, 0.4], {name: [] for name in before}
    for lr, decay in zip(lrs, decays, strict=True):
        set_schedules(optimizer.param_groups, lr=lr, weight_decay=decay)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            grads[name].append(parameter.grad.flatten().tolist())
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.startswith("target_encoder."):
            assert torch.equal(parameter, before[name])
            continue
        used = decays if parameter.ndim > 1 else [0.0] * 3
        for place, value in enumerate(before[name].flatten().tolist()):
            expected = naive_adamw(value, [step[place] for step in grads[name]], lrs, used, *betas)
            assert parameter.detach().flatten()[place].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_nothing_moves_before_the_first_schedule_is_set():
    model = tiny_model()
    optimizer = make_optimizer(groups_of(model), (0.9, 0.999))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
