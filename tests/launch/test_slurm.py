"""launch/slurm.sbatch, by a SLURM of real processes (tests/slurm.py)."""

import os
import shutil
import signal
import subprocess

import pytest

from tests.end_to_end.runs import assert_close_run, checkpoints_of, steps_of, wait_for_step
from tests.processes import ENVIRONMENT, ROOT, assert_all, pretrain, run_ranks, undrawn
from tests.slurm import on_path

SCRIPT = ROOT / "launch" / "slurm.sbatch"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def submit(small_config, tmp_path):
    """submit(options of sbatch, words of pretrain): sbatch, running."""
    (tmp_path / "slurm").mkdir()
    environ = {**os.environ, **ENVIRONMENT, **on_path(tmp_path / "slurm")}
    started = []

    def begin(options, *words):
        common = ["--config", small_config, f"data.cache_dir={tmp_path / 'cache'}"]
        started.append(
            subprocess.Popen(
                ["sbatch", *options, SCRIPT, *common, *words],
                cwd=ROOT,
                env=environ,
                stdout=(tmp_path / "log.txt").open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_job_near_its_time_limit_is_requeued_and_goes_on(submit, small_config, tmp_path):
    run_dir, words = tmp_path / "run", ["optimization.max_steps=80", "checkpoint.every_steps=1000"]
    job = submit(["--nodes=1", "--ntasks-per-node=2"], f"run_dir={run_dir}", *words)
    wait_for_step(run_dir, 4, lambda: job.poll() is None, timeout=250)
    job.send_signal(signal.SIGUSR1)
    code = job.wait(300)
    output = (tmp_path / "log.txt").read_text()
    assert code == 0, output
    assert output.count("stopped by SIGUSR1 after step") == 1 and output.count("resumed from ") == 1, output
    assert max(checkpoints_of(run_dir)) == 80
    words += ["--config", str(small_config), f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'one'}"]
    assert_all(run_ranks(undrawn, 2, tmp_path / "output", pretrain, *words))
    assert_close_run(run_dir, tmp_path / "one")


@pytest.mark.slow
def test_tasks_of_an_array_have_run_folders_of_their_own(submit, tmp_path):
    words = ["optimization.max_steps=4", "seed=%a", f"run_dir={tmp_path}/run-%a"]
    job = submit(["--array=0-1", "--nodes=1", "--ntasks-per-node=1"], *words)
    assert job.wait(300) == 0, (tmp_path / "log.txt").read_text()
    zero, one = (steps_of(tmp_path / f"run-{task}") for task in (0, 1))
    assert len(zero) == len(one) == 4 and zero[0]["loss"] != one[0]["loss"]


def in_allocation(*words):
    """A process of a shell that salloc or `srun --pty` has opened: it is none of the tasks that were asked for."""
    os.environ.update(SLURM_JOB_ID="7", SLURM_NTASKS="16", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    os.environ.update(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1", SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES="2")
    undrawn(pretrain, *words)


def test_a_process_inside_an_allocation_trains_alone(small_config, tmp_path):
    words = ["--config", str(small_config), f"run_dir={tmp_path / 'run'}", "optimization.max_steps=2"]
    (end,) = run_ranks(in_allocation, 1, tmp_path, *words)
    assert_all([end])
    assert "1 x 8 x 1 images a step" in end.output and "waiting for" not in end.output
