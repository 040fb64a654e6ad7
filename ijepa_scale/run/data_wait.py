"""Whether training waits for its data, and what to do about it."""

from collections import deque
from collections.abc import Iterable
from typing import Self

WARM_UP = 20  # steps: the loader's processes start, and the first batches come late
WINDOW = 50  # steps the share is taken over
ALLOWED = 0.02  # of the time of a step
WORSE = 2.0  # times the share said before, to say it again


class DataWait:
    """Watches the share of the steps' time that passes in waiting for data. Rank 0 has one.

    workers: loader processes a rank; 0 loads in the training process. ranks: on this node, as are the cores.
    """

    def __init__(self, *, workers: int, ranks: int, cores: int) -> None:
        self._workers, self._ranks, self._cores = workers, ranks, cores
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._skipped = 0
        self._said = 0.0

    @classmethod
    def of_ranks(cls, cores: Iterable[tuple[int, frozenset[int]]], *, workers: int) -> Self:
        """cores: of every rank (local rank, usable_cores()). Nodes are taken to be alike."""
        node = dict(cores)
        return cls(workers=workers, ranks=len(node), cores=len(frozenset().union(*node.values())))

    def update(self, data_wait_seconds: float, step_seconds: float) -> str:
        """Count a step; a warning for the user where there is one to give, else ""."""
        if self._skipped < WARM_UP:
            self._skipped += 1
            return ""
        self._steps.append((data_wait_seconds, step_seconds))
        if len(self._steps) < WINDOW:
            return ""
        wait, whole = (sum(seconds) for seconds in zip(*self._steps, strict=True))
        share = wait / whole
        if share <= max(ALLOWED, WORSE * self._said):
            return ""
        self._said = share
        return (
            f"warning: data is the bottleneck: {100 * share:.1f}% of the last {WINDOW} steps' time was waiting for it "
            f"({1000 * wait / WINDOW:.0f} of {1000 * whole / WINDOW:.0f} ms a step; {100 * ALLOWED:.0f}% is fine). "
            + self._remedy()
        )

    def _remedy(self) -> str:
        most = self._cores // self._ranks - 1  # a rank's own process takes a core
        prepare = "images resized once with ijepa-scale prepare load faster, and so do those on a faster disk"
        if self._workers < most:
            return f"Raise data.workers from {self._workers}, to {most} at most on {self._cores} cores; or: {prepare}"
        return f"data.workers={self._workers} for each rank leaves no core of {self._cores} unused, so: {prepare}"
