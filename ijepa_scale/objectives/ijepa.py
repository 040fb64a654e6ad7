"""The method: context encoder, target encoder, predictor and loss (I-JEPA, arXiv:2301.08243)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ijepa_kernels.target_loss import target_loss
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import check_feasible
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.attention import Attend
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.encoder_pair import EncoderPair, PairObjective
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.masks import BlockMasks
from ijepa_scale.objectives.objective import Total
from ijepa_scale.objectives.regularization import of_one_rank, variance_covariance

COLLAPSE_ADVICE = (  # the weights of configs/tiny.yaml
    "small runs need loss.variance=0.02 loss.covariance=0.004 (for 300 steps; longer runs, less): see "
    "docs/small_compute.md"
)


class IJepa(EncoderPair):
    """The target encoder's output at the target blocks is predicted."""

    def __init__(
        self,
        context_encoder: VisionTransformer,
        predictor: Predictor,
        target_encoder: VisionTransformer,
        *,
        loss_kind: str = "smooth_l1",
        variance: float = 0.0,
        covariance: float = 0.0,
        target_layers: Sequence[int] = (),
        total: Callable[[torch.Tensor], torch.Tensor] = of_one_rank,  # a function by name: models are pickled
    ):
        """variance, covariance: weights of the terms against collapse, taken over the images of one forward.

        target_layers: blocks of the target encoder whose outputs are predicted, from 1 up, ascending; (): the last.
        total: this rank's tensor -> the sum of all ranks', with gradients; then they are over the images of all ranks.
        """
        super().__init__(context_encoder, predictor, target_encoder)
        self.loss_kind = loss_kind
        self.variance, self.covariance, self.total = variance, covariance, total
        self.target_layers = tuple(target_layers) or (len(target_encoder.blocks),)

    def forward(self, images_BCHW: torch.Tensor, masks: Masks) -> dict[str, torch.Tensor]:
        """images_BCHW: (B, 3, H, W) uint8. Returns scalars: "loss", to be minimized, averaged over all target tokens,
        and with several target layers over these (Bootleg, arXiv:2603.15553).

        If the weight of the variance or the covariance term is not 0 (C-JEPA, arXiv:2410.19560, adds them to I-JEPA;
        here they are on the context encoder's tokens), also the loss's parts "prediction", "variance" and "covariance",
        before their weights and without gradients.
        """
        context_TD = self.context_encoder(images_BCHW, masks.context)
        # Second: meanwhile other ranks' parts of the target encoder's weights come in (engine/ema.py).
        targets = self.targets(images_BCHW, masks.target_patches_U)
        pred_TF = self.predictor(context_TD, masks)
        prediction = target_loss(pred_TF, targets, masks.target_index_T, self.loss_kind)
        if not (self.variance or self.covariance):
            return {"loss": prediction}
        patches_T = masks.context.indices_T % masks.num_patches
        variance, covariance = variance_covariance(context_TD, patches_T, masks.num_patches, self.total)
        loss = prediction + self.variance * variance + self.covariance * covariance
        terms = {"prediction": prediction, "variance": variance, "covariance": covariance}
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def targets(self, images_BCHW: torch.Tensor, rows_K: torch.Tensor) -> list[torch.Tensor]:
        """What is predicted, of each of the target layers (K, D), before the loss normalizes each of these apart.

        rows_K: (K,) integers, ascending, image * num_patches + patch.
        """
        targets = self.target_encoder(images_BCHW, rows_K=rows_K, layers=self.target_layers)
        if self.target_layers[-1] == len(self.target_encoder.blocks):
            # Its weights are fitted to the last output: others are left to the loss.
            targets[-1] = self.target_encoder.norm(targets[-1])
        return targets


@dataclass(frozen=True, kw_only=True)
class IJepaObjective(PairObjective):
    """I-JEPA as one of the objectives.

    variance, covariance: weights of the terms against collapse. target_layers: as of IJepa.
    """

    draw_masks: BlockMasks
    variance: float = 0.0
    covariance: float = 0.0
    target_layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return "ijepa"

    @property
    def grid(self) -> PatchGrid:
        return self.draw_masks.blocks.grid

    @property
    def layers(self) -> tuple[int, ...]:
        return self.target_layers or (self.encoder.depth,)

    @property
    def out_width(self) -> int:
        """Of each of the layers as wide as the encoder."""
        return len(self.layers) * self.encoder.width

    def build(self, *, attend: Mapping[str, Attend | None] | None = None, total: Total | None = None) -> IJepa:
        return IJepa(
            *self.networks(attend),
            loss_kind=self.loss_kind,
            variance=self.variance,
            covariance=self.covariance,
            target_layers=self.layers,
            total=total or of_one_rank,
        )

    def tokens_in_words(self, means: Counts) -> str:
        number = self.draw_masks.blocks.num_target_blocks
        return (
            f"target encoder {self.grid.num_patches}, context {means.context:.1f} "
            f"(mask.context={self.draw_masks.context}), {number} target blocks of {means.blocks / number:.1f}, "
            f"predictor {number} x {means.prediction / number:.1f}"
        )

    def kept_by_terms(self, means: Counts) -> dict[str, float]:
        """The context's tokens in fp32, less their means."""
        return {"terms": 4 * means.context * self.encoder.width} if self.variance or self.covariance else {}

    def batch_facts(self) -> tuple[str, ...]:
        statistics = bool(self.variance or self.covariance)
        return ("micro_batch_size",) * (self.draw_masks.context == "batch_min") + ("images_in_statistics",) * statistics

    def advice(self) -> str:
        return COLLAPSE_ADVICE

    def check(self) -> None:
        check_feasible(self.draw_masks.blocks)
        if self.layers[-1] > self.encoder.depth:
            raise ValueError(
                f"loss.target_layers names block {self.layers[-1]}, and the encoder has {self.encoder.depth}; use "
                f"numbers from 1 to {self.encoder.depth}, or a model.depth of {self.layers[-1]} or more"
            )

    def check_micro_step(self, images: int) -> None:
        if (self.variance or self.covariance) and images < 2:
            raise ValueError(
                "loss.variance and loss.covariance compare the images of a micro-step, and it has 1; "
                "use a larger optimization.micro_batch_size, or more ranks, or set both to 0"
            )
