"""The paper's linear probe: many linear heads on frozen features, all trained at once, each reported and the best.

As the public configs of VISSL have it (arXiv:2301.08243, A.2): {output, last four blocks} x {BatchNorm, none} x
learning rates x weight decays. B images of a batch, L blocks, D width, C classes.
"""

import contextlib
import functools
import itertools
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_scale.data.order import generator_for, image_at
from ijepa_scale.engine.schedules import cosine
from ijepa_scale.evals.batches import Augment, TrainingBatches
from ijepa_scale.evals.evaluation import Evaluation, Outcome, accuracy, commonest_share
from ijepa_scale.evals.extract import pooled
from ijepa_scale.evals.features import Features, encoding_copy, features_of, last_blocks
from ijepa_scale.extras import needed

HEADS = 0x6865616473  # the stream of random numbers that heads are drawn from
LR_IMAGES = 256  # that a learning rate is for; it grows with the batch
MOMENTUM = 0.9
SCORED = 4096  # test images that a head is given at a time


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How the heads are trained. The defaults are those of VISSL for transfer to smaller data sets."""

    epochs: int = 28
    batch_size: int = 256  # images a step, over all ranks; cut to the number of training images
    optimizer: str = "sgd"  # with Nesterov's momentum; or lars
    lr: float = 0.01  # for 256 images; it is scaled with the batch
    lr_factors: tuple[float, ...] = (1.0,)  # a head for each
    weight_decays: tuple[float, ...] = (5e-4,)  # a head for each
    drops: tuple[int, ...] = (8, 16, 24)  # epochs at which the learning rate falls to a tenth; none: cosine to a 100th
    crop: str = "random"  # random resized crops; or stretched: images are resized to a square whole
    features: bool = False  # of images as they are tested, computed once, instead of augmented ones: much quicker

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "lars") or self.crop not in ("random", "stretched"):
            raise ValueError(
                f"optimizer must be sgd or lars, and crop random or stretched, got {self.optimizer} and {self.crop}"
            )
        if self.drops and max(self.drops) >= self.epochs >= 1:
            drops = ",".join(str(max(1, round(drop * self.epochs / (max(self.drops) + 4)))) for drop in self.drops)
            raise ValueError(
                f"epochs={self.epochs} end before the learning rate has fallen at all of drops={list(self.drops)}; "
                f"give drops=[{drops}], or drops=[] for half a cosine"
            )
        if min(self.epochs, self.batch_size) < 1 or self.lr <= 0.0 or not self.lr_factors or not self.weight_decays:
            raise ValueError(
                "epochs, batch_size, lr, lr_factors and weight_decays must be positive and not empty, got "
                f"{self.epochs}, {self.batch_size}, {self.lr}, {self.lr_factors}, {self.weight_decays}"
            )


RECIPES = {
    "imagenet": LinearSettings(
        epochs=50,
        batch_size=16384,
        optimizer="lars",
        lr=0.1,
        lr_factors=(1.0, 0.1),
        weight_decays=(5e-4, 0.0),
        drops=(15, 30, 45),
    ),
    "transfer": LinearSettings(),
}
FULL_SIZE = 1_000_000  # training images from which on the ImageNet recipe is usual


@dataclass(frozen=True)
class Kind:
    """What sets a head apart. blocks: how many of the last ones it reads."""

    blocks: int
    norm: bool
    lr: float
    weight_decay: float

    @property
    def words(self) -> str:
        read = "output" if self.blocks == 1 else f"last {self.blocks} blocks"
        norm = "BatchNorm, " if self.norm else ""
        return f"{read}, {norm}lr {self.lr:g}, weight decay {self.weight_decay:g}"


def kinds(settings: LinearSettings, blocks: int) -> list[Kind]:
    """All heads. blocks: how many the features are of."""
    return [
        Kind(count, norm, settings.lr * factor, decay)
        for count in dict.fromkeys((blocks, 1))
        for norm in (True, False)
        for factor in settings.lr_factors
        for decay in settings.weight_decays
    ]


class Head(nn.Module):
    """One head and its optimizer. On the rank that trains it, which sees the whole batch: so does its BatchNorm."""

    def __init__(self, number: int, kind: Kind, settings: LinearSettings, *, width: int, classes: int, seed: int):
        super().__init__()
        self.number, self.kind, self.width = number, kind, kind.blocks * width
        self.norm = nn.BatchNorm1d(self.width) if kind.norm else nn.Identity()
        self.linear = nn.Linear(self.width, classes)
        draws = generator_for(seed, HEADS, number).standard_normal((classes, self.width), dtype=np.float32)
        with torch.no_grad():
            self.linear.weight.copy_(0.01 * torch.from_numpy(draws))
            self.linear.bias.zero_()
        self.optimizer = optimizer(self, settings)

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        """(B, classes) of features (B, L * D), of which it reads the end."""
        return self.linear(self.norm(features_BF[:, -self.width :]))

    def learn(self, features_BF: torch.Tensor, labels_B: torch.Tensor, *, factor: float) -> None:
        """One step. factor: what the size of the batch and the schedule make of the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.kind.lr
        self.optimizer.zero_grad()
        F.cross_entropy(self(features_BF), labels_B).backward()
        self.optimizer.step()


def optimizer(head: Head, settings: LinearSettings) -> torch.optim.Optimizer:
    """LARS (arXiv:1708.03888), timm's, or SGD. Biases and BatchNorm have neither weight decay nor LARS's scale."""
    others = [parameter for name, parameter in head.named_parameters() if name != "linear.weight"]
    groups: list[dict[str, Any]] = [
        {"params": [head.linear.weight], "weight_decay": head.kind.weight_decay, "always_adapt": True},
        {"params": others, "weight_decay": 0.0, "always_adapt": False},
    ]
    if settings.optimizer == "lars":
        needed("timm", extra="evaluate")
        from timm.optim.lars import Lars

        return Lars(groups, lr=0.0, momentum=MOMENTUM)
    for group in groups:
        del group["always_adapt"]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)


def lr_factor(step: int, steps_per_epoch: int, settings: LinearSettings) -> float:
    """A tenth for each epoch of settings.drops that has begun; without those, half a cosine from 1 to a hundredth."""
    if settings.drops:
        return 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in settings.drops)
    return cosine(step, steps_per_epoch * settings.epochs, 1.0, 0.01)


def check_linear(evaluation: Evaluation, settings: LinearSettings) -> None:
    """ValueError where a package is missing."""
    if settings.optimizer == "lars":
        needed("timm", extra="evaluate")


def linear(evaluation: Evaluation, settings: LinearSettings) -> Outcome:
    """All heads, the best on the test images as the result, as in the paper. Ranks share the heads among them.

    Each rank encodes its share of a batch, and all get all of it: so a head learns from the same batches wherever it
    is, and the result does not depend on the number of ranks.
    """
    ranks, stretch = evaluation.ranks, settings.crop == "stretched"
    test = features_of(evaluation, evaluation.test, stretch=stretch)
    source = (_FeatureBatches if settings.features else _AugmentedBatches)(evaluation, settings)
    heads = [
        Head(number, kind, settings, width=test.width, classes=len(evaluation.train.names), seed=evaluation.seed)
        for number, kind in enumerate(kinds(settings, len(last_blocks(evaluation.encoder))))
    ]
    mine = [head.to(ranks.device) for head in heads[ranks.rank :: ranks.world_size]]
    scale, steps_per_epoch = source.batch_size / LR_IMAGES, source.num_images // source.batch_size
    with torch.enable_grad(), contextlib.closing(source.batches()) as batches:
        for step in evaluation.watch(f"training {len(heads)} heads", range(settings.epochs * steps_per_epoch)):
            features_BF, labels_B = next(batches)
            factor = scale * lr_factor(step, steps_per_epoch, settings)
            for head in mine:
                head.learn(features_BF, labels_B, factor=factor)
    found = {head.number: _predictions(head, test, ranks.device) for head in mine}
    predicted = [of_head for _, of_head in sorted(item for share in ranks.gather(found) for item in share.items())]
    chance = commonest_share(test.labels)
    measures = [
        accuracy(head.kind.words, of_head, test.labels, chance=chance, settings=asdict(head.kind))
        for head, of_head in zip(heads, predicted, strict=True)
    ]
    return Outcome.best_of(
        measures, predicted, test.labels, train_images=source.num_images, batch_size=source.batch_size
    )


class _FeatureBatches:
    """Batches of features that were computed before, (B, L * D) and (B,), on the rank's device, epoch after epoch."""

    def __init__(self, evaluation: Evaluation, settings: LinearSettings) -> None:
        self._train = features_of(evaluation, evaluation.train, stretch=settings.crop == "stretched")
        self.num_images = len(self._train.labels)
        self.batch_size = min(settings.batch_size, self.num_images)
        self._seed, self._device = evaluation.seed, evaluation.ranks.device

    def batches(self) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        size = self.batch_size
        at = functools.partial(image_at, self._seed, num_images=self.num_images, global_batch_size=size)
        for step in itertools.count():
            rows = np.array([at(step, position) for position in range(size)])
            features_BF, labels_B = torch.from_numpy(self._train.blocks[rows]), self._train.labels[rows]
            yield features_BF.to(self._device), torch.from_numpy(labels_B).to(self._device)


class _AugmentedBatches:
    """The same of augmented images, encoded as they come: each rank encodes its share, and has them all."""

    def __init__(self, evaluation: Evaluation, settings: LinearSettings) -> None:
        self._evaluation, ranks = evaluation, evaluation.ranks
        self._batches = TrainingBatches(
            labelled=evaluation.train,
            augment=Augment(crop=settings.crop),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            micro_batch_size=evaluation.batch_size,
            image_size=evaluation.image_size,
            seed=evaluation.seed,
            rank=ranks.rank,
            ranks=ranks.world_size,
        )
        self.num_images, self.batch_size = len(evaluation.train), self._batches.global_batch_size

    def batches(self) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        ranks, encoder = self._evaluation.ranks, encoding_copy(self._evaluation.encoder)
        blocks = last_blocks(encoder)
        with self._batches.stream(workers=self._evaluation.workers) as stream:
            features: list[torch.Tensor] = []
            labels: list[torch.Tensor] = []
            for batch in stream:
                features.append(pooled(encoder, batch.images, blocks).to(ranks.device))
                labels.append(batch.labels.to(ranks.device))
                if batch.last:
                    yield ranks.gather_rows(torch.cat(features)), ranks.gather_rows(torch.cat(labels))
                    features, labels = [], []


@torch.no_grad()
def _predictions(head: Head, test: Features, device: torch.device) -> np.ndarray:
    """The class of each test image, (n,) int64."""
    head.eval()
    parts = (test.blocks[start : start + SCORED] for start in range(0, len(test.labels), SCORED))
    return np.concatenate([head(torch.from_numpy(np.array(part)).to(device)).argmax(1).cpu().numpy() for part in parts])
