"""An attentive probe: a learned query attends to a frozen encoder's patch tokens, and a linear head reads the result.

As V-JEPA has it (arXiv:2404.08471), and with self-attention blocks before it V-JEPA 2 (arXiv:2506.09985). Several are
trained at once, each with a learning rate and a weight decay of its own. B images, N patches, D width, H heads of width
E, P probes, C classes.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_scale.engine.device import free_memory
from ijepa_scale.engine.launchers import ranks_here
from ijepa_scale.evals.batches import LabelledBatch, TrainingBatches
from ijepa_scale.evals.evaluation import Evaluation, Labelled, Outcome, accuracy, commonest_share
from ijepa_scale.evals.features import encoding_copy
from ijepa_scale.evals.shares import image_batches
from ijepa_scale.evals.training import Fit, TrainingSettings, answers, start_engine
from ijepa_scale.models.attention import Sequences
from ijepa_scale.models.blocks import NORM_EPS, Block, Mlp, ViTSize, run_blocks
from ijepa_scale.models.initial import initial_weight

HELD_OUT_EVERY = 10  # each tenth training image, evenly over the classes, chooses among the probes


@dataclass(frozen=True, kw_only=True)
class AttentiveSettings(TrainingSettings):
    """How the probes are trained: one for each pair of lrs and weight_decays."""

    epochs: int = 20
    batch_size: int = 1024
    micro_batch_size: int = 64
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # at their highest; a cosine to 0 follows
    weight_decays: tuple[float, ...] = (1e-3, 1e-1)  # of AdamW; none on biases, norms and the query
    depth: int = 1  # blocks: one of cross-attention, those before it of self-attention; V-JEPA 2 has 4
    heads: int = 0  # of attention; 0: as many as the encoder has
    features: bool = False  # tokens of images as they are tested, computed once and held in memory: much quicker

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage == 3:
            raise ValueError("zero_stage must be 1 or 2, got 3: probes are small, and the encoder is not trained")
        if self.depth < 1 or self.heads < 0:
            raise ValueError(f"depth must be 1 or more, heads 0 or more, got {self.depth} and {self.heads}")
        if not self.lrs or not self.weight_decays or min(self.lrs) <= 0.0 or min(self.weight_decays) < 0.0:
            raise ValueError(
                "lrs must name one or more numbers above 0, weight_decays one or more from 0 on, got "
                f"{list(self.lrs)} and {list(self.weight_decays)}"
            )

    @property
    def grid(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each probe."""
        return list(itertools.product(self.lrs, self.weight_decays))


class Probe(nn.Module):
    """Self-attention blocks, if any; then one cross-attention block from a learned query; then a linear head."""

    def __init__(self, size: ViTSize, classes: int):
        """size: depth counts the cross-attention block, too."""
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth - 1))
        self.query = nn.Parameter(torch.zeros(1, width))
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, size.mlp_width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """(B, C) float32."""
        batch, patches, _ = tokens_BND.shape
        if len(self.blocks):
            starts = torch.arange(batch + 1, device=tokens_BND.device, dtype=torch.int32) * patches
            # A copy: blocks may write over their input, which other probes read, too.
            tokens_TD = tokens_BND.flatten(0, 1).clone()
            tokens_TD = run_blocks(self.blocks, tokens_TD, Sequences(starts, patches, batch * patches))
            tokens_BND = tokens_TD.view_as(tokens_BND)
        k_BHNE, v_BHNE = self.kv(self.norm1(tokens_BND)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BH1E = self.q(self.query).view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        mixed_BD = F.scaled_dot_product_attention(q_BH1E, k_BHNE, v_BHNE).flatten(1)
        pooled_BD = self.query + self.proj(mixed_BD)
        pooled_BD = pooled_BD + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(pooled_BD))))
        return self.head(pooled_BD).float()


class Probes(nn.Module):
    """Several probes of the same tokens."""

    def __init__(self, size: ViTSize, classes: int, count: int):
        super().__init__()
        self.probes = nn.ModuleList(Probe(size, classes) for _ in range(count))

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """(B, P, C) float32."""
        return torch.stack([probe(tokens_BND) for probe in self.probes], dim=1)


def initial_probe_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """All probes begin alike, so that they differ by what they are trained with alone. name: as in Probes."""
    return initial_weight(name.split(".", 2)[2], shape, seed)


def probe_groups(model: nn.Module, grid: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """AdamW's groups: of each probe those with and those without weight decay."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        number = int(name.split(".")[1])
        decay = len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and not name.endswith(".query")
        lr, weight_decay = grid[number]
        own = {"params": [], "peak_lr": lr, "weight_decay": weight_decay if decay else 0.0}
        group = groups.setdefault((number, decay), own)
        group["params"].append(parameter)
    return list(groups.values())


def split(train: Labelled, probes: int) -> tuple[Labelled, Labelled]:
    """The images to fit on, and those that choose among the probes: none where there is but one."""
    if probes == 1:
        return train, train.take(np.arange(0))
    if len(train) < 2 * HELD_OUT_EVERY:
        raise ValueError(
            f"{len(train)} labelled images are too few to hold out every {HELD_OUT_EVERY}th to choose among {probes} "
            "probes: give one lr in lrs and one in weight_decays"
        )
    held_out = np.zeros(len(train), bool)
    held_out[np.argsort(train.labels, kind="stable")[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]] = True
    return train.take(np.flatnonzero(~held_out)), train.take(np.flatnonzero(held_out))


def check_attentive(evaluation: Evaluation, settings: AttentiveSettings) -> None:
    """ValueError for too few images to choose among the probes."""
    split(evaluation.train, len(settings.grid))


def attentive(evaluation: Evaluation, settings: AttentiveSettings) -> Outcome:
    """Test accuracy of each probe; the chosen one is the best on training images held out from all. All ranks call it.

    The encoder runs once a batch for all probes. A call that was cut short goes on from its last checkpoint when it is
    made again. Raises ValueError where the training diverges, and BadImageError where images cannot be read.
    """
    count = len(settings.grid)
    fit_on, held_out = split(evaluation.train, count)
    encoder = encoding_copy(evaluation.encoder)

    def tokens_of(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return encoder(images)

    kept_BND = None
    if settings.features:
        fit_on, kept_BND = _kept_tokens(evaluation, fit_on, tokens_of, stretch=settings.stretch)
    batches = settings.batches(evaluation, fit_on, read=kept_BND is None)
    engine = _start(evaluation, settings, batches)

    def losses(batch: LabelledBatch) -> torch.Tensor:
        """Summed over the probes: of each, the gradient is as if it were alone."""
        tokens_BND = tokens_of(batch.images) if kept_BND is None else kept_BND[batch.places.cpu()]
        logits_BPC = engine(tokens_BND.to(batch.labels.device))
        labels_BP = batch.labels[:, None].expand(-1, count)
        losses_T = F.cross_entropy(logits_BPC.flatten(0, 1), labels_BP.flatten(), reduction="none")
        return losses_T.view(-1, count).sum(dim=1)

    def classify(images: torch.Tensor) -> torch.Tensor:
        return engine.module(tokens_of(images)).argmax(dim=2)

    def predict(labelled: Labelled, words: str) -> tuple[np.ndarray, np.ndarray]:
        """(n, P) classes by each probe, and (n,) labels, of the images that can be read."""
        predicted = answers(evaluation, labelled, classify, words=words, stretch=settings.stretch)
        read = predicted[:, 0] >= 0
        return predicted[read], labelled.labels[read]

    fit = Fit(name="attentive", evaluation=evaluation, batches=batches, engine=engine, losses=losses, settings=settings)
    fit.run(lambda loss: f"loss {loss / count:.3f}")
    chooses = predict(held_out, "choosing a probe") if count > 1 else None
    tested = predict(evaluation.test, "testing")
    fit.remove_checkpoints()
    facts = {"train_images": len(fit_on), "held_out": len(held_out), "batch_size": batches.global_batch_size}
    return _outcome(settings, chooses, tested, facts)


def _kept_tokens(
    evaluation: Evaluation, labelled: Labelled, tokens_of: Callable[[torch.Tensor], torch.Tensor], *, stretch: bool
) -> tuple[Labelled, torch.Tensor]:
    """The images that can be read, and their tokens in memory, (n, N, D) in the encoder's dtype.

    Each rank computes and holds them all: any may be in its share of a batch. ValueError where memory does not hold
    them.
    """
    encoder, image_size, device = evaluation.encoder, evaluation.image_size, evaluation.ranks.device
    patches = (image_size // encoder.patch_embed.patch_size) ** 2
    shape = len(labelled), patches, encoder.size.width
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    needed, free = math.prod(shape) * dtype.itemsize * ranks_here(), free_memory()
    if needed > free:
        raise ValueError(
            f"the tokens of {len(labelled):,} images take {needed / 2**30:,.1f} GiB of this machine's memory, of which "
            f"{free / 2**30:,.1f} GiB are free; leave out features=true, or use fewer images"
        )
    kept_BND, read = torch.empty(shape, dtype=dtype), np.zeros(len(labelled), bool)
    batches = image_batches(
        labelled.images,
        labelled.indices,
        image_size=image_size,
        batch_size=evaluation.batch_size,
        ranks=replace(evaluation.ranks, rank=0, world_size=1),
        workers=evaluation.workers,
        stretch=stretch,
    )
    with batches as loaded:
        for batch in evaluation.watch(f"encoding {labelled.images.name}", loaded):
            here = batch.places >= 0
            kept_BND[batch.places[here]] = tokens_of(batch.images.to(device))[here.to(device)].to("cpu", dtype)
            read[batch.places[here]] = True
    if not read.any():
        raise ValueError(f"{labelled.images.name}: none of {len(labelled)} images can be read; check its files")
    places = np.flatnonzero(read)
    return labelled.take(places), kept_BND if read.all() else kept_BND[torch.from_numpy(places)]


def _outcome(
    settings: AttentiveSettings,
    chooses: tuple[np.ndarray, np.ndarray] | None,
    tested: tuple[np.ndarray, np.ndarray],
    facts: dict[str, Any],
) -> Outcome:
    """chooses, tested: (n, P) classes by each probe and (n,) labels, of the images held out and of those to test on."""
    chosen, held_right = 0, []
    if chooses:
        held_right = (100.0 * (chooses[0] == chooses[1][:, None]).mean(axis=0)).tolist()
        chosen = int(np.argmax(held_right))
    predicted, labels = tested
    chance = commonest_share(labels)
    measures = []
    for number, (lr, weight_decay) in enumerate(settings.grid):
        own: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        if chooses:
            own["held_out"] = held_right[number]
        words = f"lr {lr:g}, weight decay {weight_decay:g}"
        measure = accuracy(words, predicted[:, number], labels, chance=chance, settings=own)
        measures.append(replace(measure, chosen=number == chosen))
    return Outcome(measures=measures, predicted=predicted[:, chosen], labels=labels, facts=facts)


def _start(evaluation: Evaluation, settings: AttentiveSettings, batches: TrainingBatches) -> Any:
    size, classes = evaluation.encoder.size, len(evaluation.train.names)
    size = replace(size, depth=settings.depth, heads=settings.heads or size.heads)
    return start_engine(
        batches,
        lambda: Probes(size, classes, len(settings.grid)),
        lambda name, shape: initial_probe_weight(name, shape, evaluation.seed),
        lambda model: probe_groups(model, settings.grid),
        zero_stage=settings.zero_stage,
        whole=Block,
    )
