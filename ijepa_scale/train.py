"""Pre-training, top to bottom: set up, the loop over steps, the report at the end. The file to read first."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig, changed_keys, to_dict, to_yaml
from ijepa_scale.data.collate import Batch, MicroBatches, micro_batch_stream
from ijepa_scale.data.images import BadImageError, ImageSet
from ijepa_scale.data.order import permuted_index
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine import distributed, zero
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.engine.signals import STOP_EXIT_CODE, StopRequest
from ijepa_scale.evals.features import pooled_features
from ijepa_scale.evals.knn import knn_top1
from ijepa_scale.evals.probes import Features, probe_scores
from ijepa_scale.masking.packing import Packed
from ijepa_scale.metrics import (
    JsonlWriter,
    Progress,
    WandbWriter,
    drift,
    feature_std,
    health_verdict,
    memory_bytes,
    rankme,
    read_records,
)
from ijepa_scale.models.ijepa import initial_weight, initialize_weights
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.optim import adamw, parameter_groups, set_schedules
from ijepa_scale.run_folder import BadImages, RunFolder
from ijepa_scale.schedules import cosine, ema_momentum, learning_rate
from ijepa_scale.visualize.masks import draw_masks
from ijepa_scale.visualize.report import draw_loss_curve, draw_scores, report_table, write_report

STRIKES = 3  # steps in a row that were skipped, or checkpoints in a row that could not be written, before a run stops
EVAL_STREAM = 1_000_003  # the "epoch" of the permutation that picks evaluation images
MASK_PREVIEW_IMAGES = 8


class InputError(Exception):
    """What the user gave cannot be trained on; found before training starts."""


class RunError(RuntimeError):
    """Training cannot go on; the message tells the user why and what to do."""


@dataclass
class Run:
    """All that one process of a run holds."""

    config: PretrainConfig
    ranks: Ranks
    folder: RunFolder
    images: ImageSet
    evaluation: build.EvalImages
    dataset: MicroBatches
    horizon: build.Horizon
    engine: Any
    ema: ShardedEMA
    bad: BadImages
    start_step: int = 0
    wandb_id: str | None = None
    notes: list[str] = field(default_factory=list)  # to be shown once there is a progress line


def pretrain(config: PretrainConfig, *, resume: str = "auto", allow_changes: bool = False) -> int:
    """Train; the exit code: 0 done, 75 stopped on request with a checkpoint.

    resume: "auto" (the newest good checkpoint of the run folder, or a fresh start where there is none), "never", or a
    checkpoint's path. Raises InputError, before training, for what the user can mend, and RunError during it.
    """
    ranks = distributed.start()
    stop_request = StopRequest()
    try:
        try:
            run = set_up(config, ranks, resume=resume, allow_changes=allow_changes)
        except ValueError as error:
            raise InputError(str(error)) from error
        if run.start_step < run.horizon.stop:
            reason = train(run, stop_request)
            if reason:
                return STOP_EXIT_CODE
        elif ranks.first:
            print(f"{run.folder.path} is finished at step {run.start_step}; to train anew, give another run_dir")
        report(run)
        return 0
    finally:
        stop_request.close()
        ranks.close()


def set_up(config: PretrainConfig, ranks: Ranks, *, resume: str, allow_changes: bool) -> Run:
    """Everything that can fail for a user's reason, and in the order of its cost."""
    folder = RunFolder(config.run_dir)
    blocks = build.build_blocks(config)
    micro_batch_size = build.build_micro_batch_size(config, ranks.world_size)
    cuda = ranks.device.type == "cuda"
    precision = config.engine.precision if config.engine.precision != "auto" else "bf16" if cuda else "fp32"
    settings = zero.deepspeed_config(
        zero_stage=config.engine.zero_stage,
        precision=precision,
        micro_batch_size=micro_batch_size,
        accumulation_steps=config.optimization.global_batch_size // (micro_batch_size * ranks.world_size),
        clip_grad_norm=config.optimization.clip_grad_norm,
        extra=config.engine.deepspeed,
    )
    ranks.together(lambda: folder.lock() if ranks.first else None)
    images = ranks.together(lambda: build.build_images(config), on="node")
    evaluation = ranks.together(lambda: build.build_eval_images(config), on="node")
    horizon = build.build_horizon(config, len(images))
    found = find_checkpoint(config, folder, ranks, resume=resume, allow_changes=allow_changes)

    with zero.building_context(settings):
        model = build.build_model(config, initialize=False)
    engine = zero.initialize(
        model,
        settings,
        lambda name, shape: initial_weight(name, shape, config.seed),
        lambda module: adamw(parameter_groups(module), config.optimization.betas),
    )
    ema = ShardedEMA(engine, model.twins())
    dataset = build.build_micro_batches(
        config, images, blocks, micro_batch_size=micro_batch_size, rank=ranks.rank, ranks=ranks.world_size
    )
    known = ranks.from_first(BadImages.read(folder.bad_images))
    bad = BadImages(folder.bad_images, known)
    run = Run(config, ranks, folder, images, evaluation, dataset, horizon, engine, ema, bad)
    if found:
        checkpoints.restore(found, engine, ema)
        run.start_step = found.step
        run.wandb_id = found.manifest.get("wandb_id")
        run.notes.append(f"resumed from {found.path}, step {found.step}")
    if ranks.first:
        folder.describe(
            to_yaml(config), world_size=ranks.world_size, precision=precision, images=len(images), source=images.name
        )
    return run


def find_checkpoint(
    config: PretrainConfig, folder: RunFolder, ranks: Ranks, *, resume: str, allow_changes: bool
) -> Checkpoint | None:
    """The checkpoint to go on from, verified by all ranks; None for a fresh start. ValueError if it does not fit."""
    if resume == "never":
        there = ranks.from_first(checkpoints.candidates(folder.checkpoints))
        if there:
            raise ValueError(
                f"{folder.path} holds checkpoints up to {there[0].name}; for a fresh start choose another run_dir "
                "or delete that folder, to go on leave --resume at auto"
            )
        return None
    if resume == "auto":
        found, skipped = checkpoints.newest_good(folder.checkpoints, ranks)
        if skipped and ranks.first:
            print("warning: skipped checkpoints that are not whole:\n  " + "\n  ".join(skipped), flush=True)
    else:
        found, complaint = checkpoints.verify(Path(resume), ranks)
        if found is None:
            raise ValueError(f"--resume {resume} cannot be used: {complaint}")
    if found is None:
        return None
    theirs, ours = found.manifest["architecture"], build.architecture(config)
    if theirs != ours:
        differing = ", ".join(f"{key} {theirs.get(key)} there, {ours[key]} here" for key in ours if theirs.get(key) != ours[key])
        raise ValueError(f"{found.path} holds another architecture: {differing}; choose another run_dir or its config")
    changed = changed_keys(found.manifest["config"], to_dict(config))
    if changed and not allow_changes:
        listed = "\n  ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"these settings alter training and differ from {found.path}:\n  {listed}\n"
            "restore them, pass --allow-changes to go on all the same, or choose another run_dir"
        )
    return found


def train(run: Run, stop_request: StopRequest) -> str:
    """The loop. Returns why it was asked to stop early, or "" at the end of the run."""
    config, ranks, horizon = run.config, run.ranks, run.horizon
    writer = JsonlWriter(run.folder.metrics, run.start_step or None) if ranks.first else None
    wandb = None
    if ranks.first:
        wandb = WandbWriter(
            config.logging.wandb,
            project=config.logging.wandb_project,
            name=run.folder.path.name,
            run_dir=run.folder.path,
            config=to_dict(config),
            run_id=run.wandb_id,
        )
        run.wandb_id = wandb.run_id
        preview_masks(run)

    def log(record: dict[str, Any]) -> None:
        if writer and wandb:
            writer.write(record)
            wandb.log(record, record["step"])

    batches = micro_batch_stream(
        run.dataset, start_step=run.start_step, stop_step=horizon.stop, workers=config.data.workers
    )
    health = [r for r in read_records(run.folder.metrics) if r.get("kind") == "health"] if ranks.first else []
    skipped_in_a_row = failed_saves = 0
    reason = ""
    with Progress(horizon.stop, run.start_step) if ranks.first else contextlib.nullcontext() as progress:
        say = progress.message if progress else lambda text: None
        for note in run.notes:
            say(note)
        say(
            f"{run.images.name}: {len(run.images):,} images, {horizon.steps_per_epoch} steps an epoch; "
            f"{ranks.world_size} x {run.dataset.micro_batch_size} x {run.dataset.accumulation_steps} images a step; "
            f"run folder {run.folder.path}"
        )
        for step in range(run.start_step, horizon.stop):
            if config.logging.health_every_steps and step % config.logging.health_every_steps == 0:
                measure_health(run, step, health, log, say)
            outcome = train_step(run, step, batches, stop=bool(stop_request.pending()))
            log(outcome.record)
            if progress:
                progress.update(step + 1, outcome.record)
            if outcome.bad:
                handle_bad_images(run, step, outcome, say)
            skipped_in_a_row = 0 if outcome.applied else skipped_in_a_row + 1
            if not outcome.applied:
                handle_skip(run, step, outcome, skipped_in_a_row, say)
            done = step + 1
            if outcome.stop:
                reason = ", ".join(sorted(set(filter(None, ranks.gather(stop_request.pending())))))
            if done % config.checkpoint.every_steps == 0 or done == horizon.stop or reason:
                failed_saves = 0 if save_checkpoint(run, done, say) else failed_saves + 1
                if failed_saves == STRIKES or (failed_saves and (reason or done == horizon.stop)):
                    raise RunError("the checkpoint could not be written (see above); free space or mend the disk")
            if reason:
                say(f"stopped by {reason} after step {done}; the same command goes on from there")
                break
        else:
            if config.logging.health_every_steps:
                measure_health(run, horizon.stop, health, log, say)
    if writer and wandb:
        writer.close()
        wandb.finish()
    return reason


@dataclass(frozen=True)
class StepOutcome:
    """One step: its record, whether it was applied, what this rank saw, and what any rank met (the same on all)."""

    record: dict[str, Any]
    applied: bool
    batches: list[Batch]
    bad: bool  # some rank met an unreadable image
    stop: bool  # some rank was asked to stop


def train_step(run: Run, step: int, batches: Iterator[Batch], *, stop: bool) -> StepOutcome:
    """One optimizer step on all ranks. stop: whether this rank was asked to stop."""
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

    wait, loss_sum = 0.0, 0.0
    seen = []
    for _ in range(run.dataset.accumulation_steps):
        before = time.perf_counter()
        batch = next_batch(batches)
        wait += time.perf_counter() - before
        seen.append(batch)
        moved = batch.to(ranks.device)
        with explained_memory_errors(run):
            loss = engine(moved.images, moved.masks)
            engine.backward(loss)
            engine.step()
        loss_sum += loss.item()
    applied = engine.was_step_applied()
    if applied:  # a skipped step leaves the EMA as it was, too
        run.ema.update(momentum)
    loss_sum, wait, context_tokens, target_tokens, bad, stops = ranks.sum(
        [
            loss_sum / len(seen),
            wait,
            sum(batch.masks.context.num_tokens for batch in seen),
            sum(batch.masks.target_blocks.num_tokens for batch in seen),
            sum(len(batch.bad) for batch in seen),
            float(stop),
        ]
    )
    seconds = time.perf_counter() - started
    record = {
        "kind": "step",
        "step": step,
        "epoch": step / horizon.steps_per_epoch,
        "loss": loss_sum / ranks.world_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "ema_momentum": momentum,
        "grad_norm": float(engine.get_global_grad_norm()),
        "applied": applied,
        "context_tokens": int(context_tokens),
        "target_tokens": int(target_tokens),
        "images_per_second": options.global_batch_size / seconds,
        "data_wait_seconds": wait / ranks.world_size,
        "step_seconds": seconds,
        "memory_bytes": memory_bytes(),
    }
    return StepOutcome(record, applied, seen, bad > 0, stops > 0)


def next_batch(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except BadImageError as error:
        raise RunError(str(error)) from error


@contextlib.contextmanager
def explained_memory_errors(run: Run) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        if not out_of_memory:
            raise
        micro = run.dataset.micro_batch_size
        raise RunError(
            f"out of memory on {run.ranks.device} with {micro} images a micro-batch; lower "
            f"optimization.micro_batch_size (for example {max(1, micro // 2)}: gradients are accumulated, so the global "
            f"batch stays), raise engine.zero_stage, or use more ranks\n{error}"
        ) from error


def handle_bad_images(run: Run, step: int, outcome: StepOutcome, say: Callable[[str], None]) -> None:
    """Name unreadable images, and stop on all ranks together when there are too many."""
    own = [(bad.index, bad.sample_id, bad.reason) for batch in outcome.batches for bad in batch.bad]
    met = [bad for other in run.ranks.gather(own) for bad in other]
    for record in run.bad.add(step, met, write=run.ranks.first):
        say(f"warning: step {step}: cannot read {record['sample']}: {record['reason']}; another image takes its place")
    allowed = run.config.data.max_bad_fraction * len(run.images)
    if len(run.bad.known) > allowed:
        raise RunError(
            f"{len(run.bad.known)} of {len(run.images)} images cannot be read, more than data.max_bad_fraction "
            f"{run.config.data.max_bad_fraction:g} allows; they are listed in {run.bad.path}. Repair or remove them, "
            "or raise data.max_bad_fraction"
        )


def handle_skip(run: Run, step: int, outcome: StepOutcome, in_a_row: int, say: Callable[[str], None]) -> None:
    """Say which images a skipped step was made of; stop after STRIKES in a row."""
    indices = [index for rank in run.ranks.gather([b.indices for b in outcome.batches]) for b in rank for index in b]
    if run.ranks.first:
        with open(run.folder.path / "skipped_steps.jsonl", "a", encoding="utf-8") as file:
            samples = [run.images.sample_id(index) for index in indices]
            file.write(json.dumps({"step": step, "images": indices, "samples": samples}) + "\n")
        few = ", ".join(samples[:4]) + (", ..." if len(samples) > 4 else "")
        say(
            f"warning: step {step}: loss or gradients not finite: weights, moments and EMA are left as they were; "
            f"images {few} (all in {run.folder.path / 'skipped_steps.jsonl'})"
        )
    if in_a_row == STRIKES:
        there = run.ranks.from_first(checkpoints.candidates(run.folder.checkpoints))
        raise RunError(
            f"{STRIKES} steps in a row were not finite; the last good checkpoint is "
            f"{there[0] if there else 'none yet'}. Lower optimization.lr or look at the images named above"
        )


def save_checkpoint(run: Run, step: int, say: Callable[[str], None]) -> bool:
    """Save and prune; False, on all ranks, when it could not be written: training then goes on without it."""
    started = time.perf_counter()
    meta = {
        "seed": run.config.seed,
        "config": to_dict(run.config),
        "architecture": build.architecture(run.config),
        "wandb_id": run.wandb_id,
    }
    try:
        path = checkpoints.save(run.folder.checkpoints, run.engine, run.ema, run.ranks, step=step, meta=meta)
    except OSError as error:
        say(f"warning: no checkpoint at step {step}: {error}; earlier checkpoints are untouched")
        return False
    keep = run.config.checkpoint
    checkpoints.prune(run.folder.checkpoints, run.ranks, keep_last=keep.keep_last, keep_every=keep.keep_every)
    if run.ranks.first:
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        say(f"checkpoint {path} ({size:.1f} MB, {time.perf_counter() - started:.1f} s)")
    return True


def eval_crops(run: Run, images: ImageSet, indices: list[int]) -> Iterator[torch.Tensor]:
    """Centre crops of this rank's share of the images, in batches; every rank yields equally many of each size."""
    own = indices[run.ranks.rank :: run.ranks.world_size]
    size, batch = run.config.data.image_size, run.dataset.micro_batch_size
    for start in range(0, len(own), batch):
        crops = [center_crop(images.read_or_substitute(i)[0], size) for i in own[start : start + batch]]
        yield torch.from_numpy(np.stack(crops))


def features_of(run: Run, encoder: torch.nn.Module, images: ImageSet, indices: list[int]) -> torch.Tensor:
    """Pooled features of images, each rank computing its share: (len(indices), D) on every rank."""
    shares = run.ranks.gather(pooled_features(encoder, eval_crops(run, images, indices)))
    features = torch.empty(len(indices), shares[0].shape[1])
    for rank, share in enumerate(shares):
        features[rank :: run.ranks.world_size] = share
    return features


def eval_indices(run: Run, images: ImageSet, count: int, *, skip: int = 0) -> list[int]:
    """A fixed random choice of images, as many as every rank can take an equal share of."""
    count = min(count, len(images) - skip) // run.ranks.world_size * run.ranks.world_size
    return [permuted_index(0, EVAL_STREAM, len(images), skip + i) for i in range(count)]


def measure_health(
    run: Run,
    step: int,
    history: list[dict[str, Any]],
    log: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> None:
    """Are the features still worth something? Collective: every rank computes its share of the features."""
    images = run.evaluation.train
    indices = eval_indices(run, images, run.config.logging.health_images)
    model = run.engine.module
    target, context = (features_of(run, e, images, indices) for e in (model.target_encoder, model.context_encoder))
    if not run.ranks.first:
        return
    record: dict[str, Any] = {
        "kind": "health",
        "step": step,
        "feature_std": feature_std(target),
        "rankme": rankme(target),
        "drift": drift(target, context),
    }
    fit = len(indices) * 3 // 4
    for name, column in list(images.label_columns().items())[:1]:
        labels = torch.from_numpy(column.values[indices])
        if bool((labels >= 0).all()) and bool(torch.isfinite(target).all()):
            record["knn"] = knn_top1(target[:fit], labels[:fit], target[fit:], labels[fit:])
            record["knn_label"] = name
    history.append(record)
    log(record)
    say(f"health at step {step}: {health_verdict(history)}")


def preview_masks(run: Run) -> None:
    """masks.png: what the networks see of the run's first images."""
    batch = run.dataset[run.start_step * run.dataset.accumulation_steps]
    count = min(MASK_PREVIEW_IMAGES, len(batch.indices))
    num_patches = batch.masks.num_patches

    def per_image(packed: Packed) -> list[np.ndarray]:
        indices, bounds = packed.indices_T.numpy(), packed.cu_seqlens.numpy()
        return [indices[low:high] % num_patches for low, high in zip(bounds[:-1], bounds[1:], strict=True)]

    blocks = per_image(batch.masks.target_blocks)
    each = len(blocks) // len(batch.indices)
    grid = run.dataset.blocks.grid
    draw_masks(
        run.folder.path / "masks.png",
        batch.images[:count].numpy(),
        grid.rows,
        grid.columns,
        per_image(batch.masks.context)[:count],
        [blocks[i * each : (i + 1) * each] for i in range(count)],
    )


def report(run: Run) -> None:
    """Curves, and scores of the target encoder beside the same model at initialisation. Collective."""
    config, ranks, folder = run.config, run.ranks, run.folder
    if ranks.first:
        draw_loss_curve(folder.path / "loss_curve.png", read_records(folder.metrics))
    train_images, test_images = run.evaluation.train, run.evaluation.test
    labels = {
        name: column for name, column in test_images.label_columns().items() if name in train_images.label_columns()
    }
    found, _ = checkpoints.newest_good(folder.checkpoints, ranks)
    if not labels or not found or not config.report.train_images:
        if ranks.first:
            why = "the source has no labels to probe with" if not labels else "report.train_images is 0"
            write_report(folder.path / "report.json", [], step=run.horizon.stop, note=why)
            print(f"no probes: {why}; curves are in {folder.path / 'loss_curve.png'}")
        return
    if ranks.first:
        print("probing the target encoder and the same encoder at initialisation ...", flush=True)
    fit = eval_indices(run, train_images, config.report.train_images)
    skip = 0 if run.evaluation.held_out else len(fit)
    held = eval_indices(run, test_images, config.report.test_images, skip=skip)
    encoder = build.build_encoder(config).to(ranks.device)
    features = {}
    for which in ("initial", "trained"):
        if which == "initial":
            initialize_weights(encoder, config.seed, prefix="context_encoder.")
        else:
            load_target_encoder(encoder, found)
        features[which] = Features(
            *(features_of(run, encoder, images, chosen) for images, chosen in ((train_images, fit), (test_images, held)))
        )
    if ranks.first:
        both = {name: (train_images.label_columns()[name].values[fit], labels[name].values[held]) for name in labels}
        scores = probe_scores(both, **features)
        facts = {
            "step": found.step,
            "checkpoint": found.path.name,
            "seed": config.seed,
            "train_images": len(fit),
            "held_out": run.evaluation.held_out,
        }
        write_report(folder.path / "report.json", scores, **facts)
        draw_scores(folder.path / "scores.png", scores)
        Console().print(report_table(scores))
        if not run.evaluation.held_out:
            print("the source has no validation split: the probes' test images were among the training images")
        print(f"report: {folder.path}/report.json, loss_curve.png, scores.png, masks.png")
    ranks.barrier()


def load_target_encoder(encoder: VisionTransformer, found: Checkpoint) -> None:
    """Fill a plain encoder with a checkpoint's EMA weights."""
    shapes = {f"context_encoder.{name}": p.shape for name, p in encoder.named_parameters()}
    weights = checkpoints.read_weights(found, shapes, "ema")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(weights[f"context_encoder.{name}"])
