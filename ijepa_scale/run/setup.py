"""What a run is made of, and everything that happens before its first step."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig, check_source_given, to_dict, to_yaml, without_secrets
from ijepa_scale.data.collate import Batch, MicroBatches, check_batches_fit, loader_processes, shared_memory
from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.data.streams.positions import StreamPosition
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine import launchers, zero
from ijepa_scale.engine.device import device_peak
from ijepa_scale.engine.distributed import Ranks, keep_nothing_large
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.engine.schedules import Schedules
from ijepa_scale.models.attention_backends import Choices
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.plan import checks
from ijepa_scale.run import frozen, init_from
from ijepa_scale.run.alike import check_folder, check_images, versions
from ijepa_scale.run.folder import BadImages, RunFolder
from ijepa_scale.run.records import read_records
from ijepa_scale.run.resume import find_checkpoint, go_on

LARGE_STATE = 1 << 30  # bytes of a rank: of smaller ones memory is there, and a step would take a seventh longer
SLOW_BF16 = ("DEFAULT", "AVX2")  # what PyTorch calls CPUs for which oneDNN has no products in bf16


class InputError(Exception):
    """What the user gave cannot be trained on; found before training starts.

    alone: by this process, before it has met the others.
    """

    def __init__(self, message: str, *, alone: bool = False):
        super().__init__(message)
        self.alone = alone


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
    positions: list[StreamPosition | None] = field(default_factory=list)  # of this rank's streams, as far as it trained
    start_step: int = 0
    wandb_id: str | None = None
    notes: list[str] = field(default_factory=list)  # to be shown once there is a progress line

    def keep_positions(self, batches: list[Batch]) -> None:
        """Remember where streams go on after batches that were trained on."""
        for stream in (batch.stream for batch in batches if batch.stream):
            self.positions[stream.number] = stream.position


def check(config: PretrainConfig, objective: Objective | None = None) -> Objective:
    """The objective, after all that can be seen from the config alone: before any process group, on every rank."""
    check_source_given(config)
    objective = objective or build.build_objective(config)
    objective.check()
    side = config.data.image_size // config.model.patch_size
    if objective.grid.shape != (side, side):
        raise ValueError(
            f"the objective is of {objective.grid.shape[0]} x {objective.grid.shape[1]} patches, and data.image_size "
            f"{config.data.image_size} with model.patch_size {config.model.patch_size} gives {side} x {side}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks.settings(config, objective, ranks=launchers.place().world_size, device=device)
    return objective


def set_up(
    config: PretrainConfig,
    objective: Objective,
    ranks: Ranks,
    *,
    resume: str,
    allow_changes: bool,
    given: ImageSet | None = None,
) -> Run:
    """Everything else that can fail for a user's reason, in the order of its cost.

    given: images to train on in the place of data.source.
    """
    folder = RunFolder(config.run_dir)
    micro_batch_size, precision, settings = checks.settings(
        config, objective, ranks=ranks.world_size, device=ranks.device
    )
    zero.check_settings(settings, config.engine.deepspeed)
    state_bytes = ranks.together(
        lambda: checks.check_memory(config, objective, settings, ranks=ranks.world_size, device=ranks.device)
    )
    attention = choose_attention(config, ranks, objective)
    ranks.together(lambda: folder.lock() if ranks.first else None)
    check_folder(folder, ranks)
    if config.model.init_from and starts_anew(folder, ranks, resume):
        ranks.together(lambda: init_from.check(config, objective) if ranks.first else None)
    images = given or ranks.together(lambda: build.build_images(config), on="node")
    if given:
        evaluation = build.EvalImages(given, given, held_out=False)
    else:
        check_images(images, ranks)
        evaluation = ranks.together(lambda: build.build_eval_images(config), on="node")
    horizon = build.build_horizon(config, len(images))
    facts = facts_of(config, objective, ranks, images=len(images), precision=precision, micro_batch=micro_batch_size)
    if not given:
        facts["images_digest"] = ranks.from_first(images.digest if ranks.first else "")
    dealt: list[str] = []
    if isinstance(images, Streams):
        images = images.deal(rank=ranks.rank, ranks=ranks.world_size, workers=config.data.workers)
        facts["streams"] = images.layout()
        dealt = images.dealing(config.data.workers)
    ranks.together(lambda: check_shared_memory(config, images, ranks))
    found, notes = find_checkpoint(objective, folder, ranks, facts, horizon.stop, resume=resume, allow=allow_changes)
    if objective.attention_heads():
        notes.append(f"attention: {attention.name} ({attention.why})")
    notes += slow_precision(precision, ranks.device)
    notes += dealt
    if found and isinstance(images, Streams):
        images = go_on(images, found, notes)

    if config.engine.zero_stage == 3 and state_bytes > LARGE_STATE:
        keep_nothing_large(ranks)
    initial, of_frozen = frozen.initial_weights(config, objective, ranks, found)
    facts |= of_frozen
    engine, ema = build.build_engine(
        objective,
        settings,
        optimization=config.optimization,
        attend=attention.attend,
        total=ranks.total,
        initial=initial,
    )
    ranks.release_memory()  # which building has used: at ZeRO-3 a quarter of what is kept
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
        run.positions = list(images.positions or [None] * images.num_streams)
    take_up(run, found)
    if config.model.init_from:
        start_from(run, found)
    if ranks.first:
        seen = {
            "nodes": len(set(ranks.hosts)) or 1,
            "attention": attention.name,
            "images": len(images),
            "source": images.name,
            "objective": objective.name,
        }
        folder.describe(to_yaml(config), world_size=ranks.world_size, precision=precision, **seen)
    return run


def slow_precision(precision: str, device: torch.device) -> list[str]:
    """A warning, where products in bf16 are not the CPU's own."""
    if precision != "bf16" or device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in SLOW_BF16:
        return []
    return [
        "warning: engine.precision=bf16 on a CPU without products in bf16: some take a hundred times as long as in "
        "fp32; set engine.precision=fp32 where there is memory for it"
    ]


def facts_of(
    config: PretrainConfig, objective: Objective, ranks: Ranks, *, images: int, precision: str, micro_batch: int
) -> dict[str, Any]:
    """What a checkpoint says of its run beside the state: what a run that resumes it is compared with."""
    return {
        "seed": config.seed,
        "objective": objective.name,
        "config": without_secrets(to_dict(config)),
        "architecture": objective.architecture(),
        "images": images,
        "precision": precision,
        "micro_batch_size": micro_batch,
        "images_in_statistics": micro_batch * ranks.world_size,  # of terms over the images of a micro-step
        "packages": versions(),
    }


def take_up(run: Run, found: checkpoints.Checkpoint | None) -> None:
    """Bring a run to where a checkpoint left it; without one the metrics of earlier attempts are put aside."""
    ranks, folder = run.ranks, run.folder
    earlier = ranks.together(lambda: read_records(folder.metrics) if ranks.first and folder.metrics.exists() else [])
    if found:
        checkpoints.restore(found, run.engine, run.ema)
        run.start_step = found.step
        if "init_from" in found.manifest:  # of whatever it once started from
            run.facts["init_from"] = found.manifest["init_from"]
        run.bad = BadImages(ranks.from_first([r for r in earlier if r["step"] < found.step]))
        if found.path.parent.resolve() == folder.checkpoints.resolve():  # a branch of another run gets an id of its own
            run.wandb_id = found.manifest.get("wandb_id")
    elif earlier and ranks.first:
        old = folder.metrics.with_suffix(".jsonl.old")
        folder.metrics.replace(old)
        run.notes.append(
            f"no checkpoint in {folder.path}: starting from scratch; the earlier metrics are in {old.name}"
        )


def starts_anew(folder: RunFolder, ranks: Ranks, resume: str) -> bool:
    """Whether there is no checkpoint to go on from; before any is looked into."""
    return resume in ("auto", "never") and not ranks.from_first(checkpoints.candidates(folder.checkpoints))


def start_from(run: Run, found: checkpoints.Checkpoint | None) -> None:
    """Give a run that starts anew the weights of model.init_from."""
    if found:
        run.notes.append("model.init_from is not read: the run goes on from a checkpoint")
        return
    facts, said = init_from.begin(run.config, run.objective, run.ranks, run.engine, run.ema)
    run.facts["init_from"] = facts
    run.notes += said


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


def choose_attention(config: PretrainConfig, ranks: Ranks, objective: Objective | None = None) -> Choices:
    """The kernels for packed tokens, tested on every rank's device, and the same on all of them."""
    choice = ranks.together(lambda: build.build_attention(config, device=ranks.device, objective=objective))
    names = sorted(set(ranks.gather(choice.name)))
    if len(names) > 1:
        raise ValueError(
            f"the ranks would attend with different kernels, {', '.join(names)}: install the same packages on every "
            "node, or set model.attention and predictor.attention"
        )
    return choice
