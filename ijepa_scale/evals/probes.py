"""Features of labelled images -> scores of a trained encoder beside the same encoder at initialisation."""

from dataclasses import dataclass

import numpy as np
import torch

from ijepa_scale.evals.knn import knn_top1
from ijepa_scale.evals.linear import linear_probe_top1
from ijepa_scale.metrics import Score


@dataclass(frozen=True)
class Features:
    """Pooled features of the images that probes are fitted on, and of those they are scored on, (n, D) fp32."""

    train: torch.Tensor
    test: torch.Tensor


def probe_scores(
    labels: dict[str, tuple[np.ndarray, np.ndarray]], *, initial: Features, trained: Features
) -> list[Score]:
    """k-NN and linear top-1 for each label.

    labels: name -> (train, test) classes, -1 where an image has none. Labels with one class alone are left out.
    """
    scores = []
    for name, (train_labels, test_labels) in labels.items():
        fit, held = np.flatnonzero(train_labels >= 0), np.flatnonzero(test_labels >= 0)
        y_fit, y_held = torch.from_numpy(train_labels[fit]), torch.from_numpy(test_labels[held])
        if len(y_fit.unique()) < 2 or not len(y_held):
            continue
        chance = 100.0 * y_held.bincount().max().item() / len(y_held)  # always answering the commonest class
        for probe, top1 in (("k-NN", knn_top1), ("linear", linear_probe_top1)):
            before, after = (top1(f.train[fit], y_fit, f.test[held], y_held) for f in (initial, trained))
            scores.append(
                Score(probe=f"{probe} {name}", initial=before, trained=after, chance=chance, num_test=len(y_held))
            )
    return scores
