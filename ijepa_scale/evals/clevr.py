"""Local properties of a picture, read off its features: how many objects it has, and how near the nearest one is.

Clevr's tasks as the paper has them (arXiv:2301.08243, table 4): linear heads on images resized whole, with a cosine.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from ijepa_scale.evals.evaluation import Evaluation, Measure, Outcome
from ijepa_scale.evals.features import Features, features_of
from ijepa_scale.evals.linear import LinearSettings, linear
from ijepa_scale.evals.logistic import standardise

COUNT = LinearSettings(epochs=50, drops=(), crop="stretched")
DISTANCE = LinearSettings(epochs=100, drops=(), crop="stretched")
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)  # between the six classes of distances in Clevr's pixel_coords
RIDGE = tuple(10.0**power for power in range(-4, 3))  # strengths; a held-out fifth chooses
HELD_OUT_EVERY = 5


def distance_classes(distances: np.ndarray) -> np.ndarray:
    """(n,) int64: 0 to 5, -1 for NaN. A distance at an edge is of the nearer class."""
    classes = np.searchsorted(DISTANCE_EDGES, distances, side="left")
    return np.where(np.isnan(distances), -1, classes)


def count(evaluation: Evaluation, settings: LinearSettings) -> Outcome:
    """How many objects a picture has, as classes."""
    return linear(evaluation, settings)


def distance(
    evaluation: Evaluation, settings: LinearSettings, values: tuple[np.ndarray, np.ndarray] | None = None
) -> Outcome:
    """How far the nearest object is, as classes; and by ridge regression the distance itself.

    values: the distances of the training and of the test split's images, (num_images,) each, NaN where one has none;
    None: they are not known. Of fewer than five that are, nothing is regressed.
    """
    outcome = linear(evaluation, settings)
    if values is None:
        return outcome
    parts = [features_of(evaluation, part, stretch=True) for part in (evaluation.train, evaluation.test)]
    if not evaluation.ranks.first:
        return outcome
    train, test = (_with_values(part, of_all[part.indices]) for part, of_all in zip(parts, values, strict=True))
    if len(train[1]) < HELD_OUT_EVERY or not len(test[1]):
        return outcome
    predicted, strength = ridge_predictions(*train, test[0])
    return replace(outcome, measures=[*outcome.measures, *_errors(predicted, test[1], train[1].mean(), strength)])


def _with_values(features: Features, values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the values, (n, D) and (n,), of the images that have a value."""
    known = np.isfinite(values)
    return torch.from_numpy(features.last[known]), torch.from_numpy(values[known])


def ridge_predictions(
    train_features: torch.Tensor, train_values: torch.Tensor, test_features: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """A value for each test image, (n,) float64, by ridge regression on standardised features; and its strength.

    Minimised is the mean squared error + strength * |weight|^2; a held-out fifth of the training images chooses.
    """
    held_out = torch.arange(len(train_values)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    train, test = (features.double() for features in standardise(train_features, test_features))
    values = train_values.double()

    def fitted(rows: torch.Tensor, values: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        mean, centre = values.mean(), rows.mean(dim=0)
        gram = (rows - centre).T @ (rows - centre) / len(rows)
        gram.diagonal().add_(strength)
        weight = torch.linalg.solve(gram, (rows - centre).T @ (values - mean) / len(rows))
        return weight, mean - centre @ weight

    def error(strength: float) -> float:
        weight, bias = fitted(train[~held_out], values[~held_out], strength)
        return float((train[held_out] @ weight + bias - values[held_out]).square().mean())

    strength = min(RIDGE, key=error)
    weight, bias = fitted(train, values, strength)
    return test @ weight + bias, strength


def _errors(predicted: torch.Tensor, values: torch.Tensor, guess: torch.Tensor, strength: float) -> list[Measure]:
    """The mean absolute error, beside that of always answering the training images' mean, and R^2.

    R^2's standard error is that of its numerator, the mean of the squares; of values that are all alike there is none.
    """
    off = (predicted - values).abs()
    count, settings = len(values), {"l2": strength}
    error = Measure(
        name="ridge regression, mean absolute error",
        value=float(off.mean()),
        error=float(off.std(correction=0)) / math.sqrt(count),
        count=count,
        chance=float((guess - values).abs().mean()),
        unit="of distance",
        settings=settings,
    )
    variance = float(values.var(correction=0))
    if not variance:
        return [error]
    unexplained = 100.0 * off.square() / variance
    explained = Measure(
        name="ridge regression, variance explained",
        value=100.0 - float(unexplained.mean()),
        error=float(unexplained.std(correction=0)) / math.sqrt(count),
        count=count,
        chance=0.0,
        settings=settings,
    )
    return [error, explained]
