"""Step records, logged a step late: while the device computes the next step its numbers have come to the host."""

from dataclasses import dataclass
from typing import Any

from ijepa_scale.data.collate import Batch
from ijepa_scale.data.files import usable_cores
from ijepa_scale.engine.feed import HostCopy
from ijepa_scale.run.data_wait import DataWait
from ijepa_scale.run.incidents import Log, Say
from ijepa_scale.run.progress import Progress
from ijepa_scale.run.setup import Run


@dataclass(frozen=True)
class StepOutcome:
    """One step: its record, whether it was applied, what this rank saw, and what any rank met (the same on all)."""

    record: dict[str, Any]  # without what is in numbers
    terms: list[str]  # names of the loss and its terms
    numbers: HostCopy  # these of each micro-step, then the gradient norm
    applied: bool
    batches: list[Batch]
    noted: bool  # some rank met an unreadable image, or the end of its shards
    stop: bool  # some rank was asked to stop
    writing: bool  # some rank still writes a checkpoint


class LateRecords:
    """settle() logs the step that was added last, and shows it. All ranks call both: means are over all ranks."""

    def __init__(self, run: Run, log: Log, progress: Progress | None, say: Say) -> None:
        ranks, workers = run.ranks, run.config.data.workers
        self.loss: float | None = None  # of the last step that is settled
        self._run, self._log, self._progress, self._say = run, log, progress, say
        self._data_wait = DataWait.of_ranks(ranks.gather((ranks.local_rank, usable_cores())), workers=workers)
        self._waiting: StepOutcome | None = None

    def add(self, outcome: StepOutcome) -> None:
        assert self._waiting is None
        self._waiting = outcome

    def settle(self) -> None:
        """Log what waits, once its numbers are here; nothing where nothing does."""
        outcome, self._waiting = self._waiting, None
        if outcome is None:
            return
        record = {**outcome.record, **self._means(outcome)}
        self._log(record)
        self.loss = record["loss"]
        if self._progress:
            self._progress.update(record["step"] + 1, record)
            if slow := self._data_wait.update(record["data_wait_seconds"], record["step_seconds"]):
                self._say(slow)

    def _means(self, outcome: StepOutcome) -> dict[str, float]:
        """The loss and its terms, over all ranks and micro-steps, and the gradient norm."""
        *losses, norm = outcome.numbers.numbers()
        micro_steps = [losses[i : i + len(outcome.terms)] for i in range(0, len(losses), len(outcome.terms))]
        totals = self._run.ranks.sum([sum(values) for values in zip(*micro_steps, strict=True)])
        count = self._run.ranks.world_size * len(micro_steps)
        means = zip(outcome.terms, (total / count for total in totals), strict=True)
        return {**{name if name == "loss" else f"loss_{name}": mean for name, mean in means}, "grad_norm": norm}
