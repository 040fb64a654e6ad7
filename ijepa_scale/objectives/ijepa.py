"""The method: context encoder, target encoder, predictor and loss (I-JEPA, arXiv:2301.08243)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ijepa_kernels.ema import ema_update
from ijepa_kernels.target_loss import target_loss
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import check_feasible
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.blocks import Block, ViTSize, bytes_kept, count_recomputed, recompute
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.flops import Counts, StepFlops
from ijepa_scale.objectives.masks import BlockMasks
from ijepa_scale.objectives.objective import Expected, Shown, Total
from ijepa_scale.objectives.regularization import of_one_rank, variance_covariance

COLLAPSE_ADVICE = (  # the weights of configs/tiny.yaml
    "small runs need loss.variance=0.02 loss.covariance=0.004 (for 300 steps; longer runs, less): see "
    "docs/small_compute.md"
)


class IJepa(nn.Module):
    """Two encoders and the predictor. The target encoder is frozen: it moves only by the EMA."""

    def __init__(
        self,
        context_encoder: VisionTransformer,
        predictor: Predictor,
        target_encoder: VisionTransformer,
        *,
        loss_kind: str = "smooth_l1",
        variance: float = 0.0,
        covariance: float = 0.0,
        total: Callable[[torch.Tensor], torch.Tensor] = of_one_rank,  # a function by name: models are pickled
    ):
        """variance, covariance: weights of the terms against collapse, taken over the images of one forward.

        total: this rank's tensor -> the sum of all ranks', with gradients; then they are over the images of all ranks.
        """
        super().__init__()
        self.context_encoder = context_encoder
        self.predictor = predictor
        self.target_encoder = target_encoder.requires_grad_(False)
        self.loss_kind = loss_kind
        self.variance, self.covariance, self.total = variance, covariance, total

    def forward(self, images_BCHW: torch.Tensor, masks: Masks) -> dict[str, torch.Tensor]:
        """images_BCHW: (B, 3, H, W) uint8. Returns scalars: "loss", to be minimized, averaged over all target tokens.

        If the weight of the variance or the covariance term is not 0 (C-JEPA, arXiv:2410.19560, adds them to I-JEPA;
        here they are on the context encoder's tokens), also the loss's parts "prediction", "variance" and "covariance",
        before their weights and without gradients.
        """
        context_TD = self.context_encoder(images_BCHW, masks.context)
        with torch.no_grad():  # second: meanwhile other ranks' parts of its weights come in (engine/ema.py)
            target_UD = self.target_encoder(images_BCHW, rows_K=masks.target_patches_U)
        pred_TD = self.predictor(context_TD, masks)
        prediction = target_loss(pred_TD, target_UD, masks.target_index_T, self.loss_kind)
        if not (self.variance or self.covariance):
            return {"loss": prediction}
        patches_T = masks.context.indices_T % masks.num_patches
        variance, covariance = variance_covariance(context_TD, patches_T, masks.num_patches, self.total)
        loss = prediction + self.variance * variance + self.covariance * covariance
        terms = {"prediction": prediction, "variance": variance, "covariance": covariance}
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def update_target(self, momentum: float) -> None:
        """One EMA step of the target encoder, for fp32 networks held whole; under ZeRO: engine.ema.ShardedEMA."""
        for source, target in self.twins():
            ema_update(target, source.detach(), momentum)

    def twins(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs of a context encoder parameter and the target encoder's that averages it."""
        yield from zip(self.context_encoder.parameters(), self.target_encoder.parameters(), strict=True)


@dataclass(frozen=True, kw_only=True)
class IJepaObjective:
    """I-JEPA as one of the objectives; objective.py says what each answer is.

    encoder, predictor: sizes of the networks. image_size, patch_size: pixels. loss_kind: smooth_l1 or l2. variance,
    covariance: weights of the terms against collapse. recompute_every: every which block of the context encoder and of
    the predictor is computed again in the backward; 0: none. compiled: whether blocks run through torch.compile.
    """

    encoder: ViTSize
    predictor: ViTSize
    image_size: int
    patch_size: int
    draw_masks: BlockMasks
    loss_kind: str = "smooth_l1"
    variance: float = 0.0
    covariance: float = 0.0
    recompute_every: tuple[int, int] = (0, 0)
    compiled: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        return "ijepa"

    def attention_heads(self) -> dict[str, tuple[int, int]]:
        sizes = {"encoder": self.encoder, "predictor": self.predictor}
        return {network: (size.heads, size.width // size.heads) for network, size in sizes.items()}

    @property
    def grid(self) -> PatchGrid:
        return self.draw_masks.blocks.grid

    @property
    def flops(self) -> StepFlops:
        encoder_every, predictor_every = self.recompute_every
        return StepFlops(
            encoder=self.encoder,
            predictor=self.predictor,
            patch_size=self.patch_size,
            num_patches=self.grid.num_patches,
            recomputed_encoder_blocks=count_recomputed(self.encoder.depth, encoder_every),
            recomputed_predictor_blocks=count_recomputed(self.predictor.depth, predictor_every),
            compiled=self.compiled,
        )

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> IJepa:
        of_encoder, of_predictor = ((attend or {}).get(network) for network in ("encoder", "predictor"))
        context_encoder, target_encoder = (
            VisionTransformer(self.encoder, image_size=self.image_size, patch_size=self.patch_size, attend=kernel)
            for kernel in (of_encoder, None)  # the target encoder sees whole images, for which there is PyTorch's own
        )
        predictor = Predictor(self.predictor, encoder_width=self.encoder.width, grid=self.grid, attend=of_predictor)
        encoder_every, predictor_every = self.recompute_every
        recompute(context_encoder.blocks, encoder_every)
        recompute(predictor.predictor_blocks, predictor_every)
        module = IJepa(
            context_encoder,
            predictor,
            target_encoder,
            loss_kind=self.loss_kind,
            variance=self.variance,
            covariance=self.covariance,
            total=total or of_one_rank,
        )
        for block in module.modules():
            if isinstance(block, Block):
                block.compiled = self.compiled
        return module

    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: module.get_submodule(name) for name in ("context_encoder", "predictor")}

    def averaged(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        assert isinstance(module, IJepa)
        return module.twins()

    def initial_weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The target encoder starts as the context encoder."""
        return initial_weight(name.replace("target_encoder.", "context_encoder."), shape, self.seed)

    def encoders(self, module: nn.Module) -> dict[str, VisionTransformer]:
        assert isinstance(module, IJepa)
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
        number = self.draw_masks.blocks.num_target_blocks
        encoder_every, predictor_every = self.recompute_every
        return Expected(
            tokens=f"target encoder {self.grid.num_patches}, context {means.context:.1f} "
            f"(mask.context={self.draw_masks.context}), {number} target blocks of {means.blocks / number:.1f}, "
            f"predictor {number} x {means.prediction / number:.1f}",
            flops=self.flops.parts(means),
            kept_bytes={
                "context encoder": means.context * bytes_kept(self.encoder, encoder_every, itemsize=2),
                "predictor": means.prediction * bytes_kept(self.predictor, predictor_every, itemsize=2),
            },
        )

    def shown(self, masks: Masks) -> list[Shown]:
        seen, hidden = masks.context.patches(masks.num_patches), masks.target_blocks.patches(masks.num_patches)
        each = len(hidden) // len(seen)
        return [Shown(part, hidden[i * each : (i + 1) * each]) for i, part in enumerate(seen)]

    def architecture(self) -> dict[str, int]:
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
        }

    def batch_facts(self) -> tuple[str, ...]:
        statistics = bool(self.variance or self.covariance)
        return ("micro_batch_size",) * (self.draw_masks.context == "batch_min") + ("images_in_statistics",) * statistics

    def advice(self) -> str:
        return COLLAPSE_ADVICE

    def check(self) -> None:
        check_feasible(self.draw_masks.blocks)

    def check_micro_step(self, images: int) -> None:
        if (self.variance or self.covariance) and images < 2:
            raise ValueError(
                "loss.variance and loss.covariance compare the images of a micro-step, and it has 1; "
                "use a larger optimization.micro_batch_size, or more ranks, or set both to 0"
            )
