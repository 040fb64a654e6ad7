"""A rank that stands still ends the others within a time, and each of them says which rank it was, where, and at what.

Ranks that wait for one another in a collective wait for ever, whether a peer's process is stopped, its machine is gone
or its disk hangs. Each rank tells the others through a store of its own what it does, and a thread looks at the clock.
A step ends by the clock. Set-up and report may take any time: they end where a rank gives no sign any more.
"""

import contextlib
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import distributed as dist

from ijepa_scale.engine.distributed import Ranks

BEAT_SECONDS = 2.0  # between a rank's signs
SILENT_BEATS = 3  # without one a rank stands still
LEAST_SILENCE = 60.0  # seconds, outside of steps: an import may hold the interpreter for some
PATIENCE = 30.0  # seconds for what the thread has to ask and to print; then the process ends without its words
STEP = "in step"
DONE = "done"


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself. count: of its signs. seconds: how long it has done what it does."""

    rank: int
    count: int
    step: int
    doing: str
    seconds: float
    host: str
    pid: int

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class Watchdog:
    """at() says that a step begins, doing() what is done within it, outside() that there are no more.

    seconds: that a step may take, and a rank be silent outside of steps; 0: ever. All ranks make one, before the first
    step, and close() it. After an end by it the process's exit code is 1.
    """

    def __init__(self, ranks: Ranks, seconds: float) -> None:
        self._ranks, self._seconds = ranks, seconds
        self._beat = min(BEAT_SECONDS, seconds / 8)
        self._silence = max(seconds, LEAST_SILENCE)
        self._began = 0.0  # a step; 0: there is none
        self._count = 0
        self._asked = False  # for the signs of all ranks
        self._heard: list[list[Sign]] = []
        self._closed = threading.Event()
        self.outside("set-up")
        self._store = _store_of(ranks) if seconds and ranks.world_size > 1 else None
        self._tell()  # at once: who this is the others then know
        for name, work in (("signs", self._talk), ("watchdog", self._watch)) if seconds else ():
            threading.Thread(target=work, name=name, daemon=True).start()

    def outside(self, doing: str) -> None:
        """doing: what comes before the steps, or after them."""
        now = time.monotonic()
        self._alive = {rank: (-1, now) for rank in range(self._ranks.world_size)}  # count of signs, and since when
        self._look, self._state = now, (0, doing, now)
        self._began = 0.0  # last: from here on the threads look at what is above

    def at(self, step: int) -> None:
        self._began = time.monotonic()
        self._state = (step, STEP, self._began)
        if self._seconds:  # where the thread cannot run, as an extension holds the interpreter
            faulthandler.dump_traceback_later(self._seconds + PATIENCE, exit=True)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """what: as in "waiting for the images of step"."""
        step, before, since = self._state
        self._state = (step, what, time.monotonic())
        yield
        self._state = (step, before, since)

    def close(self) -> None:
        self._state = (0, DONE, time.monotonic())
        with contextlib.suppress(Exception):  # the first rank, which keeps the store, may have closed it
            self._tell()
        self._closed.set()

    def _talk(self) -> None:
        """A thread of its own: it waits where the first rank, which keeps the store, stands still."""
        while not self._closed.wait(self._beat):
            # Whatever a store raises: that nothing is heard is told when it matters.
            with contextlib.suppress(Exception):
                self._tell()
                if self._asked:
                    self._heard.append(self._signs())
                elif not self._began and time.monotonic() >= self._look:
                    self._note(self._signs())

    def _tell(self) -> None:
        self._count += 1
        if self._store is not None:
            self._store.set(str(self._ranks.rank), json.dumps(self._own().__dict__))

    def _watch(self) -> None:
        while not self._closed.wait(self._beat):
            if self._began and time.monotonic() - self._began > self._seconds:
                self._end()
            elif not self._began and self._store is not None and (silent := self._silent()):
                _say_and_end(
                    f"{self._own().who} ends, in {self._own().doing}: {silent} for {self._silence:.0f} seconds: it is "
                    "stopped, or its machine is gone; the same command goes on from there"
                )

    def _note(self, signs: list[Sign]) -> None:
        now = time.monotonic()
        self._look = now + self._silence / 8
        for sign in signs:
            if sign.doing == DONE:
                self._alive.pop(sign.rank, None)
            elif sign.count != self._alive.get(sign.rank, (0, now))[0]:
                self._alive[sign.rank] = (sign.count, now)

    def _silent(self) -> str:
        """Who has given no sign for too long; "" where none."""
        now = time.monotonic()
        silent = [rank for rank, (_, since) in list(self._alive.items()) if now - since > self._silence]
        if not silent:
            return ""
        # Where the first rank is silent, its store is, and nothing is heard of the others.
        return f"{self._ranks.name(min(silent))} has given no sign"

    def _own(self) -> Sign:
        step, doing, since = self._state
        seconds = time.monotonic() - since
        return Sign(self._ranks.rank, self._count, step, doing, seconds, socket.gethostname(), os.getpid())

    def _end(self) -> None:
        """End the process, unless it has gone on meanwhile."""
        began, own, self._heard, self._asked = self._began, self._own(), [], True
        until = time.monotonic() + 2 * SILENT_BEATS * self._beat + 1
        while len(self._heard) <= SILENT_BEATS and time.monotonic() < until:
            if self._closed.wait(self._beat / 4) or self._began != began:
                self._asked = False
                return
        heard = self._heard if len(self._heard) > SILENT_BEATS else []
        limit = f"engine.hang_seconds={self._seconds:g}"
        wait = 0.0
        if self._store is not None and self._ranks.first:
            wait = 2 * SILENT_BEATS * self._beat + 1  # the others ask its store at about the same time
        _say_and_end(
            f"{own.who} ends, as step {own.step + 1} has taken more than {limit} seconds: "
            f"{explained(own, heard, self._ranks.world_size)}; the same command goes on from the last checkpoint",
            wait=wait,
        )

    def _signs(self) -> list[Sign]:
        """The newest of each rank that has given one."""
        if self._store is None:
            return [self._own()]
        ranks = [str(rank) for rank in range(self._ranks.world_size)]
        return [Sign(**json.loads(self._store.get(rank))) for rank in ranks if self._store.check([rank])]


def _say_and_end(why: str, *, wait: float = 0.0) -> NoReturn:
    print(f"error: {why}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    time.sleep(wait)
    os._exit(1)


def _store_of(ranks: Ranks) -> Any:
    """A store that the first rank keeps: apart from that of the process group, on which others wait."""
    host = ranks.from_first(os.environ.get("MASTER_ADDR", "localhost"))
    timeout = datetime.timedelta(seconds=PATIENCE / 2)

    def made(port: int, *, first: bool) -> Any:
        return dist.TCPStore(host, port, is_master=first, timeout=timeout, wait_for_workers=False)

    store = made(0, first=True) if ranks.first else None
    port = ranks.from_first(store.port if store is not None else 0)
    return store if store is not None else made(port, first=False)


def explained(own: Sign, heard: list[list[Sign]], world_size: int) -> str:
    """Which ranks hold up the others. heard: signs of all ranks, several times; none where the store was silent."""
    if not heard:
        return "the first rank gives no sign any more: it is stopped, or its machine is gone"
    counts, then = {sign.rank: sign.count for sign in heard[0]}, heard[-1]
    silent = [sign.who for sign in then if sign.rank != own.rank and sign.count == counts.get(sign.rank)]
    silent += [
        f"rank {rank}" for rank in sorted(set(range(world_size)) - {sign.rank for sign in then})
    ]  # from the start
    if silent:
        return "; ".join(f"{who} gives no sign any more: it is stopped, or its machine is gone" for who in silent)
    behind = min(sign.step for sign in then)
    all_alike = behind == max(sign.step for sign in then)
    slow = [sign for sign in then if (sign.doing != STEP if all_alike else sign.step == behind)]
    if not slow and world_size == 1:
        return "where it stands the stack below shows"
    if not slow:
        return "all ranks live and are within the step: a collective that does not end, as over a link that is cut"
    return "; ".join(f"{sign.who} has been {sign.doing} {sign.step + 1} for {sign.seconds:.0f} s" for sign in slow)
