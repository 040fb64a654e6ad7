"""Runs inside ranks: tasks that train, on tiny networks and images of plain colours; what they found goes to a file."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_scale.engine import distributed
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.evals.evaluation import Evaluation, Labelled, Outcome
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.vit import VisionTransformer
from tests.evals.labelled import labelled


def tiny_encoder() -> VisionTransformer:
    encoder = VisionTransformer(ViTSize(width=16, depth=2, heads=2, mlp_width=32), image_size=16, patch_size=8)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, 0) * (3.0 if parameter.ndim > 1 else 1.0))
    return encoder


def shuffled(images: Labelled) -> Labelled:
    labels = np.random.default_rng(5).permutation(images.labels)
    return Labelled(images.images, images.indices, labels, images.names)


def evaluation_of(ranks: Ranks, root: str, folder: Path, *, shuffle: bool = False, **changes: Any) -> Evaluation:
    train, test = labelled(Path(root)), labelled(Path(root), "validation")
    settings: dict[str, Any] = {
        "encoder": tiny_encoder().to(ranks.device),
        "sha256": "tiny",
        "image_size": 16,
        "train": shuffled(train) if shuffle else train,
        "test": shuffled(test) if shuffle else test,
        "ranks": ranks,
        "seed": 1,
        "batch_size": 8,
        "workers": 0,
        "keep": folder / "keep",
        "out": folder / "out",
    }
    return Evaluation(**settings | changes)


def run(task: Callable[[Evaluation, Any], Outcome], root: str, folder: str, cases: dict[str, tuple[Any, dict]]) -> None:
    """cases: by name, settings of the task and changes to the evaluation. Results go to folder/NAME."""
    ranks = distributed.start()
    for name, (settings, changes) in cases.items():
        evaluation = evaluation_of(ranks, root, Path(folder) / name, **changes)
        outcome = task(evaluation, settings)
        if ranks.first:
            found = {
                "measures": [asdict(measure) for measure in outcome.measures],
                "predicted": None if outcome.predicted is None else outcome.predicted.tolist(),
                "facts": outcome.facts,
                "left": [path.name for path in evaluation.keep.glob("checkpoints/*")],
            }
            (Path(folder) / name).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name / "outcome.json").write_text(json.dumps(found))
    ranks.close()


def outcome_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "outcome.json").read_text())
