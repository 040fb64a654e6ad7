"""Which of how many processes this is: the one reader of what launchers set.

Read are RANK and its kin (deepspeed, torchrun, PyTorchJob), SLURM's (srun), Open MPI's and PMI's (mpirun, mpiexec).
torch is not imported: a process looks at its variables first of all.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

OTHER_PORT = (
    "give another: deepspeed --master_port, torchrun --master-port, or MASTER_PORT in the environment of all processes"
)
# What each launcher calls rank, number and rank on its machine; of these, unlike RANK, a single process may inherit.
FOREIGN = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


@dataclass(frozen=True)
class Place:
    """This process among all, and where they meet. local_rank: -1 where no launcher said it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""  # "": nobody to meet
    port: int = 0


def place() -> Place:
    """What the launcher of this process says. Raises ValueError that names what is missing or does not fit."""
    values = {key: value.strip() for key, value in os.environ.items() if value.strip()}
    names, launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "the environment"
    if "RANK" not in values:
        if "RANK" in os.environ and _number(values, "WORLD_SIZE", 1) > 1:
            raise ValueError(f"RANK is empty and WORLD_SIZE is {values['WORLD_SIZE']}: {unset(names)}")
        several = [name for name, (_, size, _) in FOREIGN.items() if _number(values, size, 1) > 1]
        if not several:
            return Place()
        launcher, names = several[0], FOREIGN[several[0]]
        values.setdefault("MASTER_PORT", "29500")
        if values.get("OMPI_COMM_WORLD_LOCAL_SIZE") == values.get("OMPI_COMM_WORLD_SIZE") and launcher == "Open MPI":
            values.setdefault("MASTER_ADDR", "127.0.0.1")  # all are on one machine
    alone = values.get(names[1]) == "1" and "MASTER_ADDR" not in values
    needed = [*names[:2], *([] if alone else ["MASTER_ADDR", "MASTER_PORT"])]
    if missing := [key for key in needed if key not in values]:
        given = ", ".join(f"{key}={values[key]}" for key in needed if key in values)
        advice = "export it as launch/slurm.sbatch does" if launcher == "srun" else unset(names)
        raise ValueError(f"{launcher} sets {given}, but not {', '.join(missing)}: {advice}")
    rank, size, local_rank = _number(values, names[0], 0), _number(values, names[1], 1), _number(values, names[2], -1)
    if not 0 <= rank < size:
        raise ValueError(f"{names[0]} is {rank} and {names[1]} {size}: ranks are 0 to {size - 1}; {unset(names)}")
    if alone:
        return Place(rank, size, max(local_rank, 0))
    if local_rank < 0 and (here := _number(values, "LOCAL_WORLD_SIZE", 0)):
        local_rank = rank % here
    port = _number(values, "MASTER_PORT", 0)
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT is {port}: ports are 1 to {2**16 - 1}; {OTHER_PORT}")
    return Place(rank, size, local_rank, values["MASTER_ADDR"], port)


def unset(names: tuple[str, ...]) -> str:
    return f"start it with deepspeed, torchrun or srun, or, for a process alone, unset {names[0]} and {names[1]}"


def _number(values: Mapping[str, str], key: str, otherwise: int) -> int:
    text = values.get(key, str(otherwise))
    if not text.removeprefix("-").isdecimal():
        raise ValueError(f"{key} in the environment must be a whole number, got {text!r}")
    return int(text)


def launcher_rank() -> int:
    """This process's rank as start() will find it, before any process group exists; 0 without a launcher.

    Also 0 where the launcher's variables do not fit together: then every process says so.
    """
    try:
        return place().rank
    except ValueError:
        return 0


def speaks() -> bool:
    """Whether this process tells the user of its machine what befell all: rank 0, and the first one elsewhere."""
    try:
        return place().rank == 0 or place().local_rank == 0
    except ValueError:
        return True


def ranks_here() -> int:
    """Processes of this job on this machine: as far as the launcher says, else 1, until start() has counted them."""
    values = {key: value.strip() for key, value in os.environ.items() if value.strip()}
    return _number(values, "LOCAL_WORLD_SIZE", 0) or _number(values, "LOCAL_SIZE", 1)
