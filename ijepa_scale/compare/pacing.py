"""How far a comparison is and how long it still takes, by what its runs have taken; and the plan, for --dry-run."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ijepa_scale.compare.runs import Plan, Training, spent
from ijepa_scale.run.records import is_number

LINE_SECONDS = 30.0  # between lines that say how far a run is


def say(text: str) -> None:
    print(text, flush=True)


class Clock:
    """Says how far a run is, and how long the whole comparison still takes by what has been measured so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._set_ups: list[float] = []  # seconds of runs beside their steps
        self._probes: list[float] = []  # seconds of the probes of a run
        self._training: Training | None = None
        self._first: tuple[int, float] | None = None  # step and time of the first record that was seen of the run
        self._next_line = 0.0

    def begin(self, training: Training) -> None:
        self._training, self._first, self._next_line = training, None, 0.0
        number, count = self._place(training, self.plan.by_flops(self.plan.measured()))
        say(f"run {number} of {count}, {training.name}: {training.steps} steps of {training.recipe.batch} images")

    def end(self, training: Training, seconds: float) -> None:
        self._set_ups.append(max(0.0, seconds - float(spent(training)[-1, 1])))

    def probed(self, call: Callable[[], bool]) -> None:
        """Call what probes a run, and remember how long it took if it had to."""
        began = time.monotonic()
        if call():
            self._probes.append(time.monotonic() - began)

    def show(self, record: dict[str, Any]) -> None:
        """Say, now and then, how far the run is whose newest step record this is."""
        training, now, done = self._training, time.monotonic(), record["step"] + 1
        assert training is not None
        self._first = self._first or (done, now)
        if now < self._next_line or done == self._first[0]:
            return
        self._next_line = now + LINE_SECONDS
        here = (now - self._first[1]) / (done - self._first[0]) / training.recipe.batch
        pace = self.plan.by_flops({training.recipe.name: here} | self.plan.measured())
        left = (training.steps - done) * training.recipe.batch * here + self._others(training, pace)
        number, count = self._place(training, pace)
        loss = f", loss {record['loss']:.4f}" if is_number(record.get("loss")) else ""
        say(
            f"run {number} of {count}, {training.name}: step {done}/{training.steps}{loss}, {1 / here:.0f} images/s; "
            f"all runs: ETA {timedelta(seconds=round(left))}"
        )

    def _others(self, training: Training, pace: dict[str, float]) -> float:
        """Seconds that the other runs still take, and whatever is done beside steps."""
        rest = [one for one in self.plan.all_runs(pace) if not one.finished and one.folder != training.folder]
        beside = sum(sum(each) / len(each) for each in (self._set_ups, self._probes) if each)
        steps = sum(one.steps * one.recipe.batch * pace[one.recipe.name] for one in rest)
        return steps + beside * (len(rest) + 1)

    def _place(self, training: Training, pace: dict[str, float]) -> tuple[int, int]:
        """Which of how many runs it is."""
        folders = [one.folder for one in self.plan.all_runs(pace)]
        return folders.index(training.folder) + 1, len(folders)


def plan_in_words(plan: Plan) -> str:
    """The text of --dry-run: recipes, runs, and minutes where something has been measured."""
    known = plan.measured()
    pace = plan.by_flops(known)
    lines = []
    for recipe in plan.recipes:
        rate = f"{1 / pace[recipe.name]:,.0f} images/s" if pace else "speed not known before the first run"
        rate += " (by its FLOPs)" if pace and recipe.name not in known else ""
        lines.append(f"{recipe.name:14} {' '.join([recipe.file, *recipe.words])}")
        lines.append(f"{'':14} {recipe.flops / 1e9:.3f} GFLOP an image, {rate}")
    left = 0.0
    lines.append("")
    for training in plan.all_runs(pace):
        images = training.steps * training.recipe.batch
        minutes = pace[training.recipe.name] * images / 60 if pace else 0.0
        left += 0.0 if training.finished else minutes
        said = "finished" if training.finished else f"{minutes:,.1f} minutes" if pace else ""
        lines.append(f"{training.name:32} {images:>12,} images {training.steps:>8,} steps  {said}".rstrip())
    if len(plan.config.equal) > 1:
        lines.append(
            f"runs equal in {' and in '.join(plan.config.equal[1:])} are as long as {plan.recipes[0].name} takes: "
            "how many images that is is known for certain once all others are trained"
        )
    lines.append(
        f"{plan.config.probes} checkpoints of each run are probed; {plan.ranks} ranks a run; folder {plan.out}"
    )
    if pace:
        lines.append(f"steps take {left:,.0f} minutes more; set-up of runs and probes come on top")
    return "\n".join(lines)
