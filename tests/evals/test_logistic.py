import numpy as np
import pytest
import torch

from ijepa_scale.evals.logistic import fit_logistic, linear_probe_top1, logistic_predictions


def clusters(n, classes, seed, width=12, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    centres, mixing = torch.randn(classes, width, generator=fixed), torch.randn(width, width, generator=fixed)
    labels = torch.randint(classes, (n,), generator=generator)
    return (centres[labels] + spread * torch.randn(n, width, generator=generator)) @ mixing, labels


def objective(weight, bias, features, labels, l2):
    logits = features @ weight + bias
    loss = (logits.exp().sum(1).log() - logits[torch.arange(len(labels)), labels]).mean()
    return (loss + l2 / 2 * (weight**2).sum()).item()


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_fit_is_that_of_scikit_learn(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(400, 5, seed=1)
    features = ((features - features.mean(0)) / features.std(0)).double()
    weight = fit_logistic(features, labels, 5, l2=l2, max_iterations=1000)
    other = linear_model.LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-9, max_iter=5000)
    other.fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(weight[:-1].T.numpy(), other.coef_, atol=2e-3)
    bias = weight[-1] - weight[-1].mean()  # a shift of all biases changes nothing
    np.testing.assert_allclose(bias.numpy(), other.intercept_ - other.intercept_.mean(), atol=2e-3)
    best = objective(torch.from_numpy(other.coef_.T), torch.from_numpy(other.intercept_), features, labels, l2)
    assert objective(weight[:-1], weight[-1], features, labels, l2) == pytest.approx(best, abs=1e-7)


def test_score_is_that_of_scikit_learn_at_the_same_strength():
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    (train, train_labels), (test, test_labels) = clusters(600, 6, seed=1), clusters(500, 6, seed=2)
    scaler = preprocessing.StandardScaler().fit(train.numpy())
    other = linear_model.LogisticRegression(C=1 / (1e-2 * 600), max_iter=1000)
    other.fit(scaler.transform(train.numpy()), train_labels.numpy())
    expected = 100 * other.score(scaler.transform(test.numpy()), test_labels.numpy())
    actual = linear_probe_top1(train, train_labels, test, test_labels, l2=(1e-2,))
    assert actual == pytest.approx(expected, abs=0.4)  # two images of 500
    assert 40 < actual < 95


def test_strength_is_chosen_without_the_test_set():
    # 30 informative among 130 features and few images: weak L2 overfits, very strong L2 underfits.
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (1200,), generator=generator)
    features = torch.randn(1200, 130, generator=generator)
    features[:, :30] += 0.2 * (2 * labels[:, None] - 1)
    split = (features[:200], labels[:200], features[200:], labels[200:])
    alone = {strength: linear_probe_top1(*split, l2=(strength,)) for strength in (1.0, 1e-6)}
    assert alone[1.0] > alone[1e-6] + 3  # else this test would show nothing
    assert linear_probe_top1(*split, l2=(1e-6, 1.0)) == alone[1.0]
    wrong = (split[0], split[1], split[2], 1 - split[3])  # other test labels change no choice
    assert linear_probe_top1(*wrong, l2=(1e-6, 1.0)) == pytest.approx(100 - alone[1.0])


def test_scale_and_offset_of_the_features_do_not_matter():
    (train, train_labels), (test, test_labels) = clusters(300, 4, seed=1), clusters(200, 4, seed=2)
    scale, offset = torch.logspace(-2, 2, 12), torch.linspace(-5, 5, 12)
    expected = linear_probe_top1(train, train_labels, test, test_labels)
    actual = linear_probe_top1(train * scale + offset, train_labels, test * scale + offset, test_labels)
    assert actual == pytest.approx(expected, abs=1.0)


def test_features_constant_in_training_say_nothing():
    (train, train_labels), (test, test_labels) = clusters(300, 4, seed=1), clusters(200, 4, seed=2)
    expected = linear_probe_top1(train, train_labels, test, test_labels)
    constant = torch.full((300, 1), 0.1)
    shifted = torch.full((200, 1), 0.1) + 10 * torch.arange(200)[:, None]  # varies in the test set alone
    actual = linear_probe_top1(
        torch.cat([train, constant], 1), train_labels, torch.cat([test, shifted], 1), test_labels
    )
    assert actual == pytest.approx(expected, abs=1e-9)
    collapsed = linear_probe_top1(torch.ones(300, 8), train_labels, torch.ones(200, 8), test_labels)
    majority = 100 * (test_labels == train_labels.bincount().argmax()).double().mean().item()
    assert collapsed == pytest.approx(majority)


def test_result_is_the_same_each_time_and_labels_may_have_gaps():
    (train, train_labels), (test, test_labels) = clusters(300, 4, seed=1), clusters(200, 4, seed=2)
    expected = linear_probe_top1(train, train_labels, test, test_labels)
    assert linear_probe_top1(train, train_labels, test, test_labels) == expected
    assert linear_probe_top1(train, 7 * train_labels + 3, test, 7 * test_labels + 3) == expected


def test_one_class_and_unseen_classes():
    train, test = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 3)
    labels = torch.full((10,), 2)
    assert linear_probe_top1(train, labels, test, torch.tensor([2, 2, 0, 9])) == 50.0


def test_too_little_data_or_no_strength_is_refused():
    features, labels = torch.eye(6), torch.arange(6) % 2
    with pytest.raises(ValueError, match="5 or more training images, got 4"):
        linear_probe_top1(features[:4], labels[:4], features, labels)
    for l2 in ((), (0.0, 1.0)):
        with pytest.raises(ValueError, match="strengths above 0"):
            linear_probe_top1(features, labels, features, labels, l2=l2)


def test_100_classes():
    (train, train_labels), (test, test_labels) = clusters(2000, 100, 1, 192), clusters(500, 100, 2, 192)
    assert linear_probe_top1(train, train_labels, test, test_labels) > 50.0


def test_a_rotation_of_the_standardised_features_changes_nothing():
    """Why the PCA of the paper's protocol is left out: it is a rotation."""
    (train, train_labels), (test, _) = clusters(400, 5, seed=1), clusters(300, 5, seed=2)
    mean, std = train.mean(0), train.std(0, correction=0)
    train, test = ((features - mean) / std for features in (train.double(), test.double()))
    _, axes = torch.linalg.eigh(train.T @ train)
    weight, rotated = (fit_logistic(x, train_labels, 5, l2=1e-2, max_iterations=1000) for x in (train, train @ axes))
    torch.testing.assert_close(axes @ rotated[:-1], weight[:-1], atol=1e-4, rtol=0.0)
    scores = [test @ weight[:-1] + weight[-1], test @ axes @ rotated[:-1] + rotated[-1]]
    assert (scores[0].argmax(1) == scores[1].argmax(1)).float().mean() > 0.99


def test_shuffled_labels_give_chance_and_separable_features_everything():
    (train, train_labels), (test, test_labels) = (
        clusters(600, 4, seed=1, spread=0.02),
        clusters(400, 4, seed=2, spread=0.02),
    )
    predicted, _ = logistic_predictions(train, train_labels, test, test_labels)
    assert (predicted == test_labels).all()
    shuffled = train_labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    (train, _), (test, test_labels) = clusters(600, 4, seed=1), clusters(400, 4, seed=2)
    predicted, _ = logistic_predictions(train, shuffled, test, test_labels)
    right = (predicted == test_labels).float().mean().item()
    assert abs(right - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
