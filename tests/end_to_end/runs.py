"""Runs of launch/pretrain.py on real ranks, and what they leave behind."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ijepa_scale.run.records import read_records
from tests.processes import Ended, RankProcesses, assert_all, pretrain, start_ranks, undrawn

# Of a step record, all that must not depend on when and where it ran.
EXACT = (
    "step",
    "loss",
    "lr",
    "weight_decay",
    "ema_momentum",
    "grad_norm",
    "context_tokens",
    "target_tokens",
    "applied",
)
# Measured over 12 steps in fp32: losses (about 0.45) and gradient norms (about 0.4) within 7e-8.
ROUNDING = 2e-6


class Runs:
    """Starts launch/pretrain.py with one config."""

    def __init__(self, config: Path, output: Path):
        self.config, self.output = config, output
        self.count = 0

    def start(
        self,
        run_dir: Path,
        *arguments: str,
        ranks: int = 2,
        target: Callable = pretrain,
        before: tuple[str, ...] = (),
        drawn: bool = False,
    ) -> RankProcesses:
        """target: a function to run in place of pretrain; it is given `before` and then pretrain's arguments.

        drawn: whether the run's pictures and page are made, too.
        """
        self.count += 1
        output = self.output / f"output-{self.count}"
        words = (*before, "--config", str(self.config), f"run_dir={run_dir}", *arguments)
        if drawn:
            return start_ranks(target, ranks, output, *words)
        return start_ranks(undrawn, ranks, output, target, *words)

    def __call__(self, run_dir: Path, *arguments: str, code: int = 0, **options: Any) -> list[Ended]:
        """Run to the end, with start()'s options; every rank must end with the code."""
        ends = self.start(run_dir, *arguments, **options).wait()
        assert_all(ends, code)
        return ends


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The step records, in order, without times."""
    records = [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "step"]
    return [{key: record[key] for key in EXACT} for record in records]


def last_step(run_dir: Path) -> int:
    """The step of the newest record; -1 before the first. A line may be half written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    return len([line for line in lines if '"kind": "step"' in line]) - 1


def wait_for_step(run_dir: Path, step: int, processes: Callable[[], bool], timeout: float = 120) -> None:
    """Until the run has recorded the step. processes: whether it still runs."""
    deadline = time.monotonic() + timeout
    while last_step(run_dir) < step:
        assert processes(), f"the run ended before step {step}"
        assert time.monotonic() < deadline, f"no step {step} in {timeout} s"
        time.sleep(0.01)


def state_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's files, by file and key."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {f"{file.name}|{key}": values for file in files for key, values in load_file(file).items()}


def assert_same_run(run_dir: Path, other: Path, step: int) -> None:
    """Every step's record, and all of the state at the last checkpoint, are bit for bit the same."""
    assert steps_of(run_dir)[:step] == steps_of(other)[:step]
    assert [record["step"] for record in steps_of(run_dir)] == list(range(len(steps_of(run_dir))))
    state, expected = state_of(run_dir, step), state_of(other, step)
    assert state.keys() == expected.keys()
    differing = [key for key in state if not torch.equal(state[key], expected[key])]
    assert not differing, differing


def assert_close_run(run_dir: Path, other: Path) -> None:
    """The same images, masks and schedules at every step; losses and norms within rounding."""
    ours, theirs = steps_of(run_dir), steps_of(other)
    inexact = ("loss", "grad_norm")
    assert [{k: r[k] for k in EXACT if k not in inexact} for r in ours] == [
        {k: r[k] for k in EXACT if k not in inexact} for r in theirs
    ]
    for key in inexact:
        assert max(abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=True)) < ROUNDING, key


def assert_drawn(run_dir: Path) -> None:
    """The pictures and the page of a run that ended are there; the page says so."""
    for name in ("masks.png", "loss_curve.png"):
        assert (run_dir / name).stat().st_size > 5000, name
    assert "finished after" in (run_dir / "report.html").read_text()


def checkpoints_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
