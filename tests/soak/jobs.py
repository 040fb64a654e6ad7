"""A training job of two ranks, under no launcher or under torchrun, that faults are done to."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ENVIRONMENT, PRETRAIN, ROOT, Ended, RankProcesses, free_port, pretrain, start_ranks

RANKS = 2
FAKETIME = next(map(str, Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1")), "")  # "": not installed
SLEEP = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
LIMIT = 300.0  # seconds that any job here may take to end by itself


class Forked:
    """Ranks that a server forked, with all imports done."""

    launcher = 0

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.processes: RankProcesses = start_ranks(pretrain, RANKS, folder, *arguments)

    def pids(self) -> list[int]:
        return [self.processes.pid(rank) for rank in range(RANKS)]

    def ended(self) -> bool:
        return not any(process.is_alive() for process in self.processes.processes)

    def reap(self) -> Ended:
        """Of an ended job: the worst code, and all output."""
        ends = self.processes.wait(5)
        return Ended(worst([end.code for end in ends]), "\n".join(end.output for end in ends))


class Launched:
    """The same under torchrun, each rank with all its imports. clock: of libfaketime, a file with an offset."""

    def __init__(self, folder: Path, arguments: list[str], clock: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "output.txt"
        environment = {**os.environ, **ENVIRONMENT}
        # The ranks' clock alone. Under libfaketime time.sleep() fails at times: it waits by an absolute time.
        (folder / "sitecustomize.py").write_text(SLEEP)
        faked = [] if clock is None else ["env", f"LD_PRELOAD={FAKETIME}", f"FAKETIME_TIMESTAMP_FILE={clock}"]
        faked += faked and [f"PYTHONPATH={folder}:{ENVIRONMENT['PYTHONPATH']}"]
        faked += faked and ["FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1", sys.executable]
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [
                    *run,
                    "--master-port",
                    str(free_port()),
                    *(["--no-python"] if faked else []),
                    *faked,
                    str(PRETRAIN),
                    *arguments,
                ],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.launcher = self.process.pid
        self.seen: list[int] = []

    def pids(self) -> list[int]:
        """Of the ranks; [] before torchrun has started them."""
        if len(self.seen) < RANKS:
            self.seen = [pid for pid in children(self.launcher) if str(PRETRAIN).encode() in words_of(pid)]
        return self.seen if len(self.seen) == RANKS else []

    def ended(self) -> bool:
        return self.process.poll() is not None and not any(map(alive, self.seen))

    def reap(self) -> Ended:
        return Ended(self.process.wait(), self.log.read_text(errors="replace"))


Job = Forked | Launched


def worst(codes: list[int | None]) -> int | None:
    """A failure before a stop on request (75), and that before 0."""
    return max(codes, key=lambda code: (code not in (0, 75), code == 75))


def words_of(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def status(pid: int) -> list[str]:
    """What follows the name in /proc/PID/stat: state, parent, ...; [] where there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def alive(pid: int) -> bool:
    return status(pid)[:1] not in ([], ["Z"])


def children(pid: int) -> list[int]:
    numbers = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return sorted(number for number in numbers if status(number)[1:2] == [str(pid)])


def left_of(outputs: Path) -> list[int]:
    """Living processes that write their errors to a file in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if outputs in Path(os.readlink(path / "fd" / "2")).parents and alive(int(path.name)):
                found.append(int(path.name))
    return found


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Waited:
    seconds: float
    in_time: bool


def wait_for_end(job: Job, seconds: float = LIMIT) -> Waited:
    """Until all processes of a job have ended; what is left then is killed."""
    started = time.monotonic()
    while not job.ended() and time.monotonic() - started < seconds:
        time.sleep(0.02)
    in_time = job.ended()
    if not in_time:
        kill(*job.pids(), *([job.launcher] if job.launcher else []))
    return Waited(time.monotonic() - started, in_time)
