"""Pre-training, top to bottom: set up, the loop over steps, the report at the end. The file to read first."""

import contextlib
import faulthandler
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ijepa_kernels.dispatch import chosen
from ijepa_scale.config import PretrainConfig, to_dict, without_secrets
from ijepa_scale.data.collate import Batch, LoadError, MicroBatchStream, micro_batch_stream
from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.engine import distributed
from ijepa_scale.engine.device import memory_bytes, rates
from ijepa_scale.engine.feed import Feed, HostCopy, collecting_by_hand
from ijepa_scale.engine.optim import set_schedules
from ijepa_scale.engine.signals import EXIT_SECONDS, STOP_EXIT_CODE, Stopped, StopRequest
from ijepa_scale.engine.watchdog import Watchdog
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.run.alike import start_facts
from ijepa_scale.run.health import HealthChecks
from ijepa_scale.run.incidents import (
    Log,
    RunError,
    Say,
    Skips,
    explained_loader_errors,
    explained_memory_errors,
    report_bad_images,
    report_passes,
)
from ijepa_scale.run.late_records import LateRecords, StepOutcome
from ijepa_scale.run.preview import preview_masks
from ijepa_scale.run.progress import Progress
from ijepa_scale.run.records import JsonlWriter, WandbWriter
from ijepa_scale.run.report import report
from ijepa_scale.run.saving import Saver
from ijepa_scale.run.setup import InputError, Run, check, set_up
from ijepa_scale.run.step_pictures import StepPictures, cut_back

RELEASE_STEPS = 20  # between releases of memory and collections of Python's cycles; docs/lab/speed.md
TOLD = ("noted", "stop", "writing")  # of what ranks agree on: whether somebody met something
NOT_COUNTS = ("model_flops", "hardware_flops", *TOLD)


def pretrain(
    config: PretrainConfig,
    *,
    resume: str = "auto",
    allow_changes: bool = False,
    stop_request: StopRequest | None = None,
    objective: Objective | None = None,
) -> int:
    """Train; the exit code: 0 done, 75 stopped on request with a checkpoint.

    resume: "auto" (the newest good checkpoint of the run folder, or a fresh start where there is none), "never", or a
    checkpoint's path. stop_request: the process's, where it has one since its start. objective: one of your own, in
    place of what objective.name says.
    Raises InputError, before training, for what the user can mend, RunError during it, and Stopped where it is asked to
    stop outside of training.
    """
    stop_request, own = stop_request or StopRequest(), stop_request is None
    try:
        try:
            objective = check(config, objective)
        except ValueError as error:
            raise InputError(str(error), alone=True) from error
        try:
            facts = start_facts(config, **{"--resume": resume, "--allow-changes": allow_changes})
            ranks = distributed.start(facts, hang_seconds=config.engine.hang_seconds)
        except ValueError as error:
            raise InputError(str(error)) from error
        try:
            with contextlib.closing(Watchdog(ranks, config.engine.hang_seconds)) as watchdog:
                code = run_on(
                    ranks, config, objective, stop_request, watchdog, resume=resume, allow_changes=allow_changes
                )
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
    objective: Objective,
    stop_request: StopRequest,
    watchdog: Watchdog,
    *,
    resume: str,
    allow_changes: bool,
) -> int:
    """Set up, train, report."""
    try:
        run = set_up(config, objective, ranks, resume=resume, allow_changes=allow_changes)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    try:
        if run.start_step < run.horizon.stop:
            with stop_request.between_steps():
                reason = train(run, stop_request, watchdog)
            if reason:
                return STOP_EXIT_CODE
            if stop_request.reason:  # since the last step
                raise Stopped(stop_request.reason)
        elif ranks.first:
            print(without_secrets("\n".join(run.notes)))
            print(f"{run.folder.path} is finished at step {run.start_step}; to train anew, give another run_dir")
        watchdog.outside("the report")
        del run.engine, run.ema  # their memory is free for the probes
        try:
            report(run)
        except BadImageError:  # told below
            raise
        except (ValueError, OSError) as error:
            raise RunError(
                f"the report could not be made: {error}; training has ended well, and the same command makes it",
                local=isinstance(error, OSError),
            ) from error
    except BadImageError as error:  # of the health check or the report, on all ranks
        raise RunError(str(error)) from error
    return 0


def train(run: Run, stop_request: StopRequest, watchdog: Watchdog) -> str:
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
        return loop(run, stop_request, progress, log, batches, watchdog)


def loop(
    run: Run,
    stop_request: StopRequest,
    progress: Progress | None,
    log: Log,
    batches: MicroBatchStream,
    watchdog: Watchdog,
) -> str:
    """The steps. All ranks go through it alike; returns as train() does."""
    config, horizon = run.config, run.horizon
    say: Say = (lambda text: progress.message(without_secrets(text))) if progress else lambda text: None
    feed = Feed(watched(batches, watchdog), run.ranks.device)
    records = LateRecords(run, log, progress, say)
    health, pictures = HealthChecks(run, log, say), StepPictures(run, log, say)
    skips, saver = Skips(run, log, say), Saver(run, say)
    introduce(run, say)
    for step in range(run.start_step, horizon.stop):
        watchdog.at(step)
        if health.due(step):
            records.settle()
            health.measure(step, loss=records.loss)
        if pictures.due(step):
            records.settle()
            pictures.draw(step)
        if progress and progress.lost:
            stop_request.ask(progress.lost)
        stop, writing = bool(stop_request.pending()), saver.writing
        outcome = train_step(run, step, feed, stop=stop, writing=writing, meanwhile=records.settle)
        records.add(outcome)
        run.keep_positions(outcome.batches)
        if outcome.noted or not outcome.applied:
            records.settle()
            report_passes(run, step, outcome.batches, say, log)
            report_bad_images(run, step, outcome.batches, say, log)
        skips.count(step, applied=outcome.applied, batches=outcome.batches)
        if saver.begun and not outcome.writing:
            saver.finish()
        done, reason = step + 1, agreed_reason(run.ranks, stop_request) if outcome.stop else ""
        if done % config.checkpoint.every_steps == 0 or done == horizon.stop or reason:
            records.settle()
            with watchdog.doing("saving after step"):
                saver.save(done, last=bool(reason) or done == horizon.stop)
        if done % RELEASE_STEPS == 0:
            gc.collect()
            run.ranks.release_memory()
        if reason and done < horizon.stop:
            say(f"stopped by {reason} after step {done}; the same command goes on from there")
            return reason
    if health.due(horizon.stop, last=True):
        health.measure(horizon.stop, loss=records.loss)
    if pictures.due(horizon.stop, last=True):
        pictures.draw(horizon.stop)
    reason = agreed_reason(run.ranks, stop_request)
    if reason:
        say(f"stopped by {reason} after the last step; the same command makes the report")
    return reason


def train_step(
    run: Run, step: int, feed: Feed, *, stop: bool, meanwhile: Callable[[], None], writing: bool = False
) -> StepOutcome:
    """One optimizer step on all ranks. stop, writing: whether this rank was asked to stop, or writes a checkpoint.

    While a GPU has the forward to do, the host does its own work: the next batch, agreements of ranks, meanwhile(). It
    waits for the device once, inside engine.step(), which asks whether the gradients are finite. (At ZeRO-3 DeepSpeed
    also waits at the end of the backward.)
    """
    engine, started = run.engine, time.perf_counter()
    waited, forwards = feed.waits.seconds, feed.forwards.seconds
    scheduled = run.schedules.at(step)
    set_schedules(
        engine.optimizer.optimizer.param_groups,
        lr=scheduled["lr"],
        weight_decay=scheduled["weight_decay"],
        ema_momentum=scheduled["ema_momentum"],
    )
    terms: list[dict[str, torch.Tensor]] = []
    batches: list[Batch] = []
    for micro in range(run.dataset.accumulation_steps):
        if micro:
            engine.step()  # of the micro-step before, which DeepSpeed counts
        batches.append(next_batch(feed))
        with explained_memory_errors(run), feed.forwards.running():
            terms.append(engine(batches[-1].images, batches[-1].masks))
        last = micro + 1 == run.dataset.accumulation_steps
        if not last or step + 1 < run.horizon.stop:
            feed.load()
        if last:
            meanwhile()
            own = {"data wait": feed.waits.seconds - waited, "forward": feed.forwards.seconds - forwards}
            agreed, each = agree(run, batches, own, stop=stop, writing=writing)
        with explained_memory_errors(run):
            engine.backward(terms[-1]["loss"])
    with explained_memory_errors(run):
        engine.step()
    assert all(list(micro) == list(terms[0]) for micro in terms), "terms differ between micro-steps"
    applied = engine.was_step_applied()
    if applied:  # a skipped step leaves the EMA as it was, too
        run.ema.update()
    record = step_record(run, step, scheduled, agreed, each, applied=applied, seconds=time.perf_counter() - started)
    numbers = HostCopy([value for micro in terms for value in micro.values()] + [gradient_norm(run)])
    told = {name: agreed[name] > 0 for name in TOLD}
    return StepOutcome(record, list(terms[0]), numbers, applied, batches, **told)


def agree(
    run: Run, batches: list[Batch], each: dict[str, float], **own: float
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Sums over all ranks: what the objective did in a step, what somebody must be told. And `each`, of every rank."""
    own = {name: float(value) for name, value in own.items()} | {"noted": 0.0}
    for batch in batches:
        for key, value in run.objective.done(batch.masks).items():
            own[key] = own.get(key, 0.0) + value
        own["noted"] += len(batch.bad) + (len(batch.stream.passes) if batch.stream else 0)
    return run.ranks.sums_and_each(own, each)


def step_record(
    run: Run,
    step: int,
    scheduled: dict[str, float],
    agreed: dict[str, float],
    each: dict[str, list[float]],
    *,
    applied: bool,
    seconds: float,
) -> dict[str, Any]:
    """A line of metrics.jsonl, but for the loss, its terms and the gradient norm (run/records.py names all keys)."""
    counts = {key: int(value) for key, value in agreed.items() if key not in NOT_COUNTS}
    waits = each["data wait"]
    alone = [wait + forward for wait, forward in zip(waits, each["forward"], strict=True)]
    slowest = max(range(len(alone)), key=alone.__getitem__)
    return {
        "kind": "step",
        "step": step,
        "epoch": step / run.horizon.steps_per_epoch,
        **scheduled,
        "applied": applied,
        **counts,
        "images_per_second": run.config.optimization.global_batch_size / seconds,
        **rates(
            model=agreed["model_flops"],
            hardware=agreed["hardware_flops"],
            seconds=seconds,
            devices=run.ranks.world_size,
            peak=run.peak,
        ),
        "data_wait_seconds": sum(waits) / len(waits),
        "data_wait_worst_seconds": max(waits),
        "slowest_rank": run.ranks.name(slowest),
        "slowest_rank_seconds": alone[slowest],
        "mean_rank_seconds": sum(alone) / len(alone),
        "step_seconds": seconds,
        "memory_bytes": memory_bytes(),
    }


def gradient_norm(run: Run) -> torch.Tensor:
    norm = run.engine.get_global_grad_norm()
    if isinstance(norm, torch.Tensor):
        return norm
    return torch.full((), norm, device=run.ranks.device)  # infinite, of a skipped step; on the device: no wait


def agreed_reason(ranks: distributed.Ranks, stop_request: StopRequest) -> str:
    """Why any rank was asked to stop, on all of them; "" where none was."""
    return ", ".join(sorted(set(filter(None, ranks.gather(stop_request.pending())))))


def watched(batches: MicroBatchStream, watchdog: Watchdog) -> Iterator[Batch]:
    """The batches, with a word to the watchdog while one is waited for."""
    while True:
        with watchdog.doing("waiting for the images of step"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def next_batch(feed: Feed) -> Batch:
    try:
        return feed.take()
    except LoadError as error:
        raise RunError(str(error), local=True) from error


def introduce(run: Run, say: Say) -> None:
    """What the user should know before the first step."""
    count = f"{len(run.images):,} images" if len(run.images) else "a stream of unknown length"
    for note in run.notes:
        say(note)
    say(f"operations: {chosen(run.ranks.device)}")
    say(
        f"{run.images.name}: {count}, {run.horizon.steps_per_epoch} steps an epoch; "
        f"{run.ranks.world_size} x {run.dataset.micro_batch_size} x {run.dataset.accumulation_steps} images a step; "
        f"run folder {run.folder.path}"
    )


def closing_in_time(kind: type[BaseException] | None, *error: object) -> None:
    """After an error what is open has a minute to be closed: the other ranks wait for the end of this one."""
    if kind:
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)


def unlogged(record: dict[str, Any]) -> None:
    """Ranks but the first write nothing."""


def open_logs(run: Run, stack: contextlib.ExitStack) -> Log:
    """metrics.jsonl, cut back to the restored step as pictures and the report are, and wandb."""
    config, folder = run.config, run.folder.path / "pictures"
    cut_back(run.folder.path, run.start_step)
    run.folder.set_aside_report(run.start_step)
    writer = stack.enter_context(JsonlWriter(run.folder.metrics, run.start_step or None))
    wandb = WandbWriter(
        config.logging.wandb,
        project=config.logging.wandb_project,
        name=run.folder.path.name,
        run_dir=run.folder.path,
        config=without_secrets(to_dict(config)),
        run_id=run.wandb_id,
    )
    stack.callback(wandb.finish)
    run.wandb_id = wandb.run_id

    def log(record: dict[str, Any]) -> None:
        record = without_secrets(record)
        try:
            writer.write(record)
        except OSError as error:
            raise RunError(
                f"{error}: free space or mend the disk; the same command goes on from the last checkpoint", local=True
            ) from error
        if record["kind"] in ("step", "health"):  # whose loss is the step before's, and is there
            of_wandb = {key: value for key, value in record.items() if (key, record["kind"]) != ("loss", "health")}
            wandb.log(of_wandb, record["step"])
        if record["kind"] == "pictures":
            wandb.log_pictures({title: folder / name for title, name in record["pictures"].items()}, record["step"])

    return log
