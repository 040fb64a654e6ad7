"""FLOPs of I-JEPA's training step, from sizes and token counts on the host.

Counted are matrix products and attention, two FLOPs a multiply-add; left out are pointwise operations, the optimizer,
the EMA and the terms against collapse.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.blocks import ViTSize


@dataclass(frozen=True)
class Counts:
    """Tokens of some images, summed, or their means an image. Pairs are squared lengths of sequences, summed likewise:
    what the cost of attention grows with."""

    images: float
    targets: float  # patches that some target block holds: of those alone the target encoder's output is used
    context: float
    context_pairs: float
    blocks: float  # tokens of all target blocks
    prediction: float  # tokens in the predictor: for each target block its own and the image's context
    prediction_pairs: float

    @classmethod
    def of(cls, masks: Masks) -> "Counts":
        """Of one micro-batch. From integers that lie on the host: no device is waited for."""
        return cls(
            images=masks.num_images,
            targets=masks.target_patches_U.shape[0],
            context=masks.context.num_tokens,
            context_pairs=masks.context.num_pairs,
            blocks=masks.target_blocks.num_tokens,
            prediction=masks.prediction.num_tokens,
            prediction_pairs=masks.prediction.num_pairs,
        )

    @classmethod
    def mean(cls, counts: Sequence["Counts"]) -> "Counts":
        """Means an image over micro-batches."""
        images = sum(one.images for one in counts)
        return cls(*(sum(values) / images for values in zip(*map(astuple, counts), strict=True)))

    def times(self, images: float) -> "Counts":
        """Of so many images, where these are means an image."""
        return Counts(*(images * value for value in astuple(self)))


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """The FLOPs of forward and backward, as a function of the tokens.

    target_depth: blocks of the target encoder that run. out_width: of a prediction.
    recomputed_encoder_blocks, recomputed_predictor_blocks: how many of the context encoder's and of the predictor's
    blocks run their forward once more in the backward (activation checkpointing): up to what the backward needs last,
    the input of the MLP's second layer, or, compiled, to its end.
    """

    encoder: ViTSize
    predictor: ViTSize
    patch_size: int
    num_patches: int
    target_depth: int
    out_width: int
    recomputed_encoder_blocks: int = 0
    recomputed_predictor_blocks: int = 0
    compiled: bool = False

    def parts(self, counts: Counts) -> dict[str, float]:
        """What the method needs, by network: no recomputation, no padding; of the target encoder the forward alone."""
        encoder, predictor, whole = self.encoder, self.predictor, counts.images * self.num_patches
        embed = 2 * 3 * self.patch_size**2 * encoder.width
        projections = 2 * predictor.width * (encoder.width * counts.context + self.out_width * counts.blocks)
        dropped = counts.prediction - counts.blocks
        # Backward costs twice the forward, less the patch embedding's gradient with respect to the pixels.
        return {
            "target encoder": embed * whole
            + forward(encoder, self.target_depth, whole, whole * self.num_patches, whole - counts.targets),
            "context encoder": 2 * embed * counts.context
            + 3 * forward(encoder, encoder.depth, counts.context, counts.context_pairs),
            "predictor": 3
            * (forward(predictor, predictor.depth, counts.prediction, counts.prediction_pairs, dropped) + projections),
        }

    def model(self, counts: Counts) -> float:
        """What MFU counts."""
        return sum(self.parts(counts).values())

    def hardware(self, counts: Counts) -> float:
        """What HFU counts: the same, what is computed again, and attention's scores in its backward, always again."""
        encoder, predictor = self.encoder, self.predictor
        last_too = self.recomputed_predictor_blocks == predictor.depth
        dropped = (counts.prediction - counts.blocks) * last_too
        encoded, predicted = self.recomputed_encoder_blocks, self.recomputed_predictor_blocks
        return (
            self.model(counts)
            + scores(encoder, counts.context_pairs)
            + scores(predictor, counts.prediction_pairs)
            + again(encoder, encoded, counts.context, counts.context_pairs, 0.0, self.compiled)
            + again(predictor, predicted, counts.prediction, counts.prediction_pairs, dropped, self.compiled)
        )


def scores(size: ViTSize, pairs: float) -> float:
    """Attention's scores, which its backward computes again."""
    return 2 * size.depth * size.width * pairs


def again(size: ViTSize, depth: int, tokens: float, pairs: float, dropped: float, compiled: bool) -> float:
    """So many blocks' forward, as far as activation checkpointing runs it again. dropped: 0 but for the last block."""
    unneeded = 0 if compiled else 2 * size.width * size.mlp_width * (depth * tokens - dropped)
    return forward(size, depth, tokens, pairs, dropped) - unneeded


def forward(size: ViTSize, depth: int, tokens: float, pairs: float, dropped: float = 0.0) -> float:
    """Tokens through so many blocks. dropped: tokens that leave after the attention of the last one."""
    after = 2 * size.width**2 + 4 * size.width * size.mlp_width
    return depth * ((6 * size.width**2 + after) * tokens + 4 * size.width * pairs) - after * dropped
