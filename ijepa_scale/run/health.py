"""Are the features still worth something? Numbers from 512 images now and then; verdict.py puts them into words."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.order import permuted_index
from ijepa_scale.evals.extract import extract
from ijepa_scale.evals.knn import knn_top1
from ijepa_scale.evals.probes import unfit
from ijepa_scale.run.records import read_records
from ijepa_scale.run.setup import Run
from ijepa_scale.run.verdict import health_verdict


def feature_std(features_ND: torch.Tensor) -> float:
    """Standard deviation over the images, averaged over the dimensions, relative to the features' root mean square.

    features_ND: (num_images, D). 0 when all images have the same feature (collapse), about 1 when they have nothing in
    common; the scale of the features cancels, so runs and sizes compare. NaN if a feature is not finite.
    """
    features = features_ND.double()
    rms = features.square().mean().sqrt()
    return (features.std(dim=0, correction=0).mean() / rms).item() if rms != 0 else 0.0


def rankme(features_ND: torch.Tensor, eps: float = 1e-7) -> float:
    """Effective rank: exp of the entropy of the singular values, as shares of their sum (RankMe, arXiv:2210.02885).

    features_ND: (num_images, D), not centred, as in the paper. From 1 (all features on one line: collapse) to
    min(num_images, D). It grows with num_images: compare only values taken over equally many. NaN if not finite.
    """
    if not bool(torch.isfinite(features_ND).all()):
        return math.nan
    singular = torch.linalg.svdvals(features_ND.float())
    if singular[0] == 0:
        return 1.0
    shares = (singular / singular.sum()).double() + eps
    return torch.exp(-(shares * shares.log()).sum()).item()


def drift(target_ND: torch.Tensor, context_ND: torch.Tensor) -> float:
    """1 - mean cosine between the two encoders' features of the same images, each less its mean over the images.

    0: the target encoder is where the context encoder is (EMA has caught up); 1: unrelated. Centred, since the part
    that all images share is most of a feature and would hide what sets them apart. Both are (num_images, D).
    """
    target, context = target_ND.double(), context_ND.double()
    cosine = F.cosine_similarity(target - target.mean(dim=0), context - context.mean(dim=0), dim=1)
    return 1.0 - cosine.mean().item()


EVAL_STREAM = 1_000_003  # the "epoch" of the permutation that picks evaluation images
MEASURED = ("target", "context")  # the encoder whose features count: the first of these that there is


def eval_indices(run: Run, images: ImageSet, count: int, *, skip: int = 0) -> list[int]:
    """A fixed random choice of images, as many as every rank can take an equal share of; all, if fewer than ranks."""
    count = min(count, len(images) - skip)
    count = count // run.ranks.world_size * run.ranks.world_size or count
    return [permuted_index(0, EVAL_STREAM, len(images), skip + i) for i in range(count)]


def features_of(
    run: Run, encoders: Mapping[str, torch.nn.Module], images: ImageSet, indices: list[int]
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Pooled features (n, D) of the images that can be read, on the first rank, and which these are, on every rank.

    All ranks call it. Raises BadImageError, on every rank, where not one can be read.
    """
    try:
        found = extract(
            encoders,
            images,
            indices,
            image_size=run.config.data.image_size,
            batch_size=run.dataset.micro_batch_size,
            ranks=run.ranks,
        )
    except BadImageError as error:
        advice = "the checkpoints are whole: bring the images back, then start the same command again"
        raise BadImageError(f"{error}; {advice}") from error
    return {name: torch.from_numpy(features) for name, features in found.features.items()}, found.indices


def health_record(
    features: dict[str, torch.Tensor], labels: dict[str, np.ndarray], *, step: int, loss: float | None
) -> dict[str, Any]:
    """What a health check writes down, of features of the same images by one encoder or more, each (n, D).

    features: by the encoders' names; with both "target" and "context" also how far they are apart. labels: name ->
    (n,) classes of the images, -1 where one has none; k-NN is of the first that can be probed. loss: of the last step.
    """
    measured = next(features[name] for name in MEASURED if name in features)
    record = {"kind": "health", "step": step, "feature_std": feature_std(measured), "rankme": rankme(measured)}
    if features.keys() >= {"target", "context"}:
        record["drift"] = drift(features["target"], features["context"])
    record["loss"] = loss
    for name, values in labels.items():
        labelled = np.flatnonzero(values >= 0)
        fit, held = np.split(labelled, [len(labelled) * 3 // 4])
        if unfit(values[fit], values[held], at_least=1):
            continue  # with the next
        if bool(torch.isfinite(measured).all()):
            y = torch.from_numpy(values)
            record["knn"] = knn_top1(measured[fit], y[fit], measured[held], y[held])
            record |= {"knn_label": name, "knn_images": len(held)}
        break
    return record


class HealthChecks:
    """Measures now and then, and remembers what the run has measured before."""

    def __init__(self, run: Run, log: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> None:
        self._run, self._log, self._say = run, log, say
        encoders = run.objective.encoders(run.engine.module)
        self._every = run.config.logging.health_every_steps if encoders else 0
        records = read_records(run.folder.metrics) if run.ranks.first else []
        self._history = [record for record in records if record.get("kind") == "health"]

    def due(self, step: int, *, last: bool = False) -> bool:
        """last: the run ends here."""
        return self._every > 0 and (last or step % self._every == 0)

    def measure(self, step: int, *, loss: float | None) -> None:
        """Are the features still worth something? All ranks call it, and compute a share each. loss: of the last step.

        Of each encoder that the objective names; with both "target" and "context", also how far they are apart.
        """
        run, images = self._run, self._run.evaluation.train
        wanted = eval_indices(run, images, run.config.logging.health_images)
        features, indices = features_of(run, run.objective.encoders(run.engine.module), images, wanted)
        if not run.ranks.first:
            return
        labels = {name: column.values[indices] for name, column in images.label_columns().items()}
        record = health_record(features, labels, step=step, loss=loss)
        self._history.append(record)
        self._log(record)
        said = health_verdict(self._history, run.objective.advice(), objective=run.objective.name)
        self._say(f"health at step {step}: {said}")
