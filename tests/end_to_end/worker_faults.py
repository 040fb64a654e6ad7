"""launch/pretrain.py with something that goes wrong, for tests; each runs inside ranks."""

import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ijepa_scale import train
from ijepa_scale.data import collate
from ijepa_scale.engine import checkpoint, signals
from ijepa_scale.objectives import ijepa
from ijepa_scale.run import records as metrics
from ijepa_scale.run import setup as run
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
    write = checkpoint._write_file

    def failing(partial: Path, rank: int, pieces: Any) -> Any:
        if next(counter) not in bad or rank != 1:
            return write(partial, rank, pieces)
        full = mock.Mock(side_effect=OSError(28, "No space left on device"))
        with mock.patch.object(checkpoint, "save_file", full):
            return write(partial, rank, pieces)

    with mock.patch.object(checkpoint, "_write_file", failing):
        pretrain(*arguments)


def slow_disk(seconds: str, *arguments: str) -> None:
    """A checkpoint's file takes so long to write, on rank 1."""
    write = checkpoint._write_file

    def slow(partial: Path, rank: int, pieces: Any) -> Any:
        time.sleep(float(seconds) * rank)
        return write(partial, rank, pieces)

    with mock.patch.object(checkpoint, "_write_file", slow):
        pretrain(*arguments)


def signalled_while_saving(*arguments: str) -> None:
    """SIGTERM stops rank 0; more come while it writes the checkpoint that this brings about."""
    write = checkpoint.save_file

    def interrupted(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*given)
        os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(checkpoint, "save_file", interrupted):
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


def fault_in_training(fault: str, rank: str, *arguments: str) -> None:
    """One rank meets a fault of the name in step 3, or where its loader starts."""
    counter = itertools.count()
    step, write = train.train_step, metrics.JsonlWriter.write
    this = os.environ.get("RANK", "0") == rank

    def failing(this_run: Any, number: int, *given: Any, **options: Any) -> Any:
        if number == 3 and this:
            if fault == "base exception":
                raise GeneratorExit
            if fault == "killed loader":
                for process in multiprocessing.active_children():
                    process.kill()
        return step(this_run, number, *given, **options)

    def full(self: metrics.JsonlWriter, record: dict[str, Any]) -> None:
        if next(counter) == 3 and fault == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(self._file.name).st_size + 9, resource.RLIM_INFINITY))
        if fault == "error in a callback" and record["step"] == 3:
            raise ZeroDivisionError
        write(self, record)

    def unshared(self: torch.UntypedStorage) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    def few_files(*given: Any, **options: Any) -> Any:
        if this:
            used = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 9, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return stream(*given, **options)

    stream = train.micro_batch_stream
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(train, "train_step", failing))
        stack.enter_context(mock.patch.object(metrics.JsonlWriter, "write", full))
        if fault == "full shared memory" and this:  # as in a loader process, whose queue calls it
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "_share_fd_cpu_", unshared))
        if fault == "few files":
            stack.enter_context(mock.patch.object(train, "micro_batch_stream", few_files))
        pretrain(*arguments)


def closed_output(*arguments: str) -> None:
    """Nobody reads standard output any more, as under `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.close(write)
    pretrain(*arguments)


def endless_set_up(*arguments: str) -> None:
    """Rank 0 renders, downloads or copies, and the others wait for it in a collective, which no signal interrupts."""
    signals.GRACE_SECONDS = 1.0

    def prepare(config: Any) -> None:
        print("preparing", flush=True)
        time.sleep(1000)

    with mock.patch.object(run.build, "build_images", prepare):
        pretrain(*arguments)


def little_shared_memory(*arguments: str) -> None:
    """/dev/shm has room for three micro-batches."""
    with mock.patch.object(run, "shared_memory", lambda: ("here", 8 * 3 * 32 * 32 * 3)):
        pretrain(*arguments)


def junk_once_set_up(folder: str, *arguments: str) -> None:
    """The images of a folder become text between set-up and the report."""
    report = train.report

    def late(*given: Any) -> None:
        for file in Path(folder).rglob("*.jpg"):
            file.write_text("no image")
        report(*given)

    with mock.patch.object(train, "report", late):
        pretrain(*arguments)


def hub_that_warns(*arguments: str) -> None:
    """huggingface_hub prints a warning during set-up, as where it cannot reach the Hub, and so does this package."""
    from huggingface_hub.utils import logging as its_logging  # which gives its logger a handler of its own

    check = train.check

    def warned(*given: Any) -> Any:
        its_logging.get_logger("huggingface_hub.utils").warning("a line of huggingface_hub")
        logging.getLogger("ijepa_scale.data").warning("a line of ijepa_scale")
        return check(*given)

    with mock.patch.object(train, "check", warned):
        pretrain(*arguments)


def stuck_loader(rank: str, batch: str, *arguments: str) -> None:
    """One rank's loader never gives the batch of that number, counted from 0."""
    counter = itertools.count()
    following = collate.MicroBatchStream.__next__

    def stuck(stream: collate.MicroBatchStream) -> Any:
        while os.environ["RANK"] == rank and next(counter) >= int(batch):
            time.sleep(1)
        return following(stream)

    with mock.patch.object(collate.MicroBatchStream, "__next__", stuck):
        pretrain(*arguments)


def slow_forward(rank: str, *arguments: str) -> None:
    """One rank's forward takes 0.5 s longer, and the images of step 2 come 0.3 s late."""
    forward, following = ijepa.IJepa.forward, collate.MicroBatchStream.__next__
    counter, this = itertools.count(), os.environ["RANK"] == rank

    def slow(self: ijepa.IJepa, *inputs: Any) -> dict[str, torch.Tensor]:
        time.sleep(0.5 * this)
        return forward(self, *inputs)

    def late(stream: collate.MicroBatchStream) -> Any:
        time.sleep(0.3 * (this and next(counter) == 2))
        return following(stream)

    with (
        mock.patch.object(ijepa.IJepa, "forward", slow),
        mock.patch.object(collate.MicroBatchStream, "__next__", late),
    ):
        pretrain(*arguments)
