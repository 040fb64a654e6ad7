"""Pre-training, top to bottom: set up, the loop over steps, the report at the end. The file to read first."""

import contextlib
import faulthandler
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ijepa_kernels.dispatch import chosen
from ijepa_scale.config import PretrainConfig, to_dict
from ijepa_scale.data.collate import Batch, MicroBatchStream, micro_batch_stream
from ijepa_scale.data.images import BadImageError
from ijepa_scale.data.sources.remote import StreamError
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine import distributed
from ijepa_scale.engine.device import memory_bytes, rates
from ijepa_scale.engine.feed import Feed, HostCopy, collecting_by_hand
from ijepa_scale.engine.optim import set_schedules
from ijepa_scale.engine.schedules import cosine, ema_momentum, learning_rate
from ijepa_scale.engine.signals import EXIT_SECONDS, STOP_EXIT_CODE, Stopped, StopRequest
from ijepa_scale.masking.multiblock import MultiBlock
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.run.data_wait import DataWait, usable_cores
from ijepa_scale.run.health import encoders_of, measure_health
from ijepa_scale.run.incidents import (
    STRIKES,
    Log,
    RunError,
    Say,
    explained_loader_errors,
    explained_memory_errors,
    report_bad_images,
    report_passes,
    report_skip,
)
from ijepa_scale.run.preview import preview_masks
from ijepa_scale.run.progress import Progress
from ijepa_scale.run.records import JsonlWriter, WandbWriter, read_records
from ijepa_scale.run.report import report
from ijepa_scale.run.setup import InputError, Run, check, set_up

RELEASE_STEPS = 20  # between releases of memory and collections of Python's cycles; docs/performance.md


def pretrain(
    config: PretrainConfig,
    *,
    resume: str = "auto",
    allow_changes: bool = False,
    stop_request: StopRequest | None = None,
) -> int:
    """Train; the exit code: 0 done, 75 stopped on request with a checkpoint.

    resume: "auto" (the newest good checkpoint of the run folder, or a fresh start where there is none), "never", or a
    checkpoint's path. stop_request: the process's, where it has one since its start.
    Raises InputError, before training, for what the user can mend, RunError during it, and Stopped where it is asked to
    stop outside of training.
    """
    stop_request, own = stop_request or StopRequest(), stop_request is None
    try:
        try:
            blocks = check(config)
            ranks = distributed.start()
        except ValueError as error:
            raise InputError(str(error)) from error
        try:
            code = run_on(ranks, config, blocks, stop_request, resume=resume, allow_changes=allow_changes)
        except BaseException:
            if ranks.world_size == 1:  # others may be in a collective, for which closing would wait
                ranks.close()
            raise
        ranks.close()
        return code
    finally:
        if own:
            stop_request.close()


def run_on(
    ranks: distributed.Ranks,
    config: PretrainConfig,
    blocks: MultiBlock,
    stop_request: StopRequest,
    *,
    resume: str,
    allow_changes: bool,
) -> int:
    """Set up, train, report."""
    try:
        run = set_up(config, blocks, ranks, resume=resume, allow_changes=allow_changes)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    try:
        if run.start_step < run.horizon.stop:
            with stop_request.between_steps():
                reason = train(run, stop_request)
            if reason:
                return STOP_EXIT_CODE
            if stop_request.reason:  # since the last step
                raise Stopped(stop_request.reason)
        elif ranks.first:
            print("\n".join(run.notes))
            print(f"{run.folder.path} is finished at step {run.start_step}; to train anew, give another run_dir")
        del run.engine, run.ema  # their memory is free for the probes
        report(run)
    except BadImageError as error:  # of the health check or the report, on all ranks
        raise RunError(str(error)) from error
    return 0


def train(run: Run, stop_request: StopRequest) -> str:
    """The loop, with its logs and its loader. Returns why it was asked to stop early, or "" at the end of the run."""
    with contextlib.ExitStack() as stack:
        stack.callback(faulthandler.cancel_dump_traceback_later)
        progress = None
        try:  # on rank 0 alone: if it fails, no other may go on into a collective
            run.ranks.together(lambda: preview_masks(run) if run.ranks.first else None)
            log = run.ranks.together(lambda: open_logs(run, stack) if run.ranks.first else unlogged)
        except (ValueError, OSError) as error:
            raise RunError(str(error)) from error
        if run.ranks.first:
            progress = stack.enter_context(Progress(run.horizon.stop, run.start_step))
        stack.enter_context(collecting_by_hand())
        stack.enter_context(explained_loader_errors(run))
        batches = micro_batch_stream(
            run.dataset,
            start_step=run.start_step,
            stop_step=run.horizon.stop,
            workers=run.config.data.workers,
            pinned=run.ranks.device.type == "cuda",
        )
        stack.enter_context(batches)
        stack.push(closing_in_time)
        return loop(run, stop_request, progress, log, batches)


def closing_in_time(kind: type[BaseException] | None, *error: object) -> None:
    """After an error what is open has a minute to be closed: the other ranks wait for the end of this one."""
    if kind:
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)


def unlogged(record: dict[str, Any]) -> None:
    """Ranks but the first write nothing."""


def open_logs(run: Run, stack: contextlib.ExitStack) -> Log:
    """metrics.jsonl, cut back to the restored step, and wandb."""
    config = run.config
    writer = stack.enter_context(JsonlWriter(run.folder.metrics, run.start_step or None))
    wandb = WandbWriter(
        config.logging.wandb,
        project=config.logging.wandb_project,
        name=run.folder.path.name,
        run_dir=run.folder.path,
        config=to_dict(config),
        run_id=run.wandb_id,
    )
    stack.callback(wandb.finish)
    run.wandb_id = wandb.run_id

    def log(record: dict[str, Any]) -> None:
        try:
            writer.write(record)
        except OSError as error:
            raise RunError(
                f"{error}: free space or mend the disk; the same command goes on from the last checkpoint", local=True
            ) from error
        if record["kind"] in ("step", "health"):
            wandb.log(record, record["step"])

    return log


def loop(run: Run, stop_request: StopRequest, progress: Progress | None, log: Log, batches: MicroBatchStream) -> str:
    config, ranks, horizon = run.config, run.ranks, run.horizon
    say: Say = progress.message if progress else lambda text: None
    feed = Feed(batches, ranks.device)
    health = [r for r in read_records(run.folder.metrics) if r.get("kind") == "health"] if ranks.first else []
    data_wait = DataWait.of_ranks(ranks.gather((ranks.local_rank, usable_cores())), workers=config.data.workers)
    skipped_in_a_row = failed_saves = 0
    loss: float | None = None
    reason = ""
    unsettled: list[StepOutcome] = []

    def settle() -> None:
        """Log the last step, once its numbers are here: a step later, while the device computes, or where one asks."""
        nonlocal loss
        for outcome in unsettled:
            record = completed(run, outcome)
            log(record)
            loss = record["loss"]
            if progress:
                progress.update(record["step"] + 1, record)
                if slow := data_wait.update(record["data_wait_seconds"], record["step_seconds"]):
                    say(slow)
        unsettled.clear()

    for note in run.notes:
        say(note)
    say(f"operations: {chosen(ranks.device)}")
    say(
        f"{run.images.name}: {count_text(run)}, {horizon.steps_per_epoch} steps an epoch; "
        f"{ranks.world_size} x {run.dataset.micro_batch_size} x {run.dataset.accumulation_steps} images a step; "
        f"run folder {run.folder.path}"
    )
    for step in range(run.start_step, horizon.stop):
        if config.engine.hang_seconds:  # a rank that hangs leaves the others waiting in a collective, for ever
            faulthandler.dump_traceback_later(config.engine.hang_seconds, exit=True)
        if config.logging.health_every_steps and step % config.logging.health_every_steps == 0:
            settle()
            measure_health(run, encoders_of(run.engine.module), step, health, log, say, loss=loss)
        if progress and progress.lost:
            stop_request.ask(progress.lost)
        outcome = train_step(run, step, feed, stop=bool(stop_request.pending()), meanwhile=settle)
        unsettled.append(outcome)
        for mark in (batch.mark for batch in outcome.batches if batch.mark):
            run.streams[mark.stream] = mark.state
        if outcome.noted or not outcome.applied:
            settle()
        if outcome.noted:
            report_passes(run, step, outcome.batches, say, log)
            report_bad_images(run, step, outcome.batches, say, log)
        skipped_in_a_row = 0 if outcome.applied else skipped_in_a_row + 1
        if not outcome.applied:
            report_skip(run, step, outcome.batches, skipped_in_a_row, say, log)
        done = step + 1
        if outcome.stop:
            reason = ", ".join(sorted(set(filter(None, ranks.gather(stop_request.pending())))))
        if done % config.checkpoint.every_steps == 0 or done == horizon.stop or reason:
            settle()
            failed_saves = 0 if save_checkpoint(run, done, say) else failed_saves + 1
            if failed_saves == STRIKES or (failed_saves and (reason or done == horizon.stop)):
                raise RunError("the checkpoint could not be written (see above); free space or mend the disk")
        if done % RELEASE_STEPS == 0:
            gc.collect()
            ranks.release_memory()
        if reason:
            say(f"stopped by {reason} after step {done}; the same command goes on from there")
            break
    else:
        if config.logging.health_every_steps:
            measure_health(run, encoders_of(run.engine.module), horizon.stop, health, log, say, loss=loss)
        reason = ", ".join(sorted(set(filter(None, ranks.gather(stop_request.pending())))))
        if reason:
            say(f"stopped by {reason} after the last step; the same command makes the report")
    return reason


@dataclass(frozen=True)
class StepOutcome:
    """One step: its record, whether it was applied, what this rank saw, and what any rank met (the same on all)."""

    record: dict[str, Any]  # without what is in numbers
    names: list[str]  # of the loss and its terms
    numbers: HostCopy  # these of each micro-step, then the gradient norm
    applied: bool
    batches: list[Batch]
    noted: bool  # some rank met an unreadable image, or the end of its shards (the same on all)
    stop: bool  # some rank was asked to stop


def train_step(
    run: Run, step: int, feed: Feed, *, stop: bool, meanwhile: Callable[[], None] = lambda: None
) -> StepOutcome:
    """One optimizer step on all ranks. stop: whether this rank was asked to stop.

    While a GPU has the forward to do, the host does its own work: the next batch, agreements of ranks, meanwhile(). It
    waits for the device once, inside engine.step(): DeepSpeed asks whether the gradients are finite. (At ZeRO-2 on
    several GPUs and at ZeRO-3 DeepSpeed also waits at the end of the backward.)
    """
    engine, options, horizon, ranks = run.engine, run.config.optimization, run.horizon, run.ranks
    started = time.perf_counter()
    lr = learning_rate(
        step,
        horizon.total,
        warmup_steps=horizon.warmup,
        start=options.start_lr,
        peak=options.lr,
        final=options.final_lr,
    )
    weight_decay = cosine(step, horizon.total, *options.weight_decay)
    momentum = ema_momentum(step, horizon.total, *options.ema)
    set_schedules(engine.optimizer.optimizer.param_groups, lr=lr, weight_decay=weight_decay)

    waited = feed.waited
    losses: list[dict[str, torch.Tensor]] = []
    seen = []
    for micro in range(run.dataset.accumulation_steps):
        if micro:
            engine.step()  # of the micro-step before, which DeepSpeed counts
        batch = next_batch(feed)
        seen.append(batch)
        with explained_memory_errors(run):
            losses.append(engine(batch.images, batch.masks))
        last = micro + 1 == run.dataset.accumulation_steps
        if not last or step + 1 < horizon.stop:
            feed.load()
        if last:
            meanwhile()
            counts = [Counts.of(batch.masks) for batch in seen]
            wait, model, hardware, context_tokens, target_tokens, noted, stops = ranks.sum(
                [
                    feed.waited - waited,
                    sum(map(run.flops.model, counts)),
                    sum(map(run.flops.hardware, counts)),
                    sum(batch.masks.context.num_tokens for batch in seen),
                    sum(batch.masks.target_blocks.num_tokens for batch in seen),
                    sum(len(batch.bad) + (len(batch.mark.passes) if batch.mark else 0) for batch in seen),
                    float(stop),
                ]
            )
        with explained_memory_errors(run):
            engine.backward(losses[-1]["loss"])
    with explained_memory_errors(run):
        engine.step()
    applied = engine.was_step_applied()
    if applied:  # a skipped step leaves the EMA as it was, too
        run.ema.update(momentum)
    norm = engine.get_global_grad_norm()
    if not isinstance(norm, torch.Tensor):  # infinite, of a skipped step; filled in on the device, to wait for nothing
        norm = torch.full((), norm, device=ranks.device)
    seconds = time.perf_counter() - started
    record = {
        "kind": "step",
        "step": step,
        "epoch": step / horizon.steps_per_epoch,
        "lr": lr,
        "weight_decay": weight_decay,
        "ema_momentum": momentum,
        "applied": applied,
        "context_tokens": int(context_tokens),
        "target_tokens": int(target_tokens),
        "images_per_second": options.global_batch_size / seconds,
        **rates(model=model, hardware=hardware, seconds=seconds, devices=ranks.world_size, peak=run.peak),
        "data_wait_seconds": wait / ranks.world_size,
        "step_seconds": seconds,
        "memory_bytes": memory_bytes(),
    }
    numbers = HostCopy([value for terms in losses for value in terms.values()] + [norm])
    return StepOutcome(record, list(losses[0]), numbers, applied, seen, noted > 0, stops > 0)


def completed(run: Run, outcome: StepOutcome) -> dict[str, Any]:
    """The record of a step with its loss, over all ranks and micro-steps, and gradient norm. All ranks call it."""
    *losses, norm = outcome.numbers.numbers()
    micro_steps = [losses[i : i + len(outcome.names)] for i in range(0, len(losses), len(outcome.names))]
    totals = run.ranks.sum([sum(values) for values in zip(*micro_steps, strict=True)])
    count = run.ranks.world_size * len(micro_steps)
    means = {
        name if name == "loss" else f"loss_{name}": total / count
        for name, total in zip(outcome.names, totals, strict=True)
    }
    return {**outcome.record, **means, "grad_norm": norm}


def next_batch(feed: Feed) -> Batch:
    try:
        return feed.take()
    except (BadImageError, StreamError) as error:
        line = str(error).splitlines()[-1]  # a worker's comes with its traceback, and ends with the class and message
        kind = f"{type(error).__module__}.{type(error).__qualname__}: "
        raise RunError(line.removeprefix(kind), local=True) from error


def count_text(run: Run) -> str:
    return f"{len(run.images):,} images" if len(run.images) else "a stream of unknown length"


def save_checkpoint(run: Run, step: int, say: Say) -> bool:
    """Save and prune; False, on all ranks, when it could not be written: training then goes on without it."""
    started = time.perf_counter()
    meta = {**run.facts, "wandb_id": run.wandb_id}
    if run.streams:
        meta["stream_states"] = run.ranks.gather(run.streams)
    try:
        path = checkpoints.save(run.folder.checkpoints, run.engine, run.ema, run.ranks, step=step, meta=meta)
    except OSError as error:
        say(f"warning: no checkpoint at step {step}: {error}; earlier checkpoints are untouched")
        return False
    keep = run.config.checkpoint
    checkpoints.prune(
        run.folder.checkpoints, run.ranks, keep_last=keep.keep_last, keep_every=keep.keep_every, newest=step
    )
    if run.ranks.first:
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        say(f"checkpoint {path} ({size:.1f} MB, {time.perf_counter() - started:.1f} s)")
    return True
