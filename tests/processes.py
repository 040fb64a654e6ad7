"""Real ranks for tests: processes that find each other as under torchrun, forked from a server with all imports done.

A cold start of torch and DeepSpeed takes longer than a whole test; tests of the launchers themselves pay for it.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN, TRAIN_SKETCH, BENCHMARK, EVALUATE = (
    ROOT / "launch" / f"{verb}.py" for verb in ("pretrain", "train_sketch", "benchmark", "evaluate")
)

# Ranks of tests share few cores, and run on the CPU whatever the machine has.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]),
}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])
_started: list[BaseProcess] = []


@dataclass(frozen=True)
class Ended:
    """How a rank ended. code: its exit code, -9 when killed. output: its stdout and stderr."""

    code: int | None
    output: str


class RankProcesses:
    """target(*arguments) on world_size ranks, started."""

    def __init__(self, target: Callable[..., Any], world_size: int, folder: Path, arguments: tuple):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"output-{rank}.txt" for rank in range(world_size)]
        port = free_port()
        self.processes: list[BaseProcess] = []
        with mock.patch.dict(os.environ, ENVIRONMENT):
            forkserver.ensure_running()
        for rank, log in enumerate(self.logs):
            process = _context.Process(target=_rank, args=(target, rank, world_size, port, str(log), arguments))
            process.start()
            self.processes.append(process)
            _started.append(process)

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, timeout: float = 120) -> list[Ended]:
        """All ranks' ends; those that outlive the timeout are killed and the test fails."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        ends = [
            Ended(process.exitcode, log.read_text() if log.exists() else "")
            for process, log in zip(self.processes, self.logs, strict=True)
        ]
        assert not late, f"ranks {late} did not end in {timeout} s:\n" + "\n".join(end.output for end in ends)
        return ends


def start_ranks(target: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> RankProcesses:
    """Start target(*arguments), a module's function, on world_size ranks. Their output goes to folder."""
    return RankProcesses(target, world_size, folder, arguments)


def end_all() -> None:
    """Kill what a failed test left running."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


def run_ranks(
    target: Callable[..., Any], world_size: int, folder: Path, *arguments: Any, timeout: float = 120
) -> list[Ended]:
    return start_ranks(target, world_size, folder, *arguments).wait(timeout)


def assert_all(ends: list[Ended], code: int = 0) -> None:
    outputs = "\n".join(f"--- rank {rank}: {end.code}\n{end.output}" for rank, end in enumerate(ends))
    assert [end.code for end in ends] == [code] * len(ends), outputs


def pretrain(*arguments: str) -> None:
    """launch/pretrain.py as a script."""
    sys.argv = [str(PRETRAIN), *arguments]
    runpy.run_path(str(PRETRAIN), run_name="__main__")


def train_sketch(*arguments: str) -> None:
    """launch/train_sketch.py as a script."""
    sys.argv = [str(TRAIN_SKETCH), *arguments]
    runpy.run_path(str(TRAIN_SKETCH), run_name="__main__")


def benchmark(*arguments: str) -> None:
    """launch/benchmark.py as a script."""
    sys.argv = [str(BENCHMARK), *arguments]
    runpy.run_path(str(BENCHMARK), run_name="__main__")


def evaluate(*arguments: str) -> None:
    """launch/evaluate.py as a script."""
    sys.argv = [str(EVALUATE), *arguments]
    runpy.run_path(str(EVALUATE), run_name="__main__")


def undrawn(target: Callable[..., Any], *arguments: str) -> None:
    """target(*arguments), which trains, without masks.png, loss_curve.png and the page.

    Rank 0 draws them for longer than a small run's steps take. Runs of which a test asks what is drawn have them.
    """
    from ijepa_scale import train
    from ijepa_scale.run import report

    with contextlib.ExitStack() as stack:
        for owner, name in ((train, "preview_masks"), (report, "draw_loss_curve"), (report, "write_page_or_say")):
            stack.enter_context(mock.patch.object(owner, name, lambda *given, **options: None))
        target(*arguments)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(target: Callable[..., Any], rank: int, world_size: int, port: int, log: str, arguments: tuple) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the process's life
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(ENVIRONMENT)
    multiprocessing.set_start_method("fork", force=True)  # Linux's default, for loaders; the server's is inherited
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    import torch

    torch.set_num_threads(1)
    try:
        target(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
