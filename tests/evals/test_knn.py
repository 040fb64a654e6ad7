import math

import numpy as np
import pytest
import torch

from ijepa_scale.evals import knn
from ijepa_scale.evals.knn import KnnSettings, knn_predictions, knn_top1


def slow_knn_top1(train, train_labels, test, test_labels, k, temperature):
    """One image at a time, in Python floats."""

    def cosine(a, b):
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0

    correct = 0
    for feature, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        similarities = [cosine(feature, other) for other in train.tolist()]
        nearest = sorted(range(len(train)), key=lambda i: -similarities[i])[:k]
        votes = {}
        for i in nearest:
            votes[int(train_labels[i])] = votes.get(int(train_labels[i]), 0.0) + math.exp(similarities[i] / temperature)
        correct += max(votes, key=votes.get) == label
    return 100.0 * correct / len(test)


def clusters(n, classes, spread, seed, width=6):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, width, generator=generator), labels


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (500, 0.2)])
@pytest.mark.parametrize("chunk", [1, 150, 1 << 24])
def test_agrees_with_the_slow_version(k, temperature, chunk, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK_SIMILARITIES", chunk)
    train, train_labels = clusters(60, 5, 0.8, seed=1)
    test, test_labels = clusters(41, 5, 0.8, seed=2)
    expected = slow_knn_top1(train, train_labels, test, test_labels, k, temperature)
    actual = knn_top1(train, train_labels, test, test_labels, k=k, temperature=temperature)
    assert actual == pytest.approx(expected, abs=1e-9)
    assert 20.0 < expected < 100.0  # neither chance nor trivial


def test_every_k_of_one_pass_is_that_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, train_labels = clusters(300, 6, 0.9, seed=1)
    test, test_labels = clusters(120, 6, 0.9, seed=2)
    predicted = knn_predictions(train, train_labels, test, test_labels, ks=[10, 100, 200])
    for k in (10, 100, 200):
        other = neighbors.KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1.0 - d) / 0.07))
        expected = other.fit(train.double().numpy(), train_labels.numpy()).predict(test.double().numpy())
        np.testing.assert_array_equal(predicted[k].numpy(), expected)
    assert any((predicted[10] != predicted[k]).any() for k in (100, 200))  # the ks are not one and the same


@pytest.mark.parametrize("wrong", [{"k": ()}, {"k": (10, 0)}, {"temperature": 0.0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="k must be at least 1 and temperature above 0"):
        KnnSettings(**wrong)


def test_nearness_decides_not_the_majority():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([4, 2, 2])
    assert knn_top1(train, labels, torch.tensor([[1.0, 0.1]]), torch.tensor([4]), k=3) == 100.0
    # With a temperature so high that all weigh alike, the majority does.
    assert knn_top1(train, labels, torch.tensor([[1.0, 0.1]]), torch.tensor([2]), k=3, temperature=1e3) == 100.0


def test_length_of_a_feature_does_not_matter_and_zero_features_are_legal():
    train, train_labels = clusters(30, 3, 0.5, seed=3)
    test, test_labels = clusters(20, 3, 0.5, seed=4)
    scales = torch.linspace(0.01, 100, 30)[:, None]
    expected = knn_top1(train, train_labels, test, test_labels)
    assert knn_top1(train * scales, train_labels, 7 * test, test_labels) == expected
    assert knn_top1(0 * train, train_labels, test, test_labels) <= 100.0


def test_equals_rank_by_their_place_and_equal_votes_go_to_the_lower_class():
    same = torch.ones(300, 4)
    first, rest = torch.full((20,), 7), torch.zeros(280, dtype=torch.long)
    assert knn_top1(same, torch.cat([first, rest]), same[:1], torch.tensor([7]), k=20) == 100.0
    assert knn_top1(same[:2], torch.tensor([5, 3]), same[:1], torch.tensor([3]), k=2) == 100.0


def test_tiny_temperature_does_not_overflow():
    train, labels = clusters(30, 3, 0.1, seed=5)
    assert knn_top1(train, labels, train, labels, temperature=1e-6) == 100.0


def test_a_class_that_training_lacks_is_wrong():
    assert knn_top1(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 9]), k=1) == 50.0


@pytest.mark.parametrize("settings", [{"k": 0}, {"temperature": 0.0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="k must be"):
        knn_top1(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 1]), **settings)
