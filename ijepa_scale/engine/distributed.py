"""Joining the process group; this process's device; agreement between ranks."""

import contextlib
import ctypes
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ijepa_scale.data.files import usable_cores
from ijepa_scale.engine import launchers, roll_call

T = TypeVar("T")

# Agreements (who prepares data, which checkpoint, stop or go on) may wait for a rank that copies a large source.
CONTROL_TIMEOUT = timedelta(hours=24)
BEYOND_WATCHDOG = timedelta(minutes=2)  # for it to ask and to speak, before a collective ends the process
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
LARGE = 1 << 20  # bytes of an allocation that keep_nothing_large() means


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints its memory and warns of a missing GPU at every start; its errors are exceptions and pass."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    control: a gloo group for small agreements on the CPU; None where there is one rank. hosts: of each rank.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: Any = None
    hosts: tuple[str, ...] = ()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def name(self, rank: int) -> str:
        """For people: with its machine, where that is known."""
        return f"rank {rank} ({self.hosts[rank]})" if self.hosts else f"rank {rank}"

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over the ranks, in fp64."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.control is not None:
            dist.all_reduce(totals, group=self.control)
        return totals.tolist()

    def sums_and_each(
        self, summed: Mapping[str, float], each: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """(the sums of some named values, and those of every rank of others, in rank order), by one all-reduce.

        Names and their order are the same on every rank.
        """
        count = len(summed)
        own = [value if rank == self.rank else 0.0 for value in each.values() for rank in range(self.world_size)]
        found = self.sum([*summed.values(), *own])
        values = {name: found[count + i * self.world_size :][: self.world_size] for i, name in enumerate(each)}
        return dict(zip(summed, found[:count], strict=True)), values

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [value] * self.world_size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, on the device, with gradients.

        Gradients that are then averaged over the ranks are those of one process that holds everything, provided that
        every rank computes the same scalar from the sum.
        """
        return _Total.apply(tensor) if self.world_size > 1 else tensor

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows in rank order, on every rank's device. A rank may have more than another."""
        if self.world_size == 1:
            return rows
        counts = self.gather(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def from_first(self, value: T) -> T:
        """Rank 0's value on every rank."""
        values = [value]
        if self.control is not None:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def together(self, call: Callable[[], T], *, on: str = "all") -> T:
        """Run call on all ranks, or on the first of each node (on="node") before the others.

        A ValueError or OSError of any rank is raised on every rank, so that none is left waiting; where it is not of
        this rank, it names the one that it is of.
        """
        result: Any = None
        for turn in ("node", "others") if on == "node" else ("all",):
            error: Exception | None = None
            if turn == "all" or (turn == "node") == (self.local_rank == 0):
                try:
                    result = call()
                except (ValueError, OSError) as caught:
                    error = caught
            for who, other in self.gather((roll_call.who(self.rank), error)):
                if other is not None:
                    raise error or _of_another(who, other)
        return result

    def release_memory(self) -> None:
        """On a CPU, give memory that nothing uses back to the system (glibc; elsewhere nothing happens).

        Batches differ in their numbers of tokens, and what their tensors leave between them grows over a run.
        """
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if self.device.type == "cpu" and trim:
            trim(0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _of_another(who: str, error: Exception) -> Exception:
    """The error of another rank, which that one does not print where this machine's user looks."""
    if isinstance(error, OSError):
        return OSError(f"{who}: {error}")
    error.args = (f"{who}: {error}", *error.args[1:])
    return error


def alone() -> Ranks:
    """This process by itself, on a GPU if there is one; it joins no process group."""
    return Ranks(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class _Total(torch.autograd.Function):
    """A sum over the ranks; backward needs no communication, as every rank already holds the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # The data-parallel mean over ranks divides by their number what only this rank passes on to its own tensor.
        return grads[0] * dist.get_world_size()


def _quiet_warnings(rank: int) -> None:
    """Of Python's warnings rank 0 alone speaks, and not of what libraries will have to call otherwise one day.

    DeepSpeed's calls of torch are among those: with torch 2.13 and 2.14 every rank said so, at each of them.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    if rank:
        warnings.simplefilter("ignore")


def start(alike: Mapping[str, str] | None = None, *, hang_seconds: float | None = None) -> Ranks:
    """Join the process group of deepspeed's launcher, torchrun, srun or mpirun; alone where none started this process.

    alike: names and values that must be the same on all ranks. hang_seconds: after which a watchdog ends a step, 0
    without one: collectives wait longer than that, as it can say which rank they wait for. Raises ValueError for what
    the launcher's variables lack, a port that is taken, processes that do not come or do not start, and what is not
    alike.
    """
    here = launchers.place()
    if not here.address:
        os.environ.pop(roll_call.AGENT_STORE, None)  # of a launcher further up
    store = roll_call.host_store(here)
    if not here.address:
        here = replace(here, address="127.0.0.1", port=store.port)
    os.environ.update(MASTER_ADDR=here.address, MASTER_PORT=str(here.port))
    rank, world_size, local_rank = here.rank, here.world_size, roll_call.roll_call(here, store, alike=alike)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    _quiet_warnings(rank)
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise roll_call.StartError(
            f"more processes than GPUs: this is process {local_rank + 1} of its machine, and it sees "
            f"{torch.cuda.device_count()}; start as many as there are GPUs, and show each process all of its machine's "
            "(srun --gpus-per-node, not --gpus-per-task)",
            local=local_rank == torch.cuda.device_count(),  # one of the machine's
        )
    if cuda:
        torch.cuda.set_device(local_rank)
        # Dense attention (whole images, or no kernel for packed tokens) is scaled_dot_product_attention's, which on 9.x
        # and 10.x prefers cuDNN: it plans each new shape anew, in tens of milliseconds, and whether the one shape of
        # the target encoder gains by it is not measured (docs/lab/speed.md). For the process: it has no other scope.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        _keep_memory()
    with quiet():
        import deepspeed

        # An all-reduce for inference on CPUs, which training never calls: a minute of C++ to build, and 69 MB of shared
        # memory a process that outlive it (more than a container has by default). By its name: deepspeed.comm.torch, as
        # an attribute, is torch itself.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        backend, wait = "nccl" if cuda else "gloo", deepspeed.constants.default_pg_timeout
        limit = wait if hang_seconds is None else CONTROL_TIMEOUT
        if hang_seconds:
            limit = max(wait, timedelta(seconds=hang_seconds) + BEYOND_WATCHDOG)
        device_id = torch.device("cuda", local_rank) if cuda and world_size > 1 else None  # as DeepSpeed has it
        meet = roll_call.group_store(here, store, wait)
        dist.init_process_group(
            backend, store=meet, rank=rank, world_size=world_size, timeout=limit, device_id=device_id
        )
        deepspeed.init_distributed(dist_backend=backend, verbose=False)  # which takes this one
        if world_size > 1:  # DeepSpeed makes one for ZeRO-3, with torch's limit: 10 minutes under NCCL
            importlib.import_module("deepspeed.utils.groups")._WORLD_GROUP = dist.new_group(timeout=limit)  # type: ignore[attr-defined]
    del store
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) if world_size > 1 else None
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    ranks = Ranks(rank, world_size, local_rank, device, control)
    own = (roll_call.machine(), usable_cores())
    said = ranks.gather(own)
    machines = [machine for machine, _ in said]
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(machines.count(own[0])))  # for ranks_here(); srun does not say it
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(own[1]) // said.count(own)))  # each may have been given cores of its own
    return replace(ranks, hosts=tuple(machine.partition(" ")[0] for machine in machines))


def keep_nothing_large(ranks: Ranks) -> None:
    """On a CPU, from now on, give memory of 1 MiB or more back to the system when it is freed (glibc).

    For ZeRO-3, where weights come and go: of what lies in their place a block of another size can be most of a machine.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if ranks.device.type == "cpu" and mallopt:
        mallopt(M_MMAP_MAX, 1 << 16)
        mallopt(M_MMAP_THRESHOLD, LARGE)


def _keep_memory() -> None:
    """On a CPU, keep the memory that steps use."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        # What a step frees the next one needs: given back to the system it is mapped and zeroed anew, page by page.
        # Ranks.release_memory() gives back what is left over, now and then.
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)
