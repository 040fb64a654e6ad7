"""Linear probe of frozen features: multinomial logistic regression, its strength chosen on held-out training images."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ijepa_scale.evals.evaluation import Evaluation, Outcome, accuracy, commonest_share
from ijepa_scale.evals.features import features_of
from ijepa_scale.evals.probe_data import check_probe_data

MAX_ITERATIONS = 100  # L-BFGS iterations a fit; the accuracy settles long before the loss does
HELD_OUT_EVERY = 5  # each fifth training image chooses the strength


STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True, kw_only=True)
class LogisticSettings:
    """L2-regularized logistic regression of standardised features (arXiv:2301.08243, A.2, as of its 1% linear)."""

    l2: tuple[float, ...] = STRENGTHS  # l2 / 2 * |weight|^2 beside the mean cross-entropy; of several a fifth chooses

    def __post_init__(self) -> None:
        check_strengths(self.l2)


def check_strengths(l2: tuple[float, ...]) -> None:
    if not l2 or min(l2) <= 0.0:
        raise ValueError(f"l2 must name one or more strengths above 0, got {l2}")


def logistic(evaluation: Evaluation, settings: LogisticSettings) -> Outcome:
    """On the output of the last block, of the centre of each image."""
    train, test = (features_of(evaluation, part) for part in (evaluation.train, evaluation.test))
    if not evaluation.ranks.first:
        return Outcome(measures=[])
    device = evaluation.ranks.device
    data = [tensor.to(device) for part in (train, test) for tensor in part.tensors()]
    predicted, strength = logistic_predictions(*data, l2=settings.l2)
    found = predicted.cpu().numpy()
    chance = commonest_share(test.labels)
    measure = accuracy("logistic regression", found, test.labels, chance=chance, settings={"l2": strength})
    return Outcome.best_of([measure], [found], test.labels, train_images=len(train.labels))


def linear_probe_top1(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    l2: tuple[float, ...] = STRENGTHS,
) -> float:
    """Percent of test images that a linear classifier of the features gets right: see logistic_predictions()."""
    if len(train_labels) < HELD_OUT_EVERY:
        raise ValueError(f"a linear probe needs {HELD_OUT_EVERY} or more training images, got {len(train_labels)}")
    predicted, _ = logistic_predictions(train_features, train_labels, test_features, test_labels, l2=l2)
    return 100.0 * (predicted == test_labels).double().mean().item()


def logistic_predictions(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    l2: tuple[float, ...] = STRENGTHS,
) -> tuple[torch.Tensor, float]:
    """The class of each test image, (n,) int64, by a linear classifier of the features, and its strength.

    Features (n, D) in any float dtype, labels (n,) integers from 0 up, all on one device. Features are standardised
    with the training set's statistics. Each strength in l2 (see fit_logistic) is tried on a held-out fifth of the
    training set, spread evenly over the classes; the best is fitted again on all of it. Equal strengths: the larger.
    The paper's protocol also rotates features by PCA, for its stochastic solver: the penalty, and L-BFGS from zero, are
    the same in every rotation.
    """
    check_probe_data(train_features, train_labels, test_features, test_labels)
    check_strengths(l2)
    train, test = standardise(train_features, test_features)
    # Classes numbered without gaps. An image of a class that training lacks is always wrong: no weight stands for it.
    classes, labels = torch.unique(train_labels.long(), return_inverse=True)
    best_l2, best_weight = l2[0], None
    if len(l2) > 1:
        order = torch.argsort(labels, stable=True)
        held_out = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        held_out[order[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]] = True
        best_correct, weight = -1, None
        for strength in sorted(l2, reverse=True):  # from the smooth end, each fit starting at the last one's solution
            weight = fit_logistic(train[~held_out], labels[~held_out], len(classes), l2=strength, start=weight)
            correct = int((_predict(weight, train[held_out]) == labels[held_out]).sum())
            if correct > best_correct:
                best_correct, best_l2, best_weight = correct, strength, weight
    weight = fit_logistic(train, labels, len(classes), l2=best_l2, start=best_weight)
    return classes[_predict(weight, test)], best_l2


def fit_logistic(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    l2: float,
    start: torch.Tensor | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> torch.Tensor:
    """Minimise mean cross-entropy + l2 / 2 * |weight|^2, by full-batch L-BFGS from `start` (zero if None).

    features: (n, D), labels: (n,) int64 below num_classes. The bias is free of l2, as in scikit-learn, whose C is
    1 / (l2 * n). Returns (D + 1, num_classes) in the dtype of features; the last row is the bias.
    """
    weight = features.new_zeros(features.shape[1] + 1, num_classes) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(weight, features), labels) + l2 / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()


def _logits(weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return torch.addmm(weight[-1], features, weight[:-1])


def _predict(weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return _logits(weight, features).argmax(dim=1)


def standardise(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero mean and unit standard deviation over the training set; (n, D) float32. Constant features become zero."""
    std, mean = torch.std_mean(train.double(), dim=0, correction=0)
    varies = std > 1e-6 * mean.abs()  # below that it is the rounding of fp32, which must not be blown up
    scale = torch.where(varies, 1.0 / std.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return ((train.double() - mean) * scale).float(), ((test.double() - mean) * scale).float()
