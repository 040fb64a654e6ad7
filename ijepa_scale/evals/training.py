"""A classifier of images trained under DeepSpeed: its steps, checkpoints from which a killed one goes on, and answers.

What is trained, and by which loss, finetune.py and attentive.py say.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.engine.schedules import cosine
from ijepa_scale.engine.zero import building_context, deepspeed_config, initialize
from ijepa_scale.evals.batches import Augment, LabelledBatch, Mix, TrainingBatches
from ijepa_scale.evals.evaluation import Evaluation, Labelled
from ijepa_scale.evals.shares import image_batches


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What all tasks that train have settings of."""

    epochs: int = 50
    warmup_epochs: int = 0  # of the learning rate, from 0
    batch_size: int = 512  # images a step, of all ranks; cut to the number of images
    micro_batch_size: int = 32  # images that a rank runs at once
    crop: str = "random"  # a random resized crop; or stretched: the whole image, squashed to a square
    rand_augment: str = ""  # timm's name of a RandAugment, such as rand-m9-mstd0.5-inc1; "": none
    zero_stage: int = 1  # of DeepSpeed, 1 to 3
    checkpoint_epochs: int = 5  # epochs between checkpoints

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size", "checkpoint_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.warmup_epochs < 0 or self.zero_stage not in (1, 2, 3):
            raise ValueError(
                f"warmup_epochs must be 0 or more, zero_stage 1, 2 or 3, got {self.warmup_epochs} and {self.zero_stage}"
            )
        if 0 < self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"epochs={self.epochs} end within warmup_epochs={self.warmup_epochs}, while the learning rate rises; "
                f"give warmup_epochs={self.epochs // 10}, or more epochs"
            )
        self.augment()  # which checks the rest

    def augment(self) -> Augment:
        return Augment(crop=self.crop, rand_augment=self.rand_augment)

    @property
    def stretch(self) -> bool:
        """Whether test images are whole ones, too."""
        return self.crop == "stretched"

    def batches(
        self, evaluation: Evaluation, labelled: Labelled, *, mix: Mix | None = None, read: bool = True
    ) -> TrainingBatches:
        """This rank's batches of the labelled images. mix, read: as of TrainingBatches."""
        return TrainingBatches(
            labelled=labelled,
            augment=self.augment(),
            mix=mix,
            epochs=self.epochs,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            image_size=evaluation.image_size,
            read=read,
            seed=evaluation.seed,
            rank=evaluation.ranks.rank,
            ranks=evaluation.ranks.world_size,
        )


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the highest learning rate: up in equal parts from the first step on, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return cosine(step - warmup_steps, max(1, total_steps - warmup_steps), 1.0, 0.0)


def start_engine(
    batches: TrainingBatches,
    build: Callable[[], torch.nn.Module],
    initial: Callable[[str, torch.Size], torch.Tensor],
    make_groups: Callable[[torch.nn.Module], list[dict[str, Any]]],
    *,
    zero_stage: int,
    whole: type[torch.nn.Module],
) -> Any:
    """The DeepSpeed engine: bf16 with fp32 master weights on CUDA, fp32 on a CPU. All ranks call it.

    build: the model. make_groups: its parameters for AdamW, each group with peak_lr and weight_decay. initial, whole:
    as of engine/zero.initialize(). The process must have joined others, or itself, by engine/distributed.start().
    """
    config = deepspeed_config(
        zero_stage=zero_stage,
        precision="bf16" if torch.cuda.is_available() else "fp32",
        micro_batch_size=batches.micro_batch_size,
        accumulation_steps=batches.accumulation_steps,
    )
    with building_context(config):
        model = build()

    def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
        groups = [{"ema": False, **group} for group in make_groups(module)]  # ema: of no interest to an average
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)

    return initialize(model, config, initial, adamw, whole=whole)


@dataclass(kw_only=True)
class Fit:
    """A classifier, what it is trained on, and how far it is.

    losses: a micro-batch on the device -> (B,), of each image. A checkpoint is gone on from where all that is trained
    on agrees: settings, seed, weights and images.
    """

    name: str
    evaluation: Evaluation
    batches: TrainingBatches
    engine: Any
    losses: Callable[[LabelledBatch], torch.Tensor]
    settings: TrainingSettings
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        labelled, evaluation = self.batches.labelled, self.evaluation
        places = hashlib.sha256(labelled.indices.tobytes() + labelled.labels.tobytes()).hexdigest()
        of = [evaluation.sha256, evaluation.image_size, evaluation.seed, labelled.images.name, places]
        images = evaluation.ranks.from_first(labelled.images.digest if evaluation.ranks.first else "")
        of += [images, asdict(self.settings)]
        digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = evaluation.keep / "checkpoints" / f"{self.name}-{digest}"

    def run(self, look: Callable[[float], str]) -> checkpoints.Checkpoint:
        """Train to the end, from the newest checkpoint of the same training if there is one; the last checkpoint.

        look: called with the mean loss of an image after each checkpoint but the last, on all ranks; what it answers is
        shown while training goes on. Raises ValueError, on every rank, where the loss is no longer finite.
        """
        ranks, batches, ema = self.evaluation.ranks, self.batches, ShardedEMA(self.engine, ())
        newest, _ = checkpoints.newest_good(self.folder, ranks)
        if newest:
            checkpoints.restore(newest, self.engine, ema)
        step, stride, said = newest.step if newest else 0, self.settings.checkpoint_epochs * batches.steps_per_epoch, ""
        while newest is None or step < batches.total_steps:
            stop = min(batches.total_steps, step + stride)
            loss = self._train(step, stop, said)
            path = checkpoints.save(self.folder, self.engine, ema, ranks, step=stop, meta={})
            checkpoints.prune(self.folder, ranks, keep_last=1, keep_every=0, newest=stop)
            newest, step = checkpoints.Checkpoint(path, checkpoints.read_manifest(path)), stop
            said = f"; {look(loss)}" if step < batches.total_steps else ""
        return newest

    def _train(self, start: int, stop: int, said: str) -> float:
        """The steps; the mean loss of an image."""
        ranks, batches, engine = self.evaluation.ranks, self.batches, self.engine
        # DeepSpeed takes the mean over ranks and micro-steps, of which each may have other numbers of images.
        scale = ranks.world_size * batches.accumulation_steps / batches.global_batch_size
        warmup_steps = self.settings.warmup_epochs * batches.steps_per_epoch
        total = torch.zeros((), device=ranks.device)
        first, last = start // batches.steps_per_epoch + 1, stop // batches.steps_per_epoch
        words = f"{self.name}, epochs {first} to {last} of {batches.epochs}{said}"
        with (
            torch.enable_grad(),
            batches.stream(workers=self.evaluation.workers, start_step=start, stop_step=stop) as stream,
        ):
            for step in self.evaluation.watch(words, range(start, stop)):
                for group in engine.optimizer.optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * warmup_cosine(step, batches.total_steps, warmup_steps)
                for _ in range(batches.accumulation_steps):
                    loss = self.losses(next(stream).to(ranks.device)).sum()
                    engine.backward(loss * scale)
                    engine.step()
                    total += loss.detach()
        mean = ranks.sum([total.item()])[0] / ((stop - start) * batches.global_batch_size)
        if not math.isfinite(mean):
            raise ValueError(f"{self.name}: the loss became {mean} between steps {start} and {stop}: give a smaller lr")
        return mean

    def remove_checkpoints(self) -> None:
        """Once what was trained is elsewhere."""
        self.evaluation.ranks.barrier()
        if self.evaluation.ranks.first:
            shutil.rmtree(self.folder)


@torch.no_grad()
def answers(
    evaluation: Evaluation,
    labelled: Labelled,
    classify: Callable[[torch.Tensor], torch.Tensor],
    *,
    words: str,
    stretch: bool,
) -> np.ndarray:
    """What classify says of each image, on every rank: (n, ...) int64, -1 for images that cannot be read.

    classify: (B, 3, S, S) uint8 on the device -> (B, ...) int64. stretch: as of image_batches().
    """
    ranks = evaluation.ranks
    batches = image_batches(
        labelled.images,
        labelled.indices,
        image_size=evaluation.image_size,
        batch_size=evaluation.batch_size,
        ranks=ranks,
        workers=evaluation.workers,
        stretch=stretch,
    )
    places, found = [], []
    with batches as loaded:
        for batch in evaluation.watch(words, loaded):
            answer = classify(batch.images.to(ranks.device, non_blocking=True)).cpu()
            places.append(batch.places.numpy())
            found.append(answer.numpy())
    shares = ranks.gather((np.concatenate(places), np.concatenate(found)))
    result = np.full((len(labelled), *found[0].shape[1:]), -1, np.int64)
    for at, given in shares:
        result[at[at >= 0]] = given[at >= 0]
    if (result < 0).all():
        raise ValueError(f"{labelled.images.name}: none of {len(labelled)} images can be read; check its files")
    return result
