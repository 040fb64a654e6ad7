"""Fine-tuning: the whole encoder and a linear head on its average-pooled output, trained to classify.

As I-JEPA (arXiv:2301.08243, A.2 and D) has it, with BEiT's learning rates that fall with depth (arXiv:2106.08254).
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_scale.data.files import written_whole
from ijepa_scale.data.order import generator_for
from ijepa_scale.engine.checkpoint import Checkpoint, read_weights
from ijepa_scale.evals.batches import DROP_PATH, LabelledBatch, Mix, TrainingBatches
from ijepa_scale.evals.evaluation import Evaluation, Outcome, accuracy, commonest_share
from ijepa_scale.evals.training import Fit, TrainingSettings, answers, start_engine
from ijepa_scale.extras import needed
from ijepa_scale.models.blocks import Block, recompute
from ijepa_scale.models.vit import VisionTransformer

WEIGHTS = "finetuned.safetensors"


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings):
    """How the network is trained on. The defaults are those of the paper for ViT-H/16 at 448 pixels and all labels.

    At each checkpoint the test images are looked at, but nothing is chosen by them.
    """

    warmup_epochs: int = 5  # the paper does not say; MAE has 5
    batch_size: int = 528
    rand_augment: str = "rand-m9-mstd0.5-inc1"  # as MAE
    lr: float = 1e-4  # of the head, at its highest; a cosine to 0 follows
    weight_decay: float = 0.04  # none on biases and norms
    layer_decay: float = 0.75  # lr of a layer / lr of the one behind it
    label_smoothing: float = 0.1  # share of a target that all classes get alike
    drop_path: float = 0.25  # of the last block's branches, of none of the first's, in between in proportion
    mixup: float = 0.8  # parameter of the Beta distribution of mixup's weights; 0: no mixup
    cutmix: float = 1.0  # the same of CutMix's areas
    recompute_every: int = 0  # activation checkpointing of every Nth block; 0: of none

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_decay", "mixup", "cutmix", "recompute_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.lr <= 0.0 or not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"lr must be above 0, layer_decay in (0, 1], got {self.lr} and {self.layer_decay}")
        if not (0.0 <= self.label_smoothing < 1.0 and 0.0 <= self.drop_path < 1.0):
            raise ValueError(
                f"label_smoothing and drop_path must be in [0, 1), got {self.label_smoothing} and {self.drop_path}"
            )

    @property
    def mix(self) -> Mix | None:
        return Mix(mixup=self.mixup, cutmix=self.cutmix) if self.mixup or self.cutmix else None


def recipe(width: int, *, few_labels: bool) -> FinetuneSettings:
    """Settings for an encoder of a width. few_labels: for 1% of ImageNet's labels and the like.

    The paper's (arXiv:2301.08243, A.2 and D), for all labels that of ViT-H/16 at 448 from ViT-L on. It has none for
    smaller networks: those are this project's, after MAE's for ViT-B, with 5e-4 as learning rate for 256 images.
    """
    paper = FinetuneSettings()
    plain: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
    if width < 1024:
        own = replace(paper, batch_size=256, lr=5e-4, weight_decay=0.05, drop_path=0.1)
        return replace(own, batch_size=128, lr=2.5e-4, **plain) if few_labels else own
    if not few_labels:
        return paper
    return replace(paper, batch_size=512, lr=3e-5, weight_decay=5e-2 if width < 1280 else 4e-1, **plain)


class Classifier(nn.Module):
    """An encoder and a linear head on the average of its tokens, after its final LayerNorm."""

    def __init__(self, like: VisionTransformer, classes: int):
        """like: an encoder of the same shape; the weights are to be set."""
        super().__init__()
        patch_size = like.patch_embed.patch_size
        image_size = like.grid.rows * patch_size
        self.encoder = VisionTransformer(like.size, image_size=image_size, patch_size=patch_size, attend=like.attend)
        self.encoder.pos_embed = like.pos_embed.clone()  # an imported network's may be learned ones: they stay
        self.head = nn.Linear(like.size.width, classes)

    def forward(self, images_BCHW: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """(B, classes) float32. images_BCHW: (B, 3, H, W) uint8. keep: as of kept_branches()."""
        pooled_BD = self.encoder(images_BCHW, keep=keep).float().mean(dim=1)
        return self.head(pooled_BD.to(self.head.weight.dtype)).float()


def layer_of(name: str, depth: int) -> int:
    """Which layer a parameter of a Classifier is of: 0 the patch embedding, 1.. the blocks, depth + 1 what follows."""
    part = name.removeprefix("encoder.").split(".")
    if part[0] == "blocks":
        return int(part[1]) + 1
    return 0 if part[0] == "patch_embed" else depth + 1


def layer_groups(model: nn.Module, depth: int, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """AdamW's groups: layers, each with and without weight decay, with their highest learning rate as peak_lr."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer, decay = layer_of(name, depth), len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        group = groups.setdefault(
            (layer, decay),
            {
                "params": [],
                "name": f"layer {layer}" + ("" if decay else ", no decay"),
                "peak_lr": settings.lr * settings.layer_decay ** (depth + 1 - layer),
                "weight_decay": settings.weight_decay if decay else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def kept_branches(seed: int, step: int, positions: list[int], depth: int, rate: float) -> torch.Tensor:
    """Drop path's factors, (blocks, B, 2): 0 where an image goes past a branch, else 1 / the share that does not.

    So the mean is 1. The rate grows in proportion from 0 at the first block to `rate` at the last. Drawn for each
    position in the global batch, so ranks change nothing.
    """
    rates = np.linspace(0.0, rate, depth)[:, None, None]
    draws = np.stack([generator_for(seed, DROP_PATH, step, at).random((depth, 2)) for at in positions], axis=1)
    return torch.from_numpy(((draws >= rates) / (1.0 - rates)).astype(np.float32))


def check_finetune(evaluation: Evaluation, settings: FinetuneSettings) -> None:
    """ValueError where a package is missing."""
    if settings.mix or settings.rand_augment:
        needed("timm", extra="evaluate")


def finetune(evaluation: Evaluation, settings: FinetuneSettings) -> Outcome:
    """Test accuracy after the last epoch; the network goes to out/finetuned.safetensors. All ranks call it.

    A call that was cut short goes on from its last checkpoint when it is made again. Raises ValueError where it
    diverges, and BadImageError where images cannot be read.
    """
    ranks, test = evaluation.ranks, evaluation.test
    batches = settings.batches(evaluation, evaluation.train, mix=settings.mix)
    engine = _start(evaluation, settings, batches)

    def losses(batch: LabelledBatch) -> torch.Tensor:
        keep = None
        if settings.drop_path:
            positions, depth = batch.positions.tolist(), evaluation.encoder.size.depth
            keep = kept_branches(evaluation.seed, batch.step, positions, depth, settings.drop_path).to(ranks.device)
        logits_BC, targets = engine(batch.images, keep), batch.labels if batch.targets is None else batch.targets
        return F.cross_entropy(logits_BC, targets, label_smoothing=settings.label_smoothing, reduction="none")

    def predict() -> np.ndarray:
        stretch = settings.stretch
        return answers(
            evaluation, test, lambda images: engine.module(images).argmax(1), words="testing", stretch=stretch
        )

    def look(loss: float) -> str:
        predicted = predict()
        return f"loss {loss:.3f}, test {100.0 * float((predicted == test.labels)[predicted >= 0].mean()):.1f}%"

    fit = Fit(name="finetune", evaluation=evaluation, batches=batches, engine=engine, losses=losses, settings=settings)
    last = fit.run(look)
    predicted = predict()
    ranks.together(lambda: _write(evaluation, last, engine.module) if ranks.first else None)
    fit.remove_checkpoints()
    read = predicted >= 0
    labels, predicted = test.labels[read], predicted[read]
    measure = accuracy("fine-tuned", predicted, labels, chance=commonest_share(labels), settings={})
    return Outcome(
        measures=[replace(measure, chosen=True)],
        predicted=predicted,
        labels=labels,
        facts={"train_images": len(evaluation.train), "batch_size": batches.global_batch_size, "weights": WEIGHTS},
    )


def _start(evaluation: Evaluation, settings: FinetuneSettings, batches: TrainingBatches) -> Any:
    """The engine of a classifier at the encoder's weights; the head at 0, so the first answers are all alike."""
    encoder = evaluation.encoder
    weights = {f"encoder.{name}": parameter.detach() for name, parameter in encoder.named_parameters()}

    def initial(name: str, shape: torch.Size) -> torch.Tensor:
        return weights[name].float() if name in weights else torch.zeros(shape)

    def build() -> nn.Module:
        model = Classifier(encoder, len(evaluation.train.names))
        recompute(model.encoder.blocks, settings.recompute_every)
        return model

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return layer_groups(model, encoder.size.depth, settings)

    return start_engine(batches, build, initial, groups, zero_stage=settings.zero_stage, whole=Block)


def _write(evaluation: Evaluation, last: Checkpoint, model: nn.Module) -> None:
    """encoder.* and head.*, fp32, to out/; what they are in the file's metadata, as JSON."""
    from safetensors.torch import save

    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
    encoder = evaluation.encoder
    weights = read_weights(last, shapes, "master") | {"encoder.pos_embed": encoder.pos_embed.float().cpu().contiguous()}
    facts = {
        "size": asdict(encoder.size),
        "patch_size": encoder.patch_embed.patch_size,
        "image_size": evaluation.image_size,
        "classes": evaluation.train.names,
        "encoder_sha256": evaluation.sha256,
    }
    evaluation.out.mkdir(parents=True, exist_ok=True)
    with written_whole(evaluation.out / WEIGHTS) as file:
        file.write(save(weights, {name: json.dumps(value) for name, value in facts.items()}))
