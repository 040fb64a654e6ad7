"""What can befall a step, told to the user: unreadable images, ends of shards, skipped steps, memory that runs out."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ijepa_scale.data.collate import Batch, why_loaders_failed
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.run.setup import Run

Say = Callable[[str], None]  # a line for the user
Log = Callable[[dict[str, Any]], None]  # a record for metrics.jsonl

STRIKES = 3  # steps in a row that were skipped, or checkpoints in a row that could not be written, before a run stops


class RunError(RuntimeError):
    """Training cannot go on; the message tells the user why and what to do. local: it befell this rank alone."""

    def __init__(self, message: str, *, local: bool = False):
        super().__init__(message)
        self.local = local


@contextlib.contextmanager
def explained_memory_errors(run: Run) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            words in str(error)
            for words in ("allocate memory", "out of memory")  # the latter of CUDA, NCCL and Triton
        )
        if not out_of_memory:
            raise
        micro = run.dataset.micro_batch_size
        least = "set engine.activation_checkpointing=predictor or full, raise engine.zero_stage, or "
        if run.objective.batch_facts():  # a resume with another micro-batch would be refused
            advice = (
                f"{least}start anew, in another run_dir, with a smaller optimization.micro_batch_size: here it alters "
                "what is learned"
            )
        else:
            advice = (
                f"lower optimization.micro_batch_size (for example {max(1, micro // 2)}; the global batch stays: "
                f"gradients are accumulated), {least}use more ranks"
            )
        raise RunError(
            f"out of memory on {run.ranks.device} with {micro} images a micro-batch; {advice}\n{error}", local=True
        ) from error


@contextlib.contextmanager
def explained_loader_errors(run: Run) -> Iterator[None]:
    """One line of what keeps loader processes from starting or from handing over their batches."""
    try:
        yield
    except RunError:  # it is explained already
        raise
    except (RuntimeError, OSError) as error:
        if not (why := why_loaders_failed(error)):
            raise
        lines = str(error).strip().splitlines()
        raise RunError(
            f"{why}, or lower data.workers (now {run.config.data.workers}; with 0 the training process loads): "
            f"{lines[-1] if lines else ''}",
            local=True,
        ) from error


def report_bad_images(run: Run, step: int, batches: list[Batch], say: Say, log: Log) -> None:
    """Name unreadable images, and stop on all ranks together when there are too many."""
    own = [(bad.index, bad.sample_id, bad.reason) for batch in batches for bad in batch.bad]
    for record in run.bad.add(step, [bad for other in run.ranks.gather(own) for bad in other]):
        log(record)
        say(f"warning: step {step}: cannot read {record['sample']}: {record['reason']}; another image takes its place")
    known, allowed = run.bad.known, run.config.data.max_bad_fraction
    count = images_met(run, step)
    if len(known) > allowed * count:
        listed = "".join(f"\n  {record['sample']}: {record['reason']}" for record in list(known.values())[:50])
        raise RunError(
            f"{len(known)} of {count} images cannot be read, more than data.max_bad_fraction {allowed:g} "
            f"allows. Repair or remove them, or raise data.max_bad_fraction. All are in {run.folder.metrics} "
            f'(kind "bad_image"):{listed}'
        )


def images_met(run: Run, step: int) -> int:
    """What max_bad_fraction is of: all images of a source, but of a stream those read so far, and 1,000 at least."""
    if not isinstance(run.images, Streams):
        return len(run.images)
    met = max(1000, (step + 1) * run.config.optimization.global_batch_size)
    return min(met, len(run.images)) if len(run.images) else met


def report_passes(run: Run, step: int, batches: list[Batch], say: Say, log: Log) -> None:
    """Say which streams came to the end of their shards, and read them again."""
    own = [(batch.stream.number, *begun) for batch in batches if batch.stream for begun in batch.stream.passes]
    every = [(rank, *again) for rank, passes in enumerate(run.ranks.gather(own)) for again in passes]
    for rank, stream, source, number, images in every:
        record = {"kind": "stream_pass", "step": step, "rank": rank, "stream": stream, "source": source}
        log({**record, "pass": number, "images": images})
    if every:
        rank, stream, source, number, images = every[0]
        others = f", and {len(every) - 1} more streams (all in {run.folder.metrics})" if len(every) > 1 else ""
        say(f"step {step}: {source}: stream {stream} of rank {rank} starts pass {number} after {images} images{others}")


class Skips:
    """Counts steps that were skipped: says which images each was made of, and stops after STRIKES in a row."""

    def __init__(self, run: Run, log: Log, say: Say) -> None:
        self._run, self._log, self._say, self._in_a_row = run, log, say, 0

    def count(self, step: int, *, applied: bool, batches: list[Batch]) -> None:
        """All ranks call it. Raises RunError, on all of them, where it stops."""
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if applied:
            return
        run = self._run
        own = [(batch.indices, batch.names) for batch in batches]
        every = [batch for rank in run.ranks.gather(own) for batch in rank]
        if run.ranks.first:
            indices = [index for batch in every for index in batch[0]]
            samples = [name for batch in every for name in batch[1]]
            if not isinstance(run.images, Streams):  # whose batches bring the names along
                samples = [run.images.sample_id(index) for index in indices]
            self._log({"kind": "skipped", "step": step, "images": indices, "samples": samples})
            few = ", ".join(samples[:4]) + (", ..." if len(samples) > 4 else "")
            self._say(
                f"warning: step {step}: loss or gradients not finite: weights, moments and EMA are left as they were; "
                f'images {few} (all in {run.folder.metrics}, kind "skipped")'
            )
        if self._in_a_row == STRIKES:
            there = run.ranks.from_first(checkpoints.candidates(run.folder.checkpoints))
            raise RunError(
                f"{STRIKES} steps in a row were not finite; the last good checkpoint is "
                f"{there[0] if there else 'none yet'}. Lower optimization.lr or look at the images named above"
            )
