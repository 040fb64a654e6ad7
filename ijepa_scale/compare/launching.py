"""One run, in processes of its own, as a user would start it; what it says goes to a file."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ijepa_kernels
import ijepa_scale
from ijepa_scale.compare.runs import Training
from ijepa_scale.engine.signals import EXIT_SECONDS, StopRequest
from ijepa_scale.run.incidents import RunError

OUTPUT = "output.log"
POLL_SECONDS = 0.2
SHOWN_LINES = 8  # of a run that failed
TAIL_BYTES = 1 << 16


def command(training: Training, ranks: int) -> list[str]:
    """What trains it: of several ranks by torchrun, which finds a free port."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    verb = ["--module" if launcher else "-m", "ijepa_scale.verbs.command", "pretrain"]
    return [sys.executable, *launcher, *verb, "--config", training.recipe.file, *training.words]


def train(training: Training, ranks: int, stop: StopRequest, watch: Callable[[dict[str, Any]], None]) -> bool:
    """Train, or go on with, a run to its end; False where it was stopped on request.

    watch is handed the newest step record, again and again, once there is one that was not there before. Raises
    RunError for a run that fails, with its last words.
    """
    training.folder.mkdir(parents=True, exist_ok=True)
    metrics = training.folder / "metrics.jsonl"
    earlier = last_step(metrics)  # it may be of a later step than the checkpoint that the run goes on from
    with open(training.folder / OUTPUT, "ab") as output, stop.between_steps():
        # A group of its own: a Ctrl-C of the terminal is passed on to the run once, not twice.
        process = subprocess.Popen(
            command(training, ranks), stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        try:
            while process.poll() is None:
                if stop.pending():
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(EXIT_SECONDS)
                    return False
                if (record := last_step(metrics)) and record != earlier:
                    watch(record)
                time.sleep(POLL_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode or not training.finished:
        raise RunError(
            f"{training.name} failed, and all of its words are in {training.folder / OUTPUT}:\n{last_words(training)}"
        )
    return True


def environment() -> dict[str, str]:
    """The package is found from any folder."""
    roots = [str(Path(package.__path__[0]).parent) for package in (ijepa_scale, ijepa_kernels)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])}


def last_step(path: Path) -> dict[str, Any] | None:
    """The newest step record of a metrics.jsonl; None before the first. The last line may be half written."""
    for line in _tail(path).split(b"\n")[-2::-1]:
        with contextlib.suppress(ValueError):  # the first of the tail may be cut
            if (record := json.loads(line)).get("kind") == "step":
                return record
    return None


def last_words(training: Training) -> str:
    """What a run said of its error, or else its last lines."""
    lines = _tail(training.folder / OUTPUT).decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error")]
    return "\n".join((errors or [line for line in lines if line.strip()])[-SHOWN_LINES:])


def _tail(path: Path) -> bytes:
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read()
