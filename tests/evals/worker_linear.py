"""Runs the linear task on any number of ranks."""

from pathlib import Path

import numpy as np

from ijepa_scale.engine.distributed import start
from ijepa_scale.evals.linear import LinearSettings, linear
from tests.evals.small import evaluation_of


def run(folder: str, out: str, features: bool) -> None:
    ranks = start()
    settings = LinearSettings(epochs=3, batch_size=30, drops=(2,), lr=0.2, features=features)
    evaluation = evaluation_of(Path(folder), ranks=ranks, keep=Path(folder) / f"kept{ranks.world_size}")
    outcome = linear(evaluation, settings)
    if ranks.first:
        values = np.array([measure.value for measure in outcome.measures])
        np.savez(out, values=values, predicted=outcome.predicted)
    ranks.close()
