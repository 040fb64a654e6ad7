"""Sections of objectives beside I-JEPA, one each."""

import os
from dataclasses import dataclass

from ijepa_scale.config import ranges
from ijepa_scale.config.ranges import NO_LIMIT, check_choice, check_ranges

FIXED_TARGETS = ("mae", "cae", "sketch")  # objectives of pixels, without an EMA: a loss that rises is no good sign


@dataclass(frozen=True, kw_only=True)
class Data2VecConfig:  # defaults: of the released ViT-B of arXiv:2212.07525
    mask_ratio: float = 0.8  # hidden patches / all
    block_side: int = 3  # patches; of the squares that stay visible; 1: random masks
    masks_an_image: int = 16  # which one pass of the target encoder answers
    top_layers: int = 10  # of the target encoder's last blocks, whose mean is the target
    loss: str = "l2"  # l2 (as 2212.07525) | smooth_l1 (as 2202.03555; here with a beta of 1)

    def __post_init__(self) -> None:
        _check_ratio("data2vec", self.mask_ratio)
        check_ranges(
            "data2vec",
            self,
            block_side=(1, ranges.PIXELS),
            masks_an_image=(1, ranges.BLOCKS),
            top_layers=(1, ranges.DEPTH),
        )
        check_choice("data2vec", self, loss=("smooth_l1", "l2"))


@dataclass(frozen=True, kw_only=True)
class MaeConfig:
    mask_ratio: float = 0.75  # hidden patches / all
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def __post_init__(self) -> None:
        _check_ratio("mae", self.mask_ratio)
        check_ranges(
            "mae",
            self,
            decoder_width=(1, ranges.WIDTH),
            decoder_depth=(1, ranges.DEPTH),
            decoder_heads=(1, ranges.WIDTH),
        )


@dataclass(frozen=True, kw_only=True)
class CaeConfig:
    mask_ratio: float = 0.5  # hidden patches / all
    regressor_depth: int = 4  # blocks as wide as the encoder's, likewise the next
    decoder_depth: int = 4
    alignment: float = 2.0  # weight of the loss against what the encoder makes of hidden patches

    def __post_init__(self) -> None:
        _check_ratio("cae", self.mask_ratio)
        check_ranges(
            "cae",
            self,
            regressor_depth=(1, ranges.DEPTH),
            decoder_depth=(1, ranges.DEPTH),
            alignment=(0, NO_LIMIT),
        )


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    # Whose networks are looked at: whatever exchange.load() reads. They are frozen, and model.*, predictor.* and
    # loss.target_layers must be theirs: launch/train_sketch.py sets them
    checkpoint: str = ""
    kind: str = (
        "decoder"  # decoder (features of all patches -> pixels) | flow (pixels that fit features of a box alone)
    )
    condition: str = "tokens"  # of a flow, of the box: tokens (of each patch) | mean (over it, as the paper's sketches)
    width: int = 512
    depth: int = 8
    heads: int = 8
    # On true features, normalized to a root mean square of 1: of each image a share drawn as |normal| times this
    # (arXiv:2510.11690, section 4.3), so that a decoder bears the errors of predicted ones
    noise: float = 0.4
    perceptual: float = (
        1.0  # of a decoder: weight of the difference in the frozen encoder's own features; 0: pixels alone
    )
    box_scale: tuple[float, float] = (0.15, 0.2)  # of a flow: area of the box whose features are known / of the image

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint", os.path.expanduser(self.checkpoint))
        check_choice("sketch", self, kind=("decoder", "flow"), condition=("tokens", "mean"))
        check_ranges(
            "sketch",
            self,
            width=(1, ranges.WIDTH),
            depth=(1, ranges.DEPTH),
            heads=(1, ranges.WIDTH),
            noise=(0, NO_LIMIT),
            perceptual=(0, NO_LIMIT),
        )
        low, high = self.box_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"sketch.box_scale must satisfy 0 < low <= high <= 1, got {[low, high]}")


def _check_ratio(name: str, ratio: float) -> None:
    """ValueError for a mask_ratio that hides none or all."""
    if not 0.0 < ratio < 1.0:
        raise ValueError(
            f"{name}.mask_ratio must lie between 0 and 1, so that some patches are hidden and some seen, got {ratio}"
        )
