"""Runs the linear task on any number of ranks."""

from pathlib import Path

import numpy as np
from tests.evals.small import evaluation_of

from ijepa_scale.engine.distributed import start
from ijepa_scale.evals.linear import LinearSettings, linear


def run(folder: str, out: str, features: bool) -> None:
    ranks = start()
    settings = LinearSettings(epochs=3, batch_size=30, drops=(2,), lr=0.2, features=features)
    evaluation = evaluation_of(Path(folder) / "images", Path(folder) / f"kept{ranks.world_size}", ranks=ranks)
    outcome = linear(evaluation, settings)
    if ranks.first:
        values = np.array([measure.value for measure in outcome.measures])
        np.savez(out, values=values, predicted=outcome.predicted)
    ranks.close()
