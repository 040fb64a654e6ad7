"""What ranks of test_features.py do."""

import os
from pathlib import Path

import numpy as np

from ijepa_scale.engine.distributed import start
from ijepa_scale.evals.features import features_of
from tests.evals.small import evaluation_of


def compute(root: str, keep: str, batch_size: int) -> None:
    """Each rank saves what it is given to keep/RANK.npz."""
    ranks = start()
    evaluation = evaluation_of(Path(root), ranks=ranks, keep=Path(keep), batch_size=batch_size)
    found = features_of(evaluation, evaluation.train)
    np.savez(Path(keep) / f"{ranks.rank}.npz", blocks=found.blocks, labels=found.labels, indices=found.indices)
    ranks.close()


def killed(root: str, keep: str) -> None:
    """Killed when all but the last batch are encoded."""

    def watch(words, batches):
        for number, batch in enumerate(batches):
            if number == 4:
                os.kill(os.getpid(), 9)
            yield batch

    evaluation = evaluation_of(Path(root), keep=Path(keep), batch_size=8, watch=watch)
    features_of(evaluation, evaluation.train)
