"""The method: context encoder, target encoder, predictor and loss (I-JEPA, arXiv:2301.08243)."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from ijepa_kernels.ema import ema_update
from ijepa_kernels.target_loss import target_loss
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.regularization import of_one_rank, variance_covariance


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
        with torch.no_grad():
            target_UD = self.target_encoder(images_BCHW, rows_K=masks.target_patches_U)
        context_TD = self.context_encoder(images_BCHW, masks.context)
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
