"""launch/pretrain.py with something that goes wrong, for tests; each runs inside ranks."""

import itertools
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ijepa_scale import train
from ijepa_scale.models import ijepa
from tests.processes import pretrain


def nan_loss_at(steps: str, rank: str, *arguments: str) -> None:
    """The loss of one rank is NaN at these steps, e.g. "2,3"."""
    bad = {int(step) for step in steps.split(",")}
    counter = itertools.count()
    original = ijepa.IJepa.forward

    def forward(self: ijepa.IJepa, *inputs: Any) -> dict[str, torch.Tensor]:
        losses = original(self, *inputs)
        failing = next(counter) in bad and os.environ["RANK"] == rank
        return {name: loss * math.nan for name, loss in losses.items()} if failing else losses

    with mock.patch.object(ijepa.IJepa, "forward", forward):
        pretrain(*arguments)


def full_disk_at(saves: str, *arguments: str) -> None:
    """These saves, counted from 1, find a full disk, as rank 1 sees it."""
    bad = {int(number) for number in saves.split(",")}
    counter = itertools.count(1)
    save = train.checkpoints.save

    def failing(folder: Any, engine: Any, ema: Any, ranks: Any, **options: Any) -> Any:
        if next(counter) not in bad or ranks.rank != 1:
            return save(folder, engine, ema, ranks, **options)
        full = mock.Mock(side_effect=OSError(28, "No space left on device"))
        with mock.patch.object(train.checkpoints, "save_file", full):
            return save(folder, engine, ema, ranks, **options)

    with mock.patch.object(train.checkpoints, "save", failing):
        pretrain(*arguments)


def signalled_while_saving(*arguments: str) -> None:
    """SIGTERM stops rank 0; more come while it writes the checkpoint that this brings about."""
    write = train.checkpoints.save_file

    def interrupted(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*given)
        os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(train.checkpoints, "save_file", interrupted):
        pretrain(*arguments)


def endless_step(*arguments: str) -> None:
    """Step 4 never ends on rank 0."""
    counter = itertools.count()
    run_dir = next(Path(a.removeprefix("run_dir=")) for a in arguments if a.startswith("run_dir="))
    step = train.train_step

    def stuck(*given: Any, **options: Any) -> Any:
        if next(counter) == 4 and os.environ["RANK"] == "0":
            (run_dir / "stuck").touch()
            while True:
                signal.pause()
        return step(*given, **options)

    with mock.patch.object(train, "train_step", stuck):
        pretrain(*arguments)


def junk_once_set_up(folder: str, *arguments: str) -> None:
    """The images of a folder become text between set-up and the report."""
    report = train.report

    def late(run: Any) -> None:
        for file in Path(folder).rglob("*.jpg"):
            file.write_text("no image")
        report(run)

    with mock.patch.object(train, "report", late):
        pretrain(*arguments)


def hub_that_warns(*arguments: str) -> None:
    """huggingface_hub prints a warning during set-up, as where it cannot reach the Hub, and so does this package."""
    from huggingface_hub.utils import logging as its_logging  # which gives its logger a handler of its own

    check = train.check

    def warned(config: Any) -> Any:
        its_logging.get_logger("huggingface_hub.utils").warning("a line of huggingface_hub")
        logging.getLogger("ijepa_scale.data").warning("a line of ijepa_scale")
        return check(config)

    with mock.patch.object(train, "check", warned):
        pretrain(*arguments)
