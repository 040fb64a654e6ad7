"""Which of how many processes this is: the one reader of what launchers set, and the roll call at the start.

Read are RANK and its kin (deepspeed, torchrun, PyTorchJob), SLURM's (srun), Open MPI's and PMI's (mpirun, mpiexec).
torch is imported where it is needed: a process looks at its variables first of all.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

SPEAK_SECONDS = 10.0  # of waiting for other processes before it is said
WAIT_MINUTES = 10  # for other processes, as DeepSpeed waits for a process group
OTHER_PORT = (
    "give another: deepspeed --master_port, torchrun --master-port, or MASTER_PORT in the environment of all processes"
)
# What each launcher calls rank, number and rank on its machine; of these, unlike RANK, a single process may inherit.
FOREIGN = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


class StartError(ValueError):
    """A process does not find the others: each says so itself, as there is no rank 0 that would."""

    local = True


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
            raise ValueError(f"RANK is empty and WORLD_SIZE is {values['WORLD_SIZE']}: {_unset(names)}")
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
        advice = "export it as launch/slurm.sbatch does" if launcher == "srun" else _unset(names)
        raise ValueError(f"{launcher} sets {given}, but not {', '.join(missing)}: {advice}")
    rank, size, local_rank = _number(values, names[0], 0), _number(values, names[1], 1), _number(values, names[2], -1)
    if not 0 <= rank < size:
        raise ValueError(f"{names[0]} is {rank} and {names[1]} {size}: ranks are 0 to {size - 1}; {_unset(names)}")
    if alone:
        return Place(rank, size, max(local_rank, 0))
    if local_rank < 0 and (here := _number(values, "LOCAL_WORLD_SIZE", 0)):
        local_rank = rank % here
    port = _number(values, "MASTER_PORT", 0)
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT is {port}: ports are 1 to {2**16 - 1}; {OTHER_PORT}")
    return Place(rank, size, local_rank, values["MASTER_ADDR"], port)


def _unset(names: tuple[str, ...]) -> str:
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


def ranks_here() -> int:
    """Processes of this job on this machine, as far as the launcher says; else 1."""
    values = {key: value.strip() for key, value in os.environ.items() if value.strip()}
    return _number(values, "LOCAL_WORLD_SIZE", 0) or _number(values, "LOCAL_SIZE", 1)


def host_store(here: Place) -> Any:
    """Rank 0's store, at which all processes meet; None for the others, and where torchrun's agent has one.

    It lives as long as what is returned or a process group. Raises ValueError where the port is taken.
    """
    if here.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    import torch.distributed as dist

    try:
        return dist.TCPStore("localhost", here.port, is_master=True, multi_tenant=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        taken = "EADDRINUSE" in str(error)
        reason = "is taken, by another run perhaps" if taken else f"cannot be listened on: {str(error).splitlines()[0]}"
        raise ValueError(f"port {here.port} of this machine {reason}; {OTHER_PORT}") from error


def roll_call(here: Place, store: Any, *, speak: float = SPEAK_SECONDS, wait: timedelta | None = None) -> int:
    """Wait for all processes, saying so where it takes long; returns the rank on this machine.

    store: host_store()'s. Raises StartError where after `wait` (None: DeepSpeed's own time, or
    DEEPSPEED_TIMEOUT minutes) some are missing, or rank 0 cannot be reached.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agents have met
        return max(here.local_rank, 0)
    import torch.distributed as dist

    wait = wait or timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", WAIT_MINUTES)))
    patience = _Patience(f"{here.address}:{here.port}", speak, wait)
    patience.speak = here.local_rank <= 0  # once a machine
    patience.until(lambda: "" if _reachable(here.address, here.port) else "rank 0", "nothing answers there yet")
    if store is None:
        store = dist.TCPStore(here.address, here.port, is_master=False, wait_for_workers=False, timeout=wait)
    try:
        store.set(f"ijepa/{here.rank}", _machine())
        missing = [*range(here.world_size)]

        def others() -> str:
            missing[:] = [rank for rank in missing if not store.check([f"ijepa/{rank}"])]
            count = len(missing)
            return (
                ""
                if not count
                else f"{count} more process{'es' * (count > 1)} (rank {', '.join(map(str, missing[:8]))})"
            )

        if here.rank == 0:
            patience.until(others, _unset(("RANK", "WORLD_SIZE")))
            store.set("ijepa/all", "")
        else:  # rank 0 says who is missing; a little later, as it decides
            patience.deadline += 5
            patience.speak = False
            patience.until(lambda: "" if store.check(["ijepa/all"]) else "other processes", "see rank 0")
        if here.local_rank >= 0:
            return here.local_rank
        return sum(store.get(f"ijepa/{rank}").decode() == _machine() for rank in range(here.rank))
    except dist.DistNetworkError as error:
        raise StartError(f"rank 0 at {patience.where} ended before all processes had started") from error


class _Patience:
    """Waits that together take no longer than a limit, and are said once."""

    def __init__(self, where: str, speak: float, wait: timedelta):
        self.where, self.wait, self.speak = where, wait, True
        self.speak_at, self.deadline = time.monotonic() + speak, time.monotonic() + wait.total_seconds()

    def until(self, missing: Callable[[], str], advice: str) -> None:
        """Ask until nothing is missing."""
        while what := missing():
            now, minutes = time.monotonic(), self.wait.total_seconds() / 60
            if now > self.deadline:
                raise StartError(f"waited {minutes:g} minutes for {what} at {self.where}: {advice}")
            if now > self.speak_at and self.speak:
                print(
                    f"waiting for {what} at {self.where}, for up to {minutes:g} minutes: {advice}",
                    file=sys.stderr,
                    flush=True,
                )
                self.speak = False
            time.sleep(0.05)


def _reachable(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:  # not there yet, or not to be found by its name yet
        return False
    return True


def _machine() -> str:
    """A name that processes have in common where they share GPUs."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
