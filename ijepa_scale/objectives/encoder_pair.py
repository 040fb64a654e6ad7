"""Objectives that predict what a target encoder puts out: what I-JEPA and data2vec have in common.

The context encoder sees some patches, and the predictor tells from these what the target encoder, its EMA, makes of
others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ijepa_kernels.ema import ema_update
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.blocks import ViTSize, bytes_kept_in_all, count_recomputed, recompute, set_compiled
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.flops import Counts, StepFlops
from ijepa_scale.objectives.objective import Expected, Shown


class EncoderPair(nn.Module):
    """Two encoders and the predictor. The target encoder is frozen: it moves only by the EMA."""

    def __init__(self, context_encoder: VisionTransformer, predictor: Predictor, target_encoder: VisionTransformer):
        super().__init__()
        self.context_encoder = context_encoder
        self.predictor = predictor
        self.target_encoder = target_encoder.requires_grad_(False)

    def update_target(self, momentum: float) -> None:
        """One EMA step of the target encoder, for fp32 networks held whole; under ZeRO: engine.ema.ShardedEMA."""
        for source, target in self.twins():
            ema_update(target, source.detach(), momentum)

    def twins(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs of a context encoder parameter and the target encoder's that averages it."""
        yield from zip(self.context_encoder.parameters(), self.target_encoder.parameters(), strict=True)


@dataclass(frozen=True, kw_only=True)
class PairObjective(ABC):
    """What these objectives answer alike; objective.py says what each answer is.

    encoder, predictor: sizes of the networks. image_size, patch_size: pixels. loss_kind: smooth_l1 or l2.
    recompute_every: every which block of the context encoder and of the predictor is computed again in the backward; 0:
    none. compiled: whether blocks run through torch.compile.
    """

    encoder: ViTSize
    predictor: ViTSize
    image_size: int
    patch_size: int
    draw_masks: Callable[[int, range], Masks]
    loss_kind: str = "smooth_l1"
    recompute_every: tuple[int, int] = (0, 0)
    compiled: bool = False
    seed: int = 0

    @property
    @abstractmethod
    def grid(self) -> PatchGrid: ...

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Blocks of the target encoder that targets are made of, counted from 1, ascending."""

    @property
    @abstractmethod
    def out_width(self) -> int:
        """Columns of a prediction."""

    @abstractmethod
    def tokens_in_words(self, means: Counts) -> str:
        """What expected() says of an image's tokens."""

    def attention_heads(self) -> dict[str, tuple[int, int]]:
        sizes = {"encoder": self.encoder, "predictor": self.predictor}
        return {network: (size.heads, size.width // size.heads) for network, size in sizes.items()}

    @property
    def flops(self) -> StepFlops:
        encoder_every, predictor_every = self.recompute_every
        return StepFlops(
            encoder=self.encoder,
            predictor=self.predictor,
            patch_size=self.patch_size,
            num_patches=self.grid.num_patches,
            target_depth=self.layers[-1],
            out_width=self.out_width,
            recomputed_encoder_blocks=count_recomputed(self.encoder.depth, encoder_every),
            recomputed_predictor_blocks=count_recomputed(self.predictor.depth, predictor_every),
            compiled=self.compiled,
        )

    def networks(
        self, attend: Mapping[str, Attend | None] | None
    ) -> tuple[VisionTransformer, Predictor, VisionTransformer]:
        """Context encoder, predictor and target encoder, as they run; their weights are not drawn yet."""
        of_encoder, of_predictor = ((attend or {}).get(network) for network in ("encoder", "predictor"))
        context_encoder, target_encoder = (
            VisionTransformer(self.encoder, image_size=self.image_size, patch_size=self.patch_size, attend=kernel)
            for kernel in (of_encoder, None)  # the target encoder sees whole images, for which there is PyTorch's own
        )
        predictor = Predictor(
            self.predictor,
            encoder_width=self.encoder.width,
            out_width=self.out_width,
            grid=self.grid,
            attend=of_predictor,
        )
        encoder_every, predictor_every = self.recompute_every
        recompute(context_encoder.blocks, encoder_every)
        recompute(predictor.predictor_blocks, predictor_every)
        for network in (context_encoder, predictor, target_encoder):
            set_compiled(network, self.compiled)
        return context_encoder, predictor, target_encoder

    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: module.get_submodule(name) for name in ("context_encoder", "predictor")}

    def averaged(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        assert isinstance(module, EncoderPair)
        return module.twins()

    def initial_weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The target encoder starts as the context encoder."""
        return initial_weight(name.replace("target_encoder.", "context_encoder."), shape, self.seed)

    def encoders(self, module: nn.Module) -> dict[str, VisionTransformer]:
        assert isinstance(module, EncoderPair)
        return {"target": module.target_encoder, "context": module.context_encoder}

    def done(self, masks: Masks) -> dict[str, float]:
        counts = Counts.of(masks)
        return {
            "model_flops": self.flops.model(counts),
            "hardware_flops": self.flops.hardware(counts),
            "context_tokens": masks.context.num_tokens,
            "target_tokens": masks.target_blocks.num_tokens,
        }

    def expected(self, masks: Sequence[Masks]) -> Expected:
        means = Counts.mean([Counts.of(one) for one in masks])
        encoder_every, predictor_every = self.recompute_every
        return Expected(
            tokens=self.tokens_in_words(means),
            flops=self.flops.parts(means),
            kept_bytes={
                "context encoder": 2 * 3 * self.patch_size**2 * means.context  # pixels
                + bytes_kept_in_all(self.encoder, encoder_every, itemsize=2, tokens=means.context),
                "predictor": bytes_kept_in_all(
                    self.predictor, predictor_every, itemsize=2, tokens=means.prediction, rows=means.blocks
                ),
                "loss": 2 * means.blocks * self.out_width,  # the gradient of the predictions, which its forward makes
                **self.kept_by_terms(means),
            },
        )

    def kept_by_terms(self, means: Counts) -> dict[str, float]:
        """Bytes that terms of the loss besides its predictions keep."""
        return {}

    def shown(self, masks: Masks) -> list[Shown]:
        """Of an image with several masks the first."""
        seen, hidden = masks.context.patches(masks.num_patches), masks.target_blocks.patches(masks.num_patches)
        each, step = len(hidden) // len(seen), masks.masks_an_image
        return [Shown(seen[i], hidden[i * each : (i + 1) * each]) for i in range(0, len(seen), step)]

    def architecture(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "width": self.encoder.width,
            "depth": self.encoder.depth,
            "heads": self.encoder.heads,
            "mlp_width": self.encoder.mlp_width,
            "predictor_width": self.predictor.width,
            "predictor_depth": self.predictor.depth,
            "predictor_heads": self.predictor.heads,
            "target_layers": list(self.layers),
        }
