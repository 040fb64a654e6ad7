"""Every way out of a run: all ranks and their loader processes end, with one clear word."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from ijepa_scale.run.records import read_records
from tests.data.small_sources import write_parquet
from tests.end_to_end import worker_faults
from tests.end_to_end.runs import Runs, checkpoints_of
from tests.end_to_end.test_signals import ENDLESS


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    return Runs(small_config, tmp_path_factory.mktemp("output"))


def left_of(processes):
    """What still runs of the ranks and of their children, by the files that they write to."""
    logs = {str(log) for log in processes.logs}
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd" / "2") in logs and "Z" not in (process / "stat").read_text().split()[2]:
                left.append(int(process.name))
        except OSError:  # it has ended, or is a zombie
            continue
    return left


def ends_of(processes, seconds=40):
    ends = processes.wait(seconds)
    deadline = time.monotonic() + 5
    while left_of(processes):
        assert time.monotonic() < deadline, f"{left_of(processes)} still run"
        time.sleep(0.02)
    return ends


def test_an_error_of_one_rank_ends_all(runs, tmp_path):
    before = ("error in a callback", "0")
    faulty = worker_faults.fault_in_training
    ends = ends_of(runs.start(tmp_path / "run", *ENDLESS, "data.workers=1", target=faulty, before=before))
    assert [end.code for end in ends] == [1, 1]
    assert ends[0].output.count("Traceback") == ends[0].output.count("\nZeroDivisionError\n") == 1, ends[0].output
    assert ends[1].output.count("error (rank 1): another rank has ended, by its own error or a signal, and") == 1
    assert "Traceback" not in ends[1].output, ends[1].output


FAULTS = {
    "base exception": "\nGeneratorExit\n",
    "full disk": "error: [Errno 27] File too large: ",
    "killed loader": "error: a loader process was killed, perhaps as",
    "full shared memory": "error: /dev/shm is full; start the container with a larger --shm-size",
    "few files": "error: too many files are open; raise the limit (ulimit -n)",
}


def test_each_fault_in_training_ends_every_process_and_is_said_once(runs, tmp_path):
    options = (*ENDLESS, "data.workers=2")
    started = {
        fault: runs.start(
            tmp_path / fault, *options, ranks=1, target=worker_faults.fault_in_training, before=(fault, "0")
        )
        for fault in FAULTS
    }
    for fault, processes in started.items():
        (end,) = ends_of(processes)
        assert end.code == 1 and end.output.count(FAULTS[fault]) == 1, (fault, end)
        assert ("Traceback" in end.output) == (fault == "base exception"), (fault, end)


def test_a_run_whose_output_is_closed_saves_and_ends(runs, tmp_path):
    processes = runs.start(tmp_path / "run", *ENDLESS, "data.workers=1", ranks=1, target=worker_faults.closed_output)
    (end,) = ends_of(processes)
    (stopped,) = checkpoints_of(tmp_path / "run")
    words = f"stopped by output that cannot be written (Broken pipe) after step {stopped}; the same command"
    assert end.code == 75 and end.output.count(words) == 1 and "Traceback" not in end.output, end.output


def test_set_up_is_left_at_once_whatever_it_does(runs, tmp_path):
    processes = runs.start(tmp_path / "run", *ENDLESS, "data.workers=1", target=worker_faults.endless_set_up)
    log = processes.logs[0]
    while not log.exists() or "preparing" not in log.read_text():
        assert processes.running()
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(processes.pid(1), signal.SIGTERM)  # in a collective, which does not come back
    processes.processes[1].join(10)
    os.kill(processes.pid(0), signal.SIGHUP)
    ends = ends_of(processes, 10)
    assert [end.code for end in ends] == [75, 75]
    assert ends[0].output.count("stopped by SIGHUP during set-up; the same command goes on from there") == 1
    assert not any("Traceback" in end.output for end in ends), ends


def test_batches_that_shared_memory_cannot_hold_are_refused_before_training(runs, tmp_path):
    for dry in ((), ("--dry-run",)):
        options = ("data.workers=2", *dry)
        (end,) = runs(tmp_path / "run", *options, ranks=1, target=worker_faults.little_shared_memory, code=2)
        words = "x (4 made ahead x data.workers 2 + 1); start the container with --shm-size=1g (or --ipc=host), or set "
        assert end.output.count(f"{words}data.workers=0 (the training process then loads)") == 1, end.output
        assert "Traceback" not in end.output and ("parameters " in end.output) == bool(dry)


def test_a_stopped_copy_of_parquet_goes_on_with_the_files_that_are_left(runs, tmp_path):
    for i in range(12):
        write_parquet(tmp_path / "set" / f"train-{i:05}-of-00012.parquet", range(i, i + 1))
    source = (f"data.source={tmp_path / 'set'}", f"data.cache_dir={tmp_path / 'cache'}")
    processes = runs.start(tmp_path / "run", *ENDLESS, *source, ranks=1)
    while not (kept := copies_in(tmp_path / "cache")):
        assert processes.running(), processes.wait()
        time.sleep(0.02)
    os.kill(processes.pid(0), signal.SIGINT)
    (end,) = ends_of(processes, 10)
    assert end.code == 75 and "stopped by SIGINT during set-up; the same command goes on" in end.output, end.output
    assert "Traceback" not in end.output and len(copies_in(tmp_path / "cache")) < 12, end.output
    runs(tmp_path / "run", *source, "optimization.max_steps=1", ranks=1)
    whole = copies_in(tmp_path / "cache")
    assert len(whole) == 12 and kept.items() <= whole.items()  # those that were there were not made again


def copies_in(cache):
    """When each whole copy was made."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow") if "incomplete" not in str(path)}


def test_the_slowest_rank_and_the_worst_wait_are_recorded(runs, tmp_path):
    runs(tmp_path / "run", "optimization.stop_at_step=4", target=worker_faults.slow_forward, before=("1",))
    steps = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "step"]
    assert [record["slowest_rank"] for record in steps] == [f"rank 1 ({socket.gethostname()})"] * 4
    for record in steps:
        seconds, mean = record["slowest_rank_seconds"], record["mean_rank_seconds"]
        assert 0.5 < seconds < record["step_seconds"] and 2 * mean < 2 * seconds - 0.15
    waits = [(record["data_wait_seconds"], record["data_wait_worst_seconds"]) for record in steps]
    assert sum(worst for _, worst in waits) > 0.3 and max(worst - mean for mean, worst in waits) > 0.14
