"""The dense step of docs/lab beside the packed one that trains, and its updates beside the project's optimizers."""

import sys
from dataclasses import replace

import pytest
import torch

from ijepa_scale.engine import muon
from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "docs" / "lab"))
import dense_loss
import dense_step

IMAGES = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RECIPE = dense_loss.Recipe(
    images=24, batch=6, image_size=32, patch=4, width=64, depth=3, predictor_width=32, predictor_depth=2
)


def dense_of(masks, images):
    """The packed masks of as many images, dense."""
    patches = masks.num_patches
    lengths = masks.context.cu_seqlens.diff().tolist()
    context = torch.zeros(images, max(lengths) + 3, dtype=torch.long)
    inside = torch.zeros(context.shape)
    for image, part in enumerate(masks.context.indices_T.long().split(lengths)):
        context[image, : len(part)], inside[image, : len(part)] = part % patches, 1
    rows = masks.target_patches_U.long()[masks.target_index_T.long()] % patches
    targets = torch.nn.functional.pad(rows.view(images, RECIPE.target_blocks, -1), (0, 5))
    real = torch.ones(targets.shape[-1])
    real[-5:] = 0
    return dense_loss.DenseMasks(context, inside, targets, real)


@pytest.mark.parametrize("layers", [(), (1, 3)])
def test_loss_and_gradients_are_those_of_the_packed_step(layers):
    recipe = replace(RECIPE, variance=0.02, covariance=0.004, target_layers=layers)
    module, spec = dense_loss.build(recipe)
    module.variance, module.covariance = recipe.variance, recipe.covariance
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    draw = dense_loss.BlockMasks(spec, "all", 0)
    masks = draw(3, range(6))
    run = dense_step.Run(recipe, IMAGES)
    loss = dense_loss.Loss(recipe, module, spec.grid, torch.device("cpu"), torch.Generator())
    found = loss((IMAGES[:6] - run.mean) / run.std, dense_of(masks, 6), torch.tensor(1.0))
    expected = module(IMAGES[:6], masks)["loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_updates_and_the_average_are_those_of_the_projects_optimizers(monkeypatch):
    gradients = []
    grad = torch.autograd.grad
    run = dense_step.Run(RECIPE, IMAGES)

    def kept(loss, parameters):
        gradients.append(grad(loss, parameters))
        return gradients[-1]

    start = [parameter.detach().clone() for parameter in run.parameters]
    monkeypatch.setattr(torch.autograd, "grad", kept)
    run.train(4)
    names = {id(parameter): name for name, parameter in run.module.named_parameters()}
    target = dict(run.module.named_parameters())
    for index, (parameter, value) in enumerate(zip(run.parameters, start, strict=True)):
        name = names[id(parameter)]
        by_muon = parameter.ndim == 2 and "blocks." in name
        momentum, average = torch.zeros_like(value), value.clone()
        adamw = torch.optim.AdamW([value.requires_grad_()], betas=(0.9, 0.999))
        for row, gradient in zip(run.rows, (step[index] for step in gradients), strict=True):
            lr, decay = row[0].item(), row[1].item() if value.ndim > 1 else 0.0
            with torch.no_grad():
                if by_muon:
                    lr *= RECIPE.muon_lr / RECIPE.lr
                    value.mul_(1 - lr * decay).sub_(muon.update(muon.direction(gradient, momentum, 1.0)), alpha=lr)
                else:
                    adamw.param_groups[0].update(lr=lr, weight_decay=decay)
                    value.grad = gradient
                    adamw.step()
                average.lerp_(value, row[2].item())
        torch.testing.assert_close(parameter.detach(), value.detach(), rtol=1e-4, atol=1e-6, msg=name)
        if name.startswith("context_encoder."):
            theirs = target[name.replace("context_encoder.", "target_encoder.")]
            torch.testing.assert_close(theirs.detach(), average.detach(), rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(run.average, run.flat[: len(run.average)])


@pytest.mark.parametrize(
    "change",
    [
        {"mask_sets": 2},
        {"context_loss": 0.5},
        {"stochastic_positions": 0.25},
        {"target_norm": "none", "dyn_tanh": 0.5},
        {"target_norm": "batch", "loss": "l1"},
        {"sigreg": 0.01, "variance": 0.0, "covariance": 0.0},
        {"muon_lr": 0.0},
    ],
    ids=str,
)
def test_each_change_trains(change):
    run = dense_step.Run(replace(RECIPE, **change), IMAGES)
    before = run.flat.clone()
    run.train(2)
    assert torch.isfinite(run.last_loss) and torch.isfinite(run.flat).all() and not torch.equal(run.flat, before)


@pytest.mark.gpu
def test_a_graph_takes_the_steps_that_eager_calls_take():
    recipe = replace(RECIPE, images=60, crop_scale=(1.0, 1.0), flip=False)  # random numbers differ within a graph
    eager, graphed = (dense_step.Run(recipe, IMAGES.cuda()) for _ in range(2))
    for _ in range(10):
        eager._step()
    graphed.train(6)
    graphed.train(10)
    torch.testing.assert_close(graphed.flat, eager.flat, rtol=1e-2, atol=1e-4)
