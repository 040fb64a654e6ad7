"""The roll call at the start: processes wait for one another, say what they run, and hear of one that cannot start.

It needs a store alone. No process group is made before all are there and alike, as processes that run different code or
configs may wait in different collectives for ever. torch is imported where it is needed: it takes seconds.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ijepa_scale.engine.launchers import OTHER_PORT, Place, place, unset

SPEAK_SECONDS = 10.0  # of waiting for other processes before it is said
WAIT_MINUTES = 10  # for other processes, as DeepSpeed waits for a process group
TELL_SECONDS = 60.0  # for the others to come and hear why nothing starts
MOST_LINES = 8  # of what differs
NCCL_ENDED = "exception_dump"  # its watchdog's key (torch's ProcessGroupNCCL.cpp)
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun's word for: its agent has the store


class StartError(ValueError):
    """Processes do not find one another, or do not fit together. local: this process says so itself.

    Each does where there may be no rank 0 that would; else one of each machine.
    """

    def __init__(self, message: str, *, local: bool = True) -> None:
        super().__init__(message)
        self.local = local


def who(rank: int) -> str:
    """This process, as others name it."""
    return f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"


@dataclass(frozen=True)
class Card:
    """What a process says of itself. alike: what must be the same on all. error: why it does not start, or ""."""

    who: str
    machine: str
    alike: dict[str, str] = field(default_factory=dict)
    error: str = ""


def host_store(here: Place) -> Any:
    """Rank 0's store, at which all processes meet; None for the others, and where torchrun's agent has one.

    It lives as long as what is returned or a process group. A process alone has no port yet: it listens on one that is
    free. Raises ValueError where the port is taken.
    """
    if here.rank or _agent_has_store():
        return None
    import torch.distributed as dist

    try:
        return dist.TCPStore("localhost", here.port, is_master=True, multi_tenant=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        taken = "EADDRINUSE" in str(error)
        reason = "is taken, by another run perhaps" if taken else f"cannot be listened on: {str(error).splitlines()[0]}"
        raise ValueError(f"port {here.port} of this machine {reason}; {OTHER_PORT}") from error


def roll_call(
    here: Place,
    store: Any,
    *,
    alike: Mapping[str, str] | None = None,
    speak: float = SPEAK_SECONDS,
    wait: timedelta | None = None,
) -> int:
    """Wait for all processes, saying so where it takes long; returns the rank on this machine.

    store: host_store()'s. alike: names and values that must be those of rank 0 on every rank. Raises StartError where
    they are not, where a process has called it off, and where after `wait` (None: DeepSpeed's own time, or
    DEEPSPEED_TIMEOUT minutes) some are missing or rank 0 cannot be reached.
    """
    if here.world_size == 1:
        return max(here.local_rank, 0)
    import torch.distributed as dist

    wait = wait or timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", WAIT_MINUTES)))
    patience = _Patience(f"{here.address}:{here.port}", speak, wait)
    patience.speak = here.local_rank <= 0  # once a machine
    patience.until(lambda: "" if _reachable(here.address, here.port) else "rank 0", "nothing answers there yet")
    book = _book(here, store, wait)
    try:
        _write(book, str(here.rank), Card(who(here.rank), machine(), dict(alike or {})))
        if here.rank == 0:
            verdict = _decide(here, book, patience)
            book.set("all", verdict)
        else:  # rank 0 says who is missing; a little later, as it decides
            patience.deadline += 5
            patience.speak = False
            patience.until(lambda: "" if book.check(["all"]) else "other processes", "see rank 0")
            verdict = book.get("all").decode()
            book.set(f"heard/{here.rank}", "")
        if verdict:
            if here.rank == 0:
                _be_heard(here, book)
            raise StartError(verdict, local=here.local_rank <= 0)
        if here.local_rank >= 0:
            return here.local_rank
        return sum(_read(book, str(rank)).machine == machine() for rank in range(here.rank))
    except dist.DistNetworkError as error:
        raise StartError(f"rank 0 at {patience.where} ended before all processes had started") from error


def group_store(here: Place, store: Any, wait: timedelta) -> Any:
    """Where the backends of the process group find one another: of this attempt of torchrun's alone.

    torch 2.14 gives all attempts one place. Ranks that were started again then called upon peers that had ended.
    NCCL's watchdog tells all ranks of an error by a key of the store beneath all prefixes, and would end those, too.
    """
    import torch.distributed as dist

    book = _book(here, store, wait)
    if here.rank == 0 and _agent_has_store():
        beneath = book
        while isinstance(beneath, dist.PrefixStore):
            beneath = beneath.underlying_store
        beneath.delete_key(NCCL_ENDED)
    return dist.PrefixStore("group", book)


def call_off(error: str, *, seconds: float = TELL_SECONDS) -> None:
    """Tell those that wait for this process why it does not start, which it has said itself already.

    Returns as soon as they know, or after a time in which they did not come. Nothing is raised: it is over anyhow.
    """
    with contextlib.suppress(Exception):
        here = place()
        if here.world_size == 1:
            return
        until = time.monotonic() + seconds
        store = host_store(here)
        while not _reachable(here.address, here.port):
            if time.monotonic() > until:
                return
            time.sleep(0.1)
        book = _book(here, store, timedelta(seconds=seconds))
        card = Card(who(here.rank), machine(), error=error)
        _write(book, str(here.rank), card)
        if here.rank == 0:
            book.set("all", _called_off(card))
            _be_heard(here, book, until)


def _decide(here: Place, book: Any, patience: "_Patience") -> str:
    """Rank 0's word, once it has the cards of all or one that calls it off: why nothing starts, or ""."""
    cards: dict[int, Card] = {}

    def others() -> str:
        for rank in range(here.world_size):
            if rank not in cards and book.check([str(rank)]):
                cards[rank] = _read(book, str(rank))
        missing = [rank for rank in range(here.world_size) if rank not in cards]
        if not missing or any(card.error for card in cards.values()):
            return ""
        some = ", ".join(map(str, missing[:8]))
        return f"{len(missing)} more process{'es' * (len(missing) > 1)} (rank {some})"

    patience.until(others, unset(("RANK", "WORLD_SIZE")))
    for card in cards.values():
        if card.error:
            return _called_off(card)
    return differences(cards)


def _called_off(card: Card) -> str:
    return f"{card.who} does not start: {card.error}"


def differences(cards: Mapping[int, Card]) -> str:
    """In which of what must be alike processes differ from rank 0, of each machine the first one alone; "" in none."""
    first, told, lines = cards[0], set(), []
    for rank in sorted(cards):
        card = cards[rank]
        differing = [
            f"{card.who} has {name}={card.alike.get(name)}, {first.who} has {first.alike.get(name)}"
            for name in sorted(first.alike.keys() | card.alike.keys())
            if first.alike.get(name) != card.alike.get(name)
        ]
        if differing and card.machine not in told:
            told.add(card.machine)
            lines += differing
    if not lines:
        return ""
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n  ".join(
        [
            "not all ranks run the same:",
            *lines[:MOST_LINES],
            *more,
            "start all with the same code, packages, config and words",
        ]
    )


def _be_heard(here: Place, book: Any, until: float | None = None) -> None:
    """Rank 0 stays until all others have its word, as its store ends with it."""
    until = until or time.monotonic() + TELL_SECONDS
    waiting = set(range(1, here.world_size))
    while waiting and time.monotonic() < until:
        for rank in [*waiting]:
            silent = book.check([str(rank)]) and _read(book, str(rank)).error  # it has called off, and asks no more
            if silent or book.check([f"heard/{rank}"]):
                waiting.remove(rank)
        time.sleep(0.05)


def _book(here: Place, store: Any, wait: timedelta) -> Any:
    """Where the cards are: apart from other keys of the store, and from those of torchrun's attempts before."""
    import torch.distributed as dist

    if store is None:
        store = dist.TCPStore(here.address, here.port, is_master=False, wait_for_workers=False, timeout=wait)
    # Each agent counts its own restarts: not all have the same, where machines come and go. A store of rank 0's ends
    # with its process, so that each attempt has a new one.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agent_has_store() else "0"
    return dist.PrefixStore(f"ijepa/{attempt}/{here.world_size}", store)


def _write(book: Any, key: str, card: Card) -> None:
    book.set(key, json.dumps(asdict(card)))


def _read(book: Any, key: str) -> Card:
    return Card(**json.loads(book.get(key)))


def _agent_has_store() -> bool:
    return os.environ.get(AGENT_STORE) == "True"


class _Patience:
    """Waits that together take no longer than a limit, and are said once."""

    def __init__(self, where: str, speak: float, wait: timedelta):
        self.where, self.wait, self.speak = where, wait, True
        self.speak_at, self.deadline = time.monotonic() + speak, time.monotonic() + wait.total_seconds()

    def until(self, missing: Callable[[], str], advice: str) -> None:
        """Ask until nothing is missing."""
        while what := missing():
            now, minutes = time.monotonic(), self.wait.total_seconds() / 60
            if now > self.speak_at and self.speak:
                print(
                    f"waiting for {what} at {self.where}, for up to {minutes:g} minutes: {advice}",
                    file=sys.stderr,
                    flush=True,
                )
                self.speak = False
            if now > self.deadline:
                raise StartError(f"waited {minutes:g} minutes for {what} at {self.where}: {advice}")
            time.sleep(0.05)


def _reachable(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:  # not there yet, or not to be found by its name yet
        return False
    return True


def machine() -> str:
    """A name that processes have in common where they share GPUs."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
