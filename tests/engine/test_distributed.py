import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ijepa_scale.engine import distributed, launchers
from ijepa_scale.train import InputError
from ijepa_scale.verbs import fail
from tests.processes import ENVIRONMENT, ROOT, assert_all, run_ranks

SCRIPT = """
import random, torch
from ijepa_scale.engine.distributed import Ranks

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1e3

torch.set_num_threads(1)
ranks = Ranks(0, 1, 0, torch.device("cpu"))
before, kept = resident(), []
torch.empty(30 * 2**20, dtype=torch.uint8).fill_(1)  # glibc serves what is smaller from its heap after this
for size in range(100):
    tensors = [torch.ones(500_000 + 1000 * size) for _ in range(100)]  # 200 MB, freed but for a little at the end
    kept.append(torch.ones(300))
    del tensors
freed = resident()
ranks.release_memory()
print(before, freed, resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps memory so")
def test_memory_that_tensors_left_goes_back_to_the_system():
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    before, freed, released = map(float, ended.stdout.split())
    assert freed > before + 40  # what it is about: 60 to 330 MB in some runs
    assert released < before + 20


def sums_and_each() -> None:
    ranks = distributed.start()
    found = ranks.sums_and_each({"a": 1.0 + ranks.rank, "b": -2.0}, {"x": 10.0 * ranks.rank, "y": 3.0 - ranks.rank})
    assert found == ({"a": 6.0, "b": -6.0}, {"x": [0.0, 10.0, 20.0], "y": [3.0, 2.0, 1.0]})
    assert [ranks.name(rank) for rank in range(3)] == [f"rank {rank} ({socket.gethostname()})" for rank in range(3)]
    ranks.close()


def test_values_of_each_rank_and_sums(tmp_path):
    assert_all(run_ranks(sums_and_each, 3, tmp_path))


def use_and_free() -> None:
    ranks = distributed.start()
    before = 0
    for _ in range(4):  # 200 MB in large and small pieces, used and freed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(size) for size in [*[200_000] * 200, 10_000_000]]
        del pieces
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    ranks.close()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has these settings")
def test_what_a_step_frees_is_there_for_the_next(tmp_path):
    (end,) = run_ranks(use_and_free, 1, tmp_path)
    assert end.code == 0, end.output
    assert int(end.output) < 1000  # of 49,000 pages; with malloc as it comes 9,800 or more are mapped anew


def use_and_free_in_part() -> None:
    ranks = distributed.start()
    distributed.keep_nothing_large(ranks)
    pieces = [torch.ones(500_000) for _ in range(200)]  # 400 MB
    before = resident()
    del pieces[::2]
    print(before - resident())
    ranks.close()


def resident() -> float:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has these settings")
def test_at_zero_3_what_large_tensors_leave_is_given_back(tmp_path):
    (end,) = run_ranks(use_and_free_in_part, 1, tmp_path)
    assert end.code == 0, end.output
    assert float(end.output) > 150  # of 200; what malloc keeps is none of the system's


def shared_memory_unused() -> None:
    os.environ["LOCAL_SIZE"] = "2"  # as DeepSpeed's launcher says: all ranks are on this machine
    before = set(Path("/dev/shm").iterdir())
    ranks = distributed.start()
    ranks.together(lambda: None)  # all have started
    made = set(Path("/dev/shm").iterdir()) - before
    assert not [path for path in made if "deepspeed" in path.name], "an operation that training never calls"
    ranks.close()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm")
def test_deepspeed_leaves_nothing_in_shared_memory(tmp_path):
    assert_all(run_ranks(shared_memory_unused, 2, tmp_path))


STARTED = """
import torch
from ijepa_scale.engine import distributed
ranks = distributed.start()
print(torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
ranks.close()
"""


@pytest.mark.gpu
def test_cudnn_attention_is_off_in_training():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = {**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}  # the rest of ENVIRONMENT hides the GPU
    ended = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.split()[-2:] == ["False", "True"], ended.stderr


def gather_uneven_rows(counts: list[int]) -> None:
    """Rank r has counts[r] rows, which say of whom they are."""
    ranks = distributed.start()
    for dtype in (torch.float32, torch.int64):
        own = torch.arange(counts[ranks.rank] * 3).reshape(-1, 3).to(dtype) + 100 * ranks.rank
        rows = ranks.gather_rows(own)
        expected = [torch.arange(count * 3).reshape(-1, 3).to(dtype) + 100 * rank for rank, count in enumerate(counts)]
        assert rows.dtype == dtype and torch.equal(rows, torch.cat(expected))
        vector = ranks.gather_rows(own[:, 0])
        assert torch.equal(vector, torch.cat(expected)[:, 0])
    ranks.close()


def test_rows_of_all_ranks_in_their_order_however_many_each_has(tmp_path):
    assert_all(run_ranks(gather_uneven_rows, 3, tmp_path, [2, 0, 5]))


def test_one_rank_has_all_rows():
    rows = torch.arange(6.0).reshape(2, 3)
    assert distributed.alone().gather_rows(rows) is rows


def limits(hang_seconds: float | None, minutes: float) -> None:
    ranks = distributed.start(hang_seconds=hang_seconds)
    from deepspeed.utils import groups

    for group in (torch.distributed.group.WORLD, groups._clone_world_group()):  # the latter is ZeRO-3's
        found = group._get_backend(torch.device("cpu")).options._timeout
        assert found.total_seconds() == 60 * minutes, found
    ranks.close()


@pytest.mark.parametrize("hang_seconds, minutes", [(None, 10), (5.0, 10), (1800.0, 32), (0.0, 24 * 60)])
def test_a_collective_waits_longer_than_the_watchdog_that_knows_for_whom(tmp_path, hang_seconds, minutes):
    assert_all(run_ranks(limits, 2, tmp_path, hang_seconds, minutes))


def share_a_machine(cores: list[set[int]], threads: int) -> None:
    """As mpirun starts processes, which it may bind to some of the cores."""
    rank = os.environ.pop("RANK")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        del os.environ[name]
    os.environ |= {"PMI_RANK": rank, "PMI_SIZE": os.environ.pop("WORLD_SIZE")}
    os.sched_getaffinity = lambda pid: cores[int(rank)]  # type: ignore[assignment]
    ranks = distributed.start()
    assert launchers.ranks_here() == 2 and ranks.local_rank == int(rank)
    assert torch.get_num_threads() == threads
    ranks.close()


@pytest.mark.parametrize("cores, threads", [([{0, 1, 2, 3}] * 2, 2), ([{0, 1, 2}, {3, 4, 5}], 3)])
def test_ranks_count_those_of_their_machine_where_the_launcher_does_not_say(tmp_path, cores, threads):
    assert_all(run_ranks(share_a_machine, 2, tmp_path, cores, threads))


@pytest.mark.parametrize("local_rank, heard", [(2, True), (3, False)])
def test_one_of_the_processes_without_a_gpu_says_so(monkeypatch, capsys, local_rank, heard):
    """Of four on a machine with two GPUs; the first one, which speaks for its machine, has one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed.roll_call, "host_store", lambda here: None)
    monkeypatch.setattr(distributed.roll_call, "roll_call", lambda here, store, alike: here.local_rank)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    place = {"RANK": local_rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank, "MASTER_ADDR": "here", "MASTER_PORT": 29500}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        ValueError, match=r"this is process [34] of its machine, and it sees 2; .* not --gpus-per-task"
    ) as caught:
        distributed.start()
    error = InputError(str(caught.value))
    error.__cause__ = caught.value  # as pretrain() raises it
    assert fail(error, 2) == 2 and ("more processes than GPUs" in capsys.readouterr().err) == heard
