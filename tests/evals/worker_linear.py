"""Runs the linear task on any number of ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ijepa_scale.engine.distributed import start
from ijepa_scale.evals.linear import LinearSettings, linear
from tests.evals.small import evaluation_of, splits_of_folder


def run(folder: str, out: str, features: bool) -> None:
    ranks = start()
    settings = LinearSettings(epochs=3, batch_size=30, drops=(2,), lr=0.2, features=features)
    train, test = splits_of_folder(Path(folder))
    train = replace(train, labels=np.random.default_rng(0).permutation(train.labels))  # what is learned is no matter
    keep = Path(folder) / f"kept{ranks.world_size}"
    evaluation = evaluation_of(Path(folder), train=train, test=test, ranks=ranks, keep=keep)
    outcome = linear(evaluation, settings)
    if ranks.first:
        values = np.array([measure.value for measure in outcome.measures])
        np.savez(out, values=values, predicted=outcome.predicted)
    ranks.close()
