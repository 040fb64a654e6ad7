"""Asking a run to stop: signals, and the death of the launcher above it."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

STOP_EXIT_CODE = 75  # EX_TEMPFAIL: stopped on request, checkpoint saved, to be started again
LAUNCHERS = (b"deepspeed", b"deepspeed.launcher.launch", b"torchrun", b"torch.distributed.run")
REPEAT_SECONDS = 2.0  # a launcher sends INT and TERM within 10 ms of each other: they count as one


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 (SLURM's pre-emption) and Ctrl-C for the training loop to act on between steps.

    A second Ctrl-C, later than REPEAT_SECONDS after the first, interrupts at once; SIGTERM never does.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._first = 0.0
        self._launcher = _launcher()
        self._previous = {
            number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.reason:
            self.reason, self._first = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._first > REPEAT_SECONDS:
            raise KeyboardInterrupt

    def pending(self) -> str:
        """Why this process was asked to stop, or ""."""
        if not self.reason and self._launcher and _ancestors()[: len(self._launcher)] != self._launcher:
            self.reason = "the launcher's death"
        return self.reason

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # the process is gone, or there is no /proc on this system
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _ancestors() -> tuple[int, int]:
    parent = os.getppid()
    return parent, _parent(parent)


def _launcher() -> tuple[int, ...]:
    """The pids above this one that belong to the deepspeed launcher or to torchrun, whose death orphans the ranks.

    The deepspeed launcher's runner dies alone of a SIGTERM and leaves deepspeed.launcher.launch and the ranks behind.
    """
    pids = []
    for pid in _ancestors():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            break
        names = [word.rpartition(b"/")[2] for word in words[:4]]  # of python -u -m MODULE, or python PROGRAM
        if not any(name in LAUNCHERS for name in names):
            break
        pids.append(pid)
    return tuple(pids)
