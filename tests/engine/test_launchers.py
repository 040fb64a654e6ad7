"""What launchers set, what lacks, and the start of processes that meet or do not."""

import os
import socket
import threading
from datetime import timedelta

import pytest

from ijepa_scale.engine import launchers
from ijepa_scale.engine.launchers import OTHER_PORT, Place, StartError, host_store, launcher_rank, place, roll_call
from tests.processes import free_port, pretrain, run_ranks

MEET = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4"}


@pytest.mark.parametrize(
    "environ, found",
    [
        ({}, Place()),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEET}, Place(1, 2, 0, "node1", 1234)),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEET}, Place(1, 2, -1, "node1", 1234)),  # PyTorchJob
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", **MEET}, Place(5, 8, 1, "node1", 1234)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        ({"RANK": " 0 ", "WORLD_SIZE": "1", "LOCAL_RANK": "", "MASTER_ADDR": " "}, Place()),
        ({"RANK": "", "LOCAL_RANK": "1"}, Place()),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, Place()),
        ({**SRUN, **MEET}, Place(5, 8, 1, "node1", 1234)),
        ({**SRUN, **PMI, "MASTER_ADDR": "node1"}, Place(5, 8, 1, "node1", 29500)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, Place()),  # srun --pty
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Place()),  # a batch script, salloc
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEET}, Place(0, 2, 0, "node1", 1234)),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Place(1, 2, 1, "127.0.0.1", 29500)),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", **MEET}, Place(1, 2, 1, "node1", 1234)),
        ({**PMI, **MEET}, Place(3, 4, -1, "node1", 1234)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"}, Place()),
    ],
)  # fmt: skip
def test_each_launcher_is_understood(environ, found, monkeypatch):
    monkeypatch.setattr(launchers.os, "environ", environ)
    assert place() == found and launcher_rank() == found.rank


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"RANK": "0"}, "the environment sets RANK=0, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start it with"),
        ({"RANK": "1"}, "RANK=1, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: .* unset RANK and WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "MASTER_ADDR=node1, but not MASTER_PORT"),
        ({"RANK": "", "WORLD_SIZE": "2", **MEET}, "RANK is empty and WORLD_SIZE is 2"),
        ({"RANK": "x", "WORLD_SIZE": "2", **MEET}, "RANK in the environment must be a whole number, got 'x'"),
        ({"RANK": "1", "WORLD_SIZE": "two", **MEET}, "WORLD_SIZE in the environment must be a whole number, got 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEET}, "RANK is 2 and WORLD_SIZE 2: ranks are 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **MEET}, "RANK is -1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a", **MEET}, "LOCAL_RANK in the environment must be"),
        (SRUN, "srun sets .*SLURM_STEP_NUM_TASKS=8.*, but not MASTER_ADDR: export it as launch/slurm.sbatch does"),
        (MPI, "Open MPI sets .*OMPI_COMM_WORLD_SIZE=2.*, but not MASTER_ADDR"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS in the environment must be a whole number"),
    ],
)  # fmt: skip
def test_what_lacks_or_does_not_fit_is_named_by_every_process(environ, words, monkeypatch):
    monkeypatch.setattr(launchers.os, "environ", environ)
    with pytest.raises(ValueError, match=words) as caught:
        place()
    assert "\n" not in str(caught.value) and launcher_rank() == 0


def pretrain_in(environ, *arguments):
    os.environ.update(environ)
    pretrain(*arguments)


def test_a_lone_process_speaks_whatever_it_inherited(small_config, tmp_path):
    def ended(*arguments, **environ):
        (end,) = run_ranks(pretrain_in, 1, tmp_path, environ, "--config", str(small_config), *arguments)
        assert "Traceback" not in end.output
        return end.code, end.output

    code, output = ended("--dry-run", SLURM_PROCID="1", SLURM_NTASKS="2")
    assert code == 0 and "parameters" in output
    code, output = ended("data.source=/no", RANK="1")
    assert code == 2 and "error: the environment sets RANK=1, but not WORLD_SIZE" in output
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = ended("data.source=/no", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    line = f"error: port {port} of this machine is taken, by another run perhaps; {OTHER_PORT}\n"
    assert code == 2 and line in output
    assert "--master_port" in line and "--master-port" in line and "MASTER_PORT" in line


def test_processes_without_local_ranks_meet_and_number_themselves():
    port = free_port()
    found = {}

    def start(rank):
        here = Place(rank, 3, -1, "127.0.0.1", port)
        store = host_store(here)
        found[rank] = roll_call(here, store, wait=timedelta(seconds=20))
        done.wait(20)  # rank 0's store lives as long as it is asked

    done = threading.Barrier(3)
    threads = [threading.Thread(target=start, args=(rank,)) for rank in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 0, 1: 1, 2: 2}  # all on this machine


@pytest.mark.parametrize("rank, missing", [(0, "2 more processes (rank 1, 2)"), (1, "rank 0")])
def test_who_is_waited_for_is_said_and_not_for_ever(capfd, rank, missing):
    here = Place(rank, 3, 0, "127.0.0.1", free_port())
    store = host_store(here)
    with pytest.raises(StartError) as caught:
        roll_call(here, store, speak=0.2, wait=timedelta(seconds=0.6))
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"waiting for {missing} at 127.0.0.1:{here.port}, for up to 0.01 minutes: ")
    assert str(caught.value).startswith(f"waited 0.01 minutes for {missing} at 127.0.0.1:{here.port}: ")
    assert caught.value.local and ("unset RANK and WORLD_SIZE" in said.err) == (rank == 0)
