from dataclasses import replace

import numpy as np
import pytest
import torch

from ijepa_scale.evals.linear import RECIPES, Head, Kind, LinearSettings, kinds, linear, lr_factor, optimizer
from tests.evals import worker_linear
from tests.evals.small import evaluation_of, splits_of_folder, write_splits
from tests.processes import assert_all, run_ranks

QUICK = LinearSettings(epochs=30, batch_size=32, drops=(), lr=0.5, features=True)


def test_the_recipe_of_imagenet_has_sixteen_heads_and_those_of_transfer_four():
    found = kinds(RECIPES["imagenet"], 4)
    assert len(set(found)) == 16
    assert {(kind.blocks, kind.norm) for kind in found} == {(4, True), (4, False), (1, True), (1, False)}
    assert {(kind.lr, kind.weight_decay) for kind in found} == {
        (0.1, 5e-4),
        (0.1, 0.0),
        (0.1 * 0.1, 5e-4),
        (0.1 * 0.1, 0.0),
    }
    assert len(kinds(RECIPES["transfer"], 4)) == 4
    assert len(kinds(RECIPES["transfer"], 1)) == 2  # of a network of one block: its output is all there is


def test_the_learning_rate_falls_at_the_epochs_or_along_a_cosine():
    steps = [lr_factor(step, 10, RECIPES["imagenet"]) for step in (0, 149, 150, 299, 300, 449, 450, 499)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    cosine = LinearSettings(epochs=50, drops=())
    assert lr_factor(0, 7, cosine) == 1.0
    assert lr_factor(175, 7, cosine) == pytest.approx(0.505)
    assert lr_factor(350, 7, cosine) == pytest.approx(0.01)  # 0.01 -> 1e-4, as VISSL's for Clevr


@pytest.mark.parametrize("weight_decay", [5e-4, 0.0])
def test_lars_is_that_of_the_paper(weight_decay):
    """Three steps of a head beside the formula (arXiv:1708.03888, algorithm 1), in fp64."""
    settings = LinearSettings(optimizer="lars")
    head = Head(3, Kind(1, False, 0.1, weight_decay), settings, width=6, classes=4, seed=0).double()
    head.optimizer = optimizer(head, settings)
    weight, bias = (parameter.detach().clone() for parameter in head.linear.parameters())
    bias += 0.1
    with torch.no_grad():
        head.linear.bias.copy_(bias)
    velocity, velocity_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    generator = torch.Generator().manual_seed(0)
    for factor in (4.0, 4.0, 0.4):
        features = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(4, (8,), generator=generator)
        shares = (features @ weight.T + bias).softmax(1)
        shares[torch.arange(8), labels] -= 1.0
        grad, grad_bias = shares.T @ features / 8, shares.mean(0)
        lr = factor * 0.1
        trust = 0.001 * weight.norm() / (grad.norm() + weight_decay * weight.norm())
        velocity = 0.9 * velocity + trust * (grad + weight_decay * weight)
        velocity_bias = 0.9 * velocity_bias + grad_bias
        weight, bias = weight - lr * velocity, bias - lr * velocity_bias
        head.learn(features, labels, factor=factor)
    torch.testing.assert_close(head.linear.weight.detach(), weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(head.linear.bias.detach(), bias, rtol=1e-7, atol=1e-9)


def test_a_head_reads_the_end_of_the_features_and_normalizes_with_the_training_batches():
    settings = LinearSettings()
    one, four = (Head(0, Kind(count, True, 0.1, 0.0), settings, width=5, classes=3, seed=0) for count in (1, 4))
    assert (one.width, four.width) == (5, 20)
    features = torch.randn(16, 20, generator=torch.Generator().manual_seed(0)) * 3 + 7
    normed = (features[:, -5:] - features[:, -5:].mean(0)) / (features[:, -5:].var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(one(features), normed @ one.linear.weight.T, atol=1e-4, rtol=1e-4)


def test_separable_images_are_told_apart_and_shuffled_labels_are_not(tmp_path):
    outcome = linear(evaluation_of(write_splits(tmp_path)), QUICK)
    assert [measure.value for measure in outcome.measures if measure.chosen] == [100.0]
    assert len(outcome.measures) == 4
    np.testing.assert_array_equal(outcome.predicted, outcome.labels)
    train, test = splits_of_folder(tmp_path)
    train = replace(train, labels=np.random.default_rng(0).permutation(train.labels))
    shuffled = linear(evaluation_of(tmp_path, train=train, test=test), QUICK)
    for measure in shuffled.measures:
        # Images of a class are as good as one image here: four draws.
        assert measure.value <= 50.0
        assert measure.chance == 25.0


@pytest.mark.parametrize("features", [True, False])
def test_two_ranks_give_what_one_gives(tmp_path, features):
    write_splits(tmp_path)
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.npz"
        assert_all(run_ranks(worker_linear.run, ranks, tmp_path / f"log{ranks}", str(tmp_path), str(out), features))
        found.append(np.load(out))
    np.testing.assert_array_equal(found[0]["values"], found[1]["values"])
    np.testing.assert_array_equal(found[0]["predicted"], found[1]["predicted"])
    assert len(np.unique(found[0]["predicted"])) >= 3 and found[0]["values"].max() < 100.0  # they could differ


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"optimizer": "adam"}, "optimizer must be sgd or lars"),
        ({"crop": "centre"}, "crop random or stretched"),
        ({"epochs": 0}, "must be positive"),
        ({"lr_factors": ()}, "must be positive and not empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        LinearSettings(**wrong)
