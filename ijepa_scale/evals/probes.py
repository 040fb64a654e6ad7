"""Features of labelled images -> scores of a trained encoder beside the same encoder at initialisation."""

from dataclasses import dataclass

import numpy as np
import torch

from ijepa_scale.evals.knn import knn_top1
from ijepa_scale.evals.logistic import HELD_OUT_EVERY, linear_probe_top1
from ijepa_scale.evals.scores import Score


@dataclass(frozen=True)
class Features:
    """Pooled features of the images that probes are fitted on, and of those they are scored on, (n, D) fp32."""

    train: torch.Tensor
    test: torch.Tensor


def unfit(train_labels: np.ndarray, test_labels: np.ndarray, *, at_least: int = HELD_OUT_EVERY) -> str:
    """Why nothing can be learned from how a probe would do on these labels; "" if something can.

    Classes of images that it is fitted on and scored on, -1 where an image has none. at_least: labels to fit on.
    """
    fit, held = train_labels[train_labels >= 0], test_labels[test_labels >= 0]
    if len(fit) < at_least or not len(held):
        return f"{len(fit)} labelled images to fit on and {len(held)} to score on; at least {at_least} and 1 are needed"
    if (fit == fit[0]).all():
        return "the images to fit on are all of one class"
    if not np.isin(held, fit).any():
        return "no image to score on is of a class of those to fit on, as where every image has a class of its own"
    return ""


def probe_scores(
    labels: dict[str, tuple[np.ndarray, np.ndarray]], *, initial: Features, trained: Features
) -> tuple[list[Score], dict[str, str]]:
    """k-NN and linear top-1 for each label that can be probed; and of the others, why not.

    labels: name -> (train, test) classes, -1 where an image has none.
    """
    scores, reasons = [], {}
    finite = all(bool(torch.isfinite(part).all()) for f in (initial, trained) for part in (f.train, f.test))
    for name, (train_labels, test_labels) in labels.items():
        reason = unfit(train_labels, test_labels)
        if not finite:
            reason = "features hold NaN or infinity: the encoder has diverged; use an older checkpoint"
        if reason:
            reasons[name] = reason
            continue
        fit, held = np.flatnonzero(train_labels >= 0), np.flatnonzero(test_labels >= 0)
        y_fit, y_held = torch.from_numpy(train_labels[fit]), torch.from_numpy(test_labels[held])
        chance = 100.0 * y_held.bincount().max().item() / len(y_held)  # always answering the commonest class
        for probe, top1 in (("k-NN", knn_top1), ("linear", linear_probe_top1)):
            before, after = (top1(f.train[fit], y_fit, f.test[held], y_held) for f in (initial, trained))
            scores.append(
                Score(probe=f"{probe} {name}", initial=before, trained=after, chance=chance, num_test=len(y_held))
            )
    return scores, reasons
