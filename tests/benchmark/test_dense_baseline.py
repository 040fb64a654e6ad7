"""The benchmark compares like with like: the dense baseline trains as ijepa_scale does."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa_scale.benchmark.dense_baseline import DenseJepa, DenseMasks
from ijepa_scale.benchmark.step import Setting, dense_flops, sampled_masks
from ijepa_scale.build import build_ijepa, build_model
from ijepa_scale.config import load_config
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.optim import make_optimizer, set_schedules
from tests.engine.tiny import groups_of
from tests.processes import ROOT

SMALL = ["model.depth=2", "model.width=48", "predictor.width=48", "predictor.depth=2"]
NO_TERMS = ["loss.variance=0", "loss.covariance=0"]  # the baseline has none
BATCH, STEPS = 6, 3


@pytest.fixture
def config():
    return load_config(ROOT / "configs" / "tiny.yaml", SMALL + NO_TERMS)


def batches(config):
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        images = torch.randint(256, (BATCH, 3, 64, 64), generator=generator).to(torch.uint8)
        yield images, sampled_masks(build_ijepa(config), BATCH, step, "batch_min")


def test_loss_gradients_and_three_steps_are_those_of_the_model(config):
    ours = build_model(config)
    dense = DenseJepa(ours)
    assert dense.state_dict().keys() == ours.state_dict().keys()
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    optimizers = [make_optimizer(groups_of(model), (0.9, 0.999)) for model in (ours, dense)]
    for images, masks in batches(config):
        losses = ours(images, masks)["loss"], dense(images, DenseMasks.of(masks))
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            set_schedules(optimizer.param_groups, lr=1e-4, weight_decay=0.1)
        twins = list(zip(ours.named_parameters(), dense.parameters(), strict=True))
        for (name, own), theirs in twins:
            if own.grad is None:
                assert theirs.grad is None and name.startswith("target_encoder.")
            else:
                assert (own.grad - theirs.grad).abs().max() <= 1e-5 * own.grad.abs().max() + 1e-9, name
        for optimizer, model in zip(optimizers, (ours, dense), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            model.update_target(0.9)
    moved = torch.cat([(p - start[name]).abs().flatten() for name, p in ours.named_parameters()])
    apart = torch.cat([(own - theirs).abs().flatten() for (_, own), theirs in twins])
    # Adam divides by the gradient's size: where that is rounding alone (keys' biases) weights part, but no others.
    assert apart.mean() < 1e-3 * moved.mean()
    assert (apart > 1e-5).double().mean() < 0.01


def test_flops_without_values_are_those_of_a_step(config):
    objective, ranks = build_ijepa(config), Ranks(0, 1, 0, torch.device("cpu"))
    masks = [DenseMasks.of(sampled_masks(objective, BATCH, step, "batch_min")) for step in range(4)]
    dense = DenseJepa(build_model(config))
    expected = []
    for one in masks:
        with FlopCounterMode(display=False) as counter:
            dense(torch.zeros(BATCH, 3, 64, 64, dtype=torch.uint8), one).backward()
        expected.append(counter.get_total_flops())
    assert dense_flops(Setting(config, objective, ranks, "fp32", BATCH), masks) == expected
    assert len(set(expected)) > 1


def test_contexts_of_unequal_lengths_are_refused(config):
    with pytest.raises(ValueError, match="batch_min"):
        DenseMasks.of(sampled_masks(build_ijepa(config), BATCH, 0, "all"))
