"""Asking a run to stop, by signals or by the death of the launcher above it; and how a process ends, whatever happens.

It loads nothing but the standard library: this is the first module of a process, and what it remembers of the launcher
must be from before torch is imported, which takes seconds.
"""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ijepa_scale.engine.launchers import launcher_rank

STOP_EXIT_CODE = 75  # EX_TEMPFAIL: stopped on request, nothing lost, to be started again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LAUNCHERS = (b"deepspeed", b"deepspeed.launcher.launch", b"torchrun", b"torch.distributed.run")
LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # set for their ranks by torchrun and by the deepspeed launcher alone
INITS = (b"init", b"systemd", b"tini", b"dumb-init", b"docker-init", b"catatonit")  # who takes in orphans
DEATH = "the launcher's death"
REPEAT_SECONDS = 2.0  # a launcher sends INT and TERM within 10 ms of each other: they count as one
POLL_SECONDS = 0.5  # between looks at the launcher while there are no steps
GRACE_SECONDS = 5.0  # for the main thread to tidy up and leave, once it was asked to outside of training
EXIT_SECONDS = 60.0  # for a process to close what it has open


class Stopped(BaseException):
    """Raised where a process is asked to stop while it does not train."""


class StopRequest:
    """Remembers SIGTERM, SIGHUP, SIGUSR1 (SLURM's pre-emption), Ctrl-C and that the launcher died.

    While the run trains the loop acts on them between steps; a second Ctrl-C, later than REPEAT_SECONDS after the
    first, interrupts at once; SIGTERM never does. At any other time Stopped is raised in the main thread.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.doing = "set-up"
        self.training = False
        self.raised = False  # Stopped
        self.leaving = False  # the process ends by itself
        self._first, self._told = 0.0, ""
        self._outside_since = time.monotonic()
        self._launcher = _launcher()
        self._orphan = any(name in os.environ for name in LAUNCHED) and _orphan(self._launcher)
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # as nohup leaves it
        }
        os.register_at_fork(after_in_child=self._leave_child_alone)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), bool(self.reason)
        if not again:
            self.reason, self._first = signal.Signals(number).name, now
        if not self.training:
            if not self.raised:  # once: what is tidied up then is not interrupted
                self.raised = True
                raise Stopped(self.reason)
        elif again and number == signal.SIGINT and now - self._first > REPEAT_SECONDS:
            raise KeyboardInterrupt

    def _leave_child_alone(self) -> None:
        """A fork is no rank: Ctrl-C and the like reach the whole process group, and the rank ends its children."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number in self._previous:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)

    def pending(self) -> str:
        """Why this process was asked to stop, or ""."""
        if not self.reason and self._launcher_died():
            self.reason, self._first = DEATH, time.monotonic()
        return self.reason

    def _launcher_died(self) -> bool:
        return self._orphan or (bool(self._launcher) and _ancestors()[: len(self._launcher)] != self._launcher)

    def ask(self, reason: str) -> None:
        """Stop after this step."""
        self.reason = self.reason or reason

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within it the loop asks for pending(), and stops after a step."""
        if self.raised:  # in a __del__, or where a library swallows what it does not know: no training begins
            raise Stopped(self.reason)
        self.training = True
        try:
            yield
        finally:
            self.doing = "the report"
            self._outside_since = time.monotonic()
            self.training = False

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def watch(self) -> None:
        """See to it that this process ends when it is asked to, although its main thread waits for a library's call.

        Python's signal handlers run in the main thread, once that is back; this one is told of signals all the same.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True, name="stop").start()

    def _watch(self, pipe: int) -> None:
        asked = 0.0
        while not self.leaving:
            told = select.select([pipe], [], [], POLL_SECONDS)[0]
            numbers = [number for number in (os.read(pipe, 4096) if told else b"") if number in self._previous]
            now = time.monotonic()
            if asked and signal.SIGINT in numbers and now - asked > REPEAT_SECONDS:
                if self.training:
                    _exit("error: interrupted by a second Ctrl-C; the same command goes on from the last checkpoint", 1)
                _exit(self.words(), STOP_EXIT_CODE)
            if not self.training and not self.raised and self._launcher_died():
                self.reason = self.reason or DEATH
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                asked = asked or now
            if numbers and not asked:
                asked, self._told = now, signal.Signals(numbers[0]).name
            late = asked and now - max(asked, self._outside_since) > GRACE_SECONDS
            if late and not self.training and not self.leaving:
                _exit(self.words(), STOP_EXIT_CODE)

    def words(self) -> str:
        """That the process was stopped outside of training; "" where another rank says it."""
        if launcher_rank():
            return ""
        return f"stopped by {self.reason or self._told} during {self.doing}; the same command goes on from there"


def run_process(main: Callable[[StopRequest], int]) -> NoReturn:
    """Run main and end the process with its exit code: the one place where a rank ends.

    After an error nothing is waited for that may never come: no child, no thread, no peer in a collective.
    """
    if sys.stderr is None:  # closed (2>&-): faulthandler needs one, and a file of the run would get its number
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the process's life
    stop = StopRequest()
    stop.watch()
    try:
        code = main(stop)
    except BaseException as error:
        stop.raised = True  # a signal from here on interrupts nothing
        code, words = _explained(error, stop)
        stop.leaving = True
        _exit(words, code)
    stop.leaving = True
    if stop.raised and code:  # what was interrupted failed, and its error took the place of Stopped
        _exit(stop.words(), STOP_EXIT_CODE)
    if code == 1:
        _exit("", code)
    faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
    for number in SIGNALS:  # srun sends SIGTERM once any rank has ended: while Python ends, its handlers are gone
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _explained(error: BaseException, stop: StopRequest) -> tuple[int, str]:
    """The exit code after an error that nobody caught, and what to say of it."""
    if isinstance(error, SystemExit) and not _output_closed():
        return (error.code, "") if isinstance(error.code, int) else (int(error.code is not None), str(error.code or ""))
    if "DataLoader worker" in str(error) and "killed by signal: Terminated" in str(error):
        stop.reason = stop.reason or "SIGTERM"  # of the whole process group: the loaders' end may be heard of first
    if isinstance(error, Stopped) or (stop.reason and not stop.training and not isinstance(error, SystemExit)):
        return STOP_EXIT_CODE, stop.words()
    place = f"error (rank {launcher_rank()}): " if launcher_rank() else "error: "
    if isinstance(error, BrokenPipeError | SystemExit) and _output_closed():
        return 1, f"{place}standard output was closed; the same command goes on from the last checkpoint"
    if _lost_peer(error):
        said = str(error).strip().splitlines()[0]
        return 1, f"{place}another rank has ended, by its own error or a signal, and this one with it: {said}"
    return 1, "".join(traceback.format_exception(error))


def _lost_peer(error: BaseException) -> bool:
    """Whether a collective failed as a process at the other end is gone (gloo and NCCL say it in these words)."""
    text = str(error)
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return (
        isinstance(error, RuntimeError)
        and any(name in text for name in ("gloo", "NCCL", "nccl"))
        and any(words in text for words in gone)
    )


def _output_closed() -> bool:
    """Whether nobody can read any more what is written to standard output."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def _exit(words: str, code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, never open, or somebody else's
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{words.rstrip()}\n".encode(errors="replace") if words else b"")
    os._exit(code)


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # the process is gone, or there is no /proc on this system
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _ancestors() -> tuple[int, int]:
    parent = os.getppid()
    return parent, _parent(parent)


def _words_of(pid: int) -> list[bytes]:
    """The command line of a process, paths without their folders; [] where it cannot be read."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [word.rpartition(b"/")[2] for word in words]


def _launcher() -> tuple[int, ...]:
    """The pids above this one that belong to the deepspeed launcher or to torchrun, whose death orphans the ranks.

    The deepspeed launcher's runner dies alone of a SIGTERM and leaves deepspeed.launcher.launch and the ranks behind.
    """
    pids = []
    for pid in _ancestors():
        if not any(name in LAUNCHERS for name in _words_of(pid)[:4]):  # of python -u -m MODULE, or python PROGRAM
            break
        pids.append(pid)
    return tuple(pids)


def _orphan(launcher: tuple[int, ...]) -> bool:
    """Whether the launcher that started this process had died before it could be seen.

    Only what takes in orphans tells: any other parent may be a launcher by another name, or a script that one started.
    """
    above = os.getppid()
    if launcher:  # deepspeed.launcher.launch has a runner above it where that started it on its own machine
        words = _words_of(launcher[0])
        if len(launcher) > 1 or not {b"deepspeed.launcher.launch", b"--master_addr=127.0.0.1"} <= set(words):
            return False
        above = _parent(launcher[0])
    name = (_words_of(above) or [b""])[0].removesuffix(b":")
    return name in INITS or (above == 1 and not name.startswith(b"python") and name not in LAUNCHERS)
