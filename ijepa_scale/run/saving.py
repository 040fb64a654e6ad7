"""Checkpoints while training goes on: what a save that fails does, and which ones stay."""

import time

from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.run.incidents import STRIKES, RunError, Say
from ijepa_scale.run.setup import Run


class Saver:
    """Saves and prunes. A save that fails leaves training going; several in a row, or the last one, end it."""

    def __init__(self, run: Run, say: Say) -> None:
        self._run, self._say, self._failed_in_a_row = run, say, 0

    def save(self, step: int, *, last: bool) -> None:
        """On all ranks. last: nothing is trained after it. Raises RunError, on all of them, where it gives up."""
        if self._saved(step):
            self._failed_in_a_row = 0
            return
        self._failed_in_a_row += 1
        if last or self._failed_in_a_row == STRIKES:
            raise RunError("the checkpoint could not be written (see above); free space or mend the disk")

    def _saved(self, step: int) -> bool:
        run, started, keep = self._run, time.perf_counter(), self._run.config.checkpoint
        meta = {**run.facts, "wandb_id": run.wandb_id}
        if run.positions:
            meta["stream_positions"] = run.ranks.gather([at and at.to_json() for at in run.positions])
        folder = run.folder.checkpoints
        try:
            path = checkpoints.save(folder, run.engine, run.ema, run.ranks, step=step, meta=meta)
        except OSError as error:
            self._say(f"warning: no checkpoint at step {step}: {error}; earlier checkpoints are untouched")
            return False
        checkpoints.prune(folder, run.ranks, keep_last=keep.keep_last, keep_every=keep.keep_every, newest=step)
        if run.ranks.first:
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            self._say(f"checkpoint {path} ({size:.1f} MB, {time.perf_counter() - started:.1f} s)")
        return True
