"""What launchers set, what lacks, and the start of processes that meet or do not."""

import os
import socket

import pytest

from ijepa_scale.engine import launchers
from ijepa_scale.engine.launchers import OTHER_PORT, Place, launcher_rank, place
from tests.processes import pretrain, run_ranks

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
    code, output = ended(RANK="1")
    assert code == 2 and "error: the environment sets RANK=1, but not WORLD_SIZE" in output
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = ended(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    line = f"error: port {port} of this machine is taken, by another run perhaps; {OTHER_PORT}\n"
    assert code == 2 and line in output
    assert "--master_port" in line and "--master-port" in line and "MASTER_PORT" in line
