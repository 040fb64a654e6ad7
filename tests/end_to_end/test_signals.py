"""Signals to ranks and to launchers: the step is finished, a checkpoint saved, nothing left running; and bad losses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ijepa_scale.run.records import read_records
from tests.end_to_end import worker_faults
from tests.end_to_end.runs import (
    Runs,
    assert_drawn,
    assert_same_run,
    checkpoints_of,
    state_of,
    steps_of,
    wait_for_step,
)
from tests.processes import ENVIRONMENT, PRETRAIN, assert_all, free_port, pretrain

BIN = Path(sys.executable).parent
# Longer than any test waits, with no checkpoint but those that signals bring about.
ENDLESS = ("optimization.max_steps=1000000", "checkpoint.every_steps=1000000")
STEPS = 12


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    return Runs(small_config, tmp_path_factory.mktemp("output"))


def assert_goes_on_exactly(runs, run, *options, more=3):
    """The run, stopped somewhere, holds one checkpoint; going on from it equals never having stopped."""
    (stopped,) = checkpoints_of(run)
    assert len(steps_of(run)) == stopped
    stop = f"optimization.stop_at_step={stopped + more}"
    runs(run, *ENDLESS, *options, stop)
    whole = run.with_name(f"{run.name}-whole")
    runs(whole, *ENDLESS, *options, stop)
    assert_same_run(run, whole, stopped + more)
    assert len(steps_of(run)) == stopped + more


@pytest.mark.parametrize(
    "number, rank, target",
    [
        (signal.SIGTERM, 1, pretrain),
        (signal.SIGINT, 0, pretrain),
        (signal.SIGUSR1, 1, pretrain),
        pytest.param(signal.SIGTERM, 0, worker_faults.signalled_while_saving, marks=pytest.mark.slow),
    ],
    ids=["term-1", "int-0", "usr1-1", "more-while-saving"],
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(runs, tmp_path, number, rank, target):
    processes = runs.start(tmp_path / "run", *ENDLESS, "data.workers=1", target=target)
    wait_for_step(tmp_path / "run", 3, processes.running)
    os.kill(processes.pid(rank), number)
    ends = processes.wait()
    assert_all(ends, 75)
    (stopped,) = checkpoints_of(tmp_path / "run")
    assert f"stopped by {number.name} after step {stopped}; the same command goes on from there" in ends[0].output
    if number == signal.SIGTERM:
        assert_goes_on_exactly(runs, tmp_path / "run")


def test_a_second_ctrl_c_interrupts_at_once(runs, tmp_path):
    """Where a step or a save takes too long for the user; within two seconds it counts as the launcher's echo."""
    processes = runs.start(tmp_path / "run", *ENDLESS, "data.workers=1", target=worker_faults.endless_step)
    wait_for_step(tmp_path / "run", 2, processes.running)
    while not (tmp_path / "run" / "stuck").exists():
        assert processes.running()
        time.sleep(0.1)
    os.kill(processes.pid(0), signal.SIGINT)
    time.sleep(0.5)
    os.kill(processes.pid(0), signal.SIGINT)
    time.sleep(2.0)
    assert processes.running()
    os.kill(processes.pid(0), signal.SIGINT)
    ends = processes.wait(20)
    assert "error: interrupted by a second Ctrl-C; the same command goes on from the last checkpoint" in ends[0].output
    assert [end.code for end in ends] == [1, 1] and "Traceback" not in ends[0].output + ends[1].output
    assert checkpoints_of(tmp_path / "run") == []


class Launched:
    """A launcher in a session of its own, and all below it, known by a variable of their environment."""

    def __init__(self, command, output):
        self.output = output
        self.mark = f"IJEPA_TEST_LAUNCH={output}"
        environment = {**os.environ, **ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}"}
        environment.update([self.mark.split("=", 1)])
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self):
        return self.process.poll() is None

    def pids(self):
        """All that still run, also where their parents have ended, with these: {pid: parent}."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):  # empty for a zombie
                    found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def rank_pid(self, rank):
        """The process that is the rank itself, not one of its loader's workers."""
        parents = self.pids()
        pids = []
        for pid in parents:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables and str(PRETRAIN).encode() in command:
                pids.append(pid)
        (own,) = [pid for pid in pids if parents[pid] not in pids]
        return own

    def assert_all_end(self, timeout=60):
        deadline = time.monotonic() + timeout
        while (left := self.pids()) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.05)
        assert not left, f"{left} still run:\n{self.output.read_text()}"
        self.process.wait(timeout)

    def kill(self):
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def torchrun(config, run, *options):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *(PRETRAIN, "--config", config, f"run_dir={run}", *options),
    ]


def deepspeed(config, run, *options):
    return [
        *(BIN / "deepspeed", "--quiet", "--num_gpus", 2, "--master_port", free_port()),
        *(PRETRAIN, "--config", config, f"run_dir={run}", *options),
    ]


@pytest.fixture
def under_way(small_config, tmp_path):
    """Starts a run by a launcher and waits for its first steps: then it is launchers, ranks and loader workers."""
    started = []

    def start(launcher):
        run = tmp_path / "run"
        started.append(Launched(launcher(small_config, run, *ENDLESS, "data.workers=1"), tmp_path / "output.txt"))
        wait_for_step(run, 3, started[0].running)
        assert len(started[0].pids()) >= 5
        return started[0], run

    yield start
    for launched in started:
        launched.kill()


@pytest.mark.slow
def test_sigterm_to_one_rank_under_torchrun(under_way):
    """The ranks end with 75; torchrun itself reports any rank's code but 0 as a failure, and ends with 1."""
    launched, run = under_way(torchrun)
    os.kill(launched.rank_pid(1), signal.SIGTERM)
    launched.assert_all_end()
    output = launched.output.read_text()
    (stopped,) = checkpoints_of(run)
    assert f"stopped by SIGTERM after step {stopped}" in output
    assert "exitcode  : 75" in output
    assert launched.process.returncode == 1
    assert len(steps_of(run)) == stopped


@pytest.mark.slow  # a signal to a rank, and a launcher that dies, quicker tests ask of
def test_sigterm_to_the_deepspeed_launcher(runs, under_way):
    """Its runner dies of the signal and leaves the ranks behind; these notice, save and end."""
    launched, run = under_way(deepspeed)
    launched.process.send_signal(signal.SIGTERM)
    launched.assert_all_end()
    assert "stopped by the launcher's death after step" in launched.output.read_text()
    assert launched.process.returncode == -signal.SIGTERM
    assert_goes_on_exactly(runs, run)


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_of_the_deepspeed_launcher(runs, under_way):
    launched, run = under_way(deepspeed)
    os.killpg(launched.process.pid, signal.SIGINT)
    launched.assert_all_end()
    assert "stopped by SIGINT" in launched.output.read_text()
    assert_goes_on_exactly(runs, run)


@pytest.mark.slow
def test_sigterm_to_one_rank_under_the_deepspeed_launcher(runs, under_way):
    """The launcher passes a rank's code on."""
    launched, run = under_way(deepspeed)
    os.kill(launched.rank_pid(0), signal.SIGTERM)
    launched.assert_all_end()
    assert "stopped by SIGTERM" in launched.output.read_text()
    assert launched.process.returncode == 75
    assert_goes_on_exactly(runs, run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_reaches_the_ranks(runs, under_way, number):
    launched, run = under_way(torchrun)
    launched.process.send_signal(number)
    launched.assert_all_end()
    assert f"stopped by {number.name}" in launched.output.read_text()
    assert_goes_on_exactly(runs, run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_a_killed_launcher_leaves_no_rank_behind(under_way, launcher):
    launched, run = under_way(launcher)
    launched.process.send_signal(signal.SIGKILL)
    launched.assert_all_end()
    (stopped,) = checkpoints_of(run)
    assert f"stopped by the launcher's death after step {stopped}" in launched.output.read_text()


def test_one_bad_loss_is_skipped_and_its_images_named(runs, tmp_path):
    run = tmp_path / "run"
    stop = "optimization.stop_at_step="
    ends = runs(run, f"{stop}6", target=worker_faults.nan_loss_at, before=("5", "1"))
    runs(tmp_path / "before", f"{stop}5")
    steps = steps_of(run)
    assert steps[:5] == steps_of(tmp_path / "before")
    assert steps[5]["loss"] is None and not steps[5]["applied"]  # JSON has no NaN
    left, before = state_of(run, 6), state_of(tmp_path / "before", 5)
    assert left.keys() == before.keys() and all(torch.equal(left[key], before[key]) for key in left)
    (skipped,) = [record for record in read_records(run / "metrics.jsonl") if record["kind"] == "skipped"]
    assert skipped["step"] == 5
    assert len(skipped["samples"]) == len(set(skipped["samples"])) == 8  # the global batch
    assert all(Path(sample).suffix == ".png" for sample in skipped["samples"])
    assert "warning: step 5: loss or gradients not finite" in ends[0].output
    assert skipped["samples"][0] in ends[0].output
    runs(run, drawn=True)
    assert [record["step"] for record in steps_of(run) if not record["applied"]] == [5]
    assert len(steps_of(run)) == STEPS
    assert_drawn(run)


@pytest.mark.slow
def test_three_bad_losses_in_a_row_end_the_run(runs, tmp_path):
    run = tmp_path / "run"
    ends = runs(run, target=worker_faults.nan_loss_at, before=("2,3,5,6,7", "1"), code=1)
    assert "3 steps in a row were not finite; the last good checkpoint is" in ends[0].output
    assert str(run / "checkpoints" / "step-00000004") in ends[0].output
    assert "Traceback" not in ends[0].output + ends[1].output
    assert checkpoints_of(run) == [4]
    runs(run)  # without the fault: goes on from step 4, whose own steps 2 and 3 were skipped
    steps = steps_of(run)
    assert [record["step"] for record in steps if not record["applied"]] == [2, 3]
    assert len(steps) == STEPS
