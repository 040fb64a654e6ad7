"""What a run is made of, and everything that happens before its first step."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig, changed_keys, to_dict, to_yaml
from ijepa_scale.data.collate import Batch, MicroBatches, check_batches_fit, loader_processes, shared_memory
from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.streams.streams import State, Streams, anew
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine import launchers
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.engine.device import device_peak
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.engine.schedules import Schedules
from ijepa_scale.models.attention_backends import Choice
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.plan import checks
from ijepa_scale.run.folder import BadImages, RunFolder
from ijepa_scale.run.records import read_records


class InputError(Exception):
    """What the user gave cannot be trained on; found before training starts."""


@dataclass(kw_only=True)
class Run:
    """All that one process of a run holds."""

    config: PretrainConfig
    ranks: Ranks
    folder: RunFolder
    facts: dict[str, Any]  # what a checkpoint says of the run beside its state
    images: ImageSet | Mixture | Streams
    evaluation: build.EvalImages
    dataset: MicroBatches
    horizon: build.Horizon
    schedules: Schedules
    objective: Objective
    engine: Any
    ema: ShardedEMA
    peak: float | None  # FLOP/s of this rank's device; None: not known
    bad: BadImages = field(default_factory=BadImages)
    streams: list[State | None] = field(default_factory=list)  # where each of this rank's stands, as far as it trained
    start_step: int = 0
    wandb_id: str | None = None
    notes: list[str] = field(default_factory=list)  # to be shown once there is a progress line

    def keep_positions(self, batches: list[Batch]) -> None:
        """Remember where streams stand after batches that were trained on."""
        for mark in (batch.mark for batch in batches if batch.mark):
            self.streams[mark.stream] = mark.state


def check(config: PretrainConfig, objective: Objective | None = None) -> Objective:
    """The objective, after all that can be seen from the config alone: before any process group, on every rank."""
    build.check_source_given(config)
    return objective or build.build_objective(config)


def set_up(config: PretrainConfig, objective: Objective, ranks: Ranks, *, resume: str, allow_changes: bool) -> Run:
    """Everything else that can fail for a user's reason, in the order of its cost."""
    folder = RunFolder(config.run_dir)
    micro_batch_size, precision, settings = checks.settings(
        config, objective, ranks=ranks.world_size, device=ranks.device
    )
    attention = choose_attention(config, ranks)
    ranks.together(lambda: folder.lock() if ranks.first else None)
    images = ranks.together(lambda: build.build_images(config), on="node")
    evaluation = ranks.together(lambda: build.build_eval_images(config), on="node")
    horizon = build.build_horizon(config, len(images))
    facts = {
        "seed": config.seed,
        "config": to_dict(config),
        "architecture": objective.architecture(),
        "images": len(images),
        "precision": precision,
        "micro_batch_size": micro_batch_size,
        "images_in_statistics": micro_batch_size * ranks.world_size,  # of the variance and covariance terms
    }
    dealt: list[str] = []
    if isinstance(images, Streams):
        images = images.deal(rank=ranks.rank, ranks=ranks.world_size, workers=config.data.workers)
        facts["streams"] = images.layout()
        dealt = images.dealing(config.data.workers)
    ranks.together(lambda: check_shared_memory(config, images, ranks))
    found, notes = find_checkpoint(config, folder, ranks, facts, horizon.stop, resume=resume, allow=allow_changes)
    notes += [f"attention: {attention.name} ({attention.why})", *dealt]
    if found and isinstance(images, Streams):
        images = go_on(images, found, notes)

    engine, ema = build.build_engine(
        objective, settings, betas=config.optimization.betas, attend=attention.attend, total=ranks.total
    )
    dataset = build.build_micro_batches(
        config, images, objective, micro_batch_size=micro_batch_size, rank=ranks.rank, ranks=ranks.world_size
    )
    run = Run(
        config=config,
        ranks=ranks,
        folder=folder,
        facts=facts,
        images=images,
        evaluation=evaluation,
        dataset=dataset,
        horizon=horizon,
        schedules=build.build_schedules(config, horizon),
        objective=objective,
        engine=engine,
        ema=ema,
        peak=device_peak(ranks.device, precision),
        notes=notes,
    )
    if isinstance(images, Streams):
        run.streams = list(images.states or [None] * images.num_streams)
    earlier = ranks.together(lambda: read_records(folder.metrics) if ranks.first and folder.metrics.exists() else [])
    if found:
        checkpoints.restore(found, engine, ema)
        run.start_step = found.step
        run.bad = BadImages(ranks.from_first([r for r in earlier if r["step"] < found.step]))
        if found.path.parent.resolve() == folder.checkpoints.resolve():  # a branch of another run gets an id of its own
            run.wandb_id = found.manifest.get("wandb_id")
    elif earlier and ranks.first:
        old = folder.metrics.with_suffix(".jsonl.old")
        folder.metrics.replace(old)
        run.notes.append(
            f"no checkpoint in {folder.path}: starting from scratch; the earlier metrics are in {old.name}"
        )
    if ranks.first:
        folder.describe(
            to_yaml(config),
            world_size=ranks.world_size,
            precision=precision,
            attention=attention.name,
            images=len(images),
            source=images.name,
        )
    return run


def check_shared_memory(
    config: PretrainConfig, images: ImageSet | Mixture | Streams | None = None, ranks: Ranks | None = None
) -> None:
    """ValueError where what loader processes make ahead does not fit into shared memory.

    All ranks call it; without them it is of as many as the launcher has started, by its variables.
    """
    found = shared_memory()
    if ranks:
        world_size = ranks.world_size
        sharing = Counter(ranks.gather(found and found[0]))[found and found[0]]
    else:
        world_size, sharing = launchers.place().world_size, launchers.ranks_here()
    workers = loader_processes(images, config.data.workers) if images else config.data.workers
    if found and workers:
        image_bytes = 3 * config.data.image_size**2
        batch_bytes = image_bytes * build.build_micro_batch_size(config, world_size)
        check_batches_fit(batch_bytes=batch_bytes, workers=workers, ranks=sharing, free=found[1])


def choose_attention(config: PretrainConfig, ranks: Ranks) -> Choice:
    """The kernel for packed tokens, tested on every rank's device, and the same on all of them."""
    choice = ranks.together(lambda: build.build_attention(config, device=ranks.device))
    names = sorted(set(ranks.gather(choice.name)))
    if len(names) > 1:
        raise ValueError(
            f"the ranks would attend with different kernels, {', '.join(names)}: install the same packages on every "
            "node, or set model.attention"
        )
    return choice


def go_on(streams: Streams, found: Checkpoint, notes: list[str]) -> Streams:
    """The streams where a checkpoint left them; anew, and noted, where they were dealt in another way."""
    states = found.manifest.get("stream_states")
    if not states:
        return streams
    if found.manifest["streams"] == streams.layout():
        return streams.going_on(states[streams.rank])
    notes.append(
        "warning: shards are dealt in another way than before: every stream starts a new pass over its shards, so some "
        "images come again earlier than others"
    )
    return streams.going_on(anew([state for states_of_rank in states for state in states_of_rank], streams))


def find_checkpoint(
    config: PretrainConfig,
    folder: RunFolder,
    ranks: Ranks,
    facts: dict[str, Any],
    stop: int,
    *,
    resume: str,
    allow: bool,
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, verified by all ranks (None: a fresh start), and what to tell the user about it.

    facts: what save_checkpoint() writes of this run beside the state. stop: the step at which the run ends.
    Raises ValueError, on every rank, where a checkpoint does not fit or none of those there can be used.
    """
    own = ranks.from_first(checkpoints.candidates(folder.checkpoints))
    notes: list[str] = []
    if resume == "never":
        if own:
            raise ValueError(
                f"{folder.path} holds checkpoints up to {own[0].name}; for a fresh start choose another run_dir "
                "or delete that folder, to go on leave --resume at auto"
            )
        return None, notes
    path = Path(os.path.expanduser(resume))
    if path.resolve() in (folder.path.resolve(), folder.checkpoints.resolve()):
        resume = "auto"  # from this run itself
    inside = path.parent.resolve() == folder.checkpoints.resolve()
    if resume != "auto" and own and not inside:
        notes.append(f"going on from this run's own checkpoints: {resume} is where it started")
    if resume == "auto" or (own and not inside):
        found, skipped = checkpoints.newest_good(folder.checkpoints, ranks)
        notes += [f"warning: skipped a checkpoint that is not whole: {complaint}" for complaint in skipped]
    else:
        found, complaint = given_checkpoint(path, ranks, notes)
        if found is None:
            raise ValueError(
                f"--resume {resume} cannot be used: {complaint}; give a run folder, or one of its checkpoints as "
                "RUN/checkpoints/step-00001000"
            )
        if found.step >= stop and not inside:
            raise ValueError(f"--resume {resume} is at step {found.step} and this run ends at step {stop}")
    if found is None:
        return None, notes
    refuse_misfit(config, found, facts, allow=allow)
    later = [other for other in own if other.name > found.path.name] if inside and resume != "auto" else []
    if later:
        ranks.together(lambda: checkpoints.set_aside(later) if ranks.first else None)
        notes.append(f"set aside as abandoned-step-...: {', '.join(other.name for other in reversed(later))}")
    notes.append(f"resumed from {found.path}, step {found.step}")
    return found, notes


def given_checkpoint(path: Path, ranks: Ranks, notes: list[str]) -> tuple[Checkpoint | None, str]:
    """A checkpoint that verify() finds whole, or the newest such one of a run folder; else None, and why."""
    for folder in (path / "checkpoints", path):
        if ranks.from_first(checkpoints.candidates(folder)):
            found, skipped = checkpoints.newest_good(folder, ranks)
            notes += [f"warning: skipped a checkpoint that is not whole: {complaint}" for complaint in skipped]
            return found, ""
    return checkpoints.verify(path, ranks)


def refuse_misfit(config: PretrainConfig, found: Checkpoint, facts: dict[str, Any], *, allow: bool) -> None:
    """Raise ValueError for another architecture and, unless allowed, for settings that alter training."""
    theirs, ours = found.manifest["architecture"], facts["architecture"]
    if theirs != ours:
        differing = ", ".join(
            f"{key} {theirs.get(key)} there, {ours[key]} here" for key in ours if theirs.get(key) != ours[key]
        )
        raise ValueError(f"{found.path} holds another architecture: {differing}; choose another run_dir or its config")
    changed = changed_keys(found.manifest["config"], facts["config"])
    facts_that_count = ["images", "precision"] + ["micro_batch_size"] * (config.mask.context == "batch_min")
    facts_that_count += ["images_in_statistics"] * bool(config.loss.variance or config.loss.covariance)
    for key in [*facts_that_count, "streams"]:
        if found.manifest.get(key) != facts.get(key):
            changed[key] = (found.manifest.get(key), facts.get(key))
    if changed and not allow:
        listed = "\n  ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"these settings alter training and differ from {found.path}:\n  {listed}\n"
            "restore them, pass --allow-changes to go on all the same, or choose another run_dir"
        )
