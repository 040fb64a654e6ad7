"""Checkpoints while training goes on: when they are written, what a save that fails does, and which ones stay."""

import time

from ijepa_scale.engine.checkpoint import Saving, prune
from ijepa_scale.run.incidents import STRIKES, RunError, Say
from ijepa_scale.run.setup import Run


class Saver:
    """Saves and prunes. A save that fails leaves training going; several in a row, or the last one, end it.

    With checkpoint.asynchronous a checkpoint is begun at one step and is there some steps later. All ranks call all but
    `writing` alike.
    """

    def __init__(self, run: Run, say: Say) -> None:
        self._run, self._say, self._failed_in_a_row = run, say, 0
        self._begun: Saving | None = None
        self._held = 0.0  # seconds that training has waited for the checkpoint that is begun

    @property
    def begun(self) -> bool:
        return self._begun is not None

    @property
    def writing(self) -> bool:
        """Whether this rank still writes what it has begun."""
        return self._begun is not None and self._begun.writing

    def save(self, step: int, *, last: bool) -> None:
        """The state after so many steps. last: nothing is trained after it, so that it is waited for.

        Raises RunError, on all ranks, where it gives up.
        """
        self._check_folder()
        if self._begun:
            if any(self._run.ranks.gather(self._begun.writing)) and not last:
                self._say("the checkpoint before is still being written, and is waited for: save less often")
            self.finish()
        started, run = time.perf_counter(), self._run
        aside = run.config.checkpoint.asynchronous and not last
        meta = {**run.facts, "wandb_id": run.wandb_id}
        if run.positions:
            meta["stream_positions"] = run.ranks.gather([at and at.to_json() for at in run.positions])
        folder = run.folder.checkpoints
        try:
            self._begun = Saving(folder, run.engine, run.ema, run.ranks, step=step, meta=meta, aside=aside)
        except OSError as error:
            self._failed(step, error, last=last)
            return
        self._held = time.perf_counter() - started
        if not aside:
            self.finish(last=last)

    def finish(self, *, last: bool = False) -> None:
        """Make what was begun a checkpoint, waiting for it where it is still being written. Raises as save() does."""
        begun, started, run = self._begun, time.perf_counter(), self._run
        assert begun is not None
        self._begun = None
        try:
            path = begun.finish()
        except OSError as error:
            self._failed(begun.step, error, last=last)
            return
        keep = run.config.checkpoint
        failed = prune(
            run.folder.checkpoints, run.ranks, keep_last=keep.keep_last, keep_every=keep.keep_every, newest=begun.step
        )
        if failed:
            self._say(f"warning: an old checkpoint could not be deleted, which the next save tries again: {failed}")
        self._failed_in_a_row = 0
        if run.ranks.first:
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            self._say(f"checkpoint {path} ({size:.1f} MB, {self._held + time.perf_counter() - started:.1f} s)")

    def _check_folder(self) -> None:
        """A new folder in the place of one that was moved away would have part of the run, and the old one the rest."""
        if any(self._run.ranks.gather(self._run.folder.gone)):
            raise RunError(
                f"run_dir {self._run.folder.path} was moved, deleted or unmounted while the run wrote to it; "
                "put it back, and the same command goes on from its last checkpoint"
            )

    def _failed(self, step: int, error: OSError, *, last: bool) -> None:
        self._check_folder()
        self._say(f"warning: no checkpoint at step {step}: {error}; earlier checkpoints are untouched")
        self._failed_in_a_row += 1
        if last or self._failed_in_a_row == STRIKES:
            raise RunError("the checkpoint could not be written (see above); free space or mend the disk")
