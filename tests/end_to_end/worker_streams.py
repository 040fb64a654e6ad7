"""launch/pretrain.py, with what it trains on written down; each runs inside ranks."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

from ijepa_scale import train
from tests.processes import pretrain


def record_names(*arguments: str) -> None:
    """RUN/names-RANK.txt: a line for each step, of the names of its images. A resumed run writes its steps anew."""
    run_dir = next(Path(a.removeprefix("run_dir=")) for a in arguments if a.startswith("run_dir="))
    original = train.train_step

    def train_step(run: Any, step: int, *rest: Any, **options: Any) -> Any:
        outcome = original(run, step, *rest, **options)
        named = [batch.names or [run.images.sample_id(i) for i in batch.indices] for batch in outcome.batches]
        names = [name.replace(" ", ":") for batch in named for name in batch]
        with open(run_dir / f"names-{os.environ.get('RANK', '0')}.txt", "a") as file:
            file.write(" ".join([str(step), *names]) + "\n")
        return outcome

    with mock.patch.object(train, "train_step", train_step):
        pretrain(*arguments)
