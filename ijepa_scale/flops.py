"""FLOPs of a training step, from sizes and token counts on the host, and the most that a device can do.

Counted are matrix products and attention, two FLOPs a multiply-add; left out are pointwise operations, the optimizer,
the EMA and the terms against collapse.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.vit import ViTSize

# Most TFLOP/s in (bf16, tf32, fp32) by torch's name of the device: dense, as published, bf16 accumulated in fp32. Not
# listed are names that stand for several devices; parts of a device (MIG) have names of their own and match none.
PEAKS = {
    # A100 data sheet
    r"A100-(SXM4-[48]0GB|PCIE-40GB)|A100 80GB PCIe": (312.0, 156.0, 19.5),
    # H100 architecture white paper, table 2; H100 and H200 data sheets, whose tensor figures are with sparsity
    r"H100 80GB HBM3|H200|GH200 (480GB|120GB|144G HBM3e)": (989.4, 494.7, 66.9),
    r"H100 PCIe": (756.0, 378.0, 51.2),
    r"H100 NVL|H200 NVL": (835.5, 417.5, 60.0),
    # HGX B200 data sheet, an eighth of its figures; GB200 NVL72's, a 72nd of them
    r"B200": (2250.0, 1125.0, 75.0),
    r"GB200": (2500.0, 1250.0, 80.0),
    # L40S, L4 and A10 data sheets
    r"L40S": (362.0, 183.0, 91.6),
    r"L4": (121.0, 60.0, 30.3),
    r"A10": (125.0, 62.5, 31.2),
    # white papers of GA102, Ada (GeForce and professional) and RTX Blackwell
    r"GeForce RTX 3090": (71.0, 35.6, 35.6),
    r"RTX A6000": (154.8, 77.4, 38.7),
    r"GeForce RTX 4090": (165.2, 82.6, 82.6),
    r"RTX 6000 Ada Generation": (364.2, 182.1, 91.1),
    r"GeForce RTX 5090": (209.5, 104.8, 104.8),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """The most FLOP/s of a device in precision bf16, tf32 or fp32, dense; None where the device is not in the table."""
    for names, rates in PEAKS.items():
        if re.fullmatch(f"(NVIDIA )?({names})", device_name):
            return 1e12 * dict(zip(("bf16", "tf32", "fp32"), rates, strict=True))[precision]
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """The same of a device of this machine, at the training precision bf16 or fp32. None on a CPU."""
    if device.type != "cuda":
        return None
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), "tf32" if tf32 else precision)


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


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """The FLOPs of forward and backward, as a function of the tokens.

    recomputed_encoder_blocks, recomputed_predictor_blocks: how many of the context encoder's and of the predictor's
    blocks run their forward once more in the backward (activation checkpointing): up to what the backward needs last,
    the input of the MLP's second layer, or, compiled, to its end.
    """

    encoder: ViTSize
    predictor: ViTSize
    patch_size: int
    num_patches: int
    recomputed_encoder_blocks: int = 0
    recomputed_predictor_blocks: int = 0
    compiled: bool = False

    def parts(self, counts: Counts) -> dict[str, float]:
        """What the method needs, by network: no recomputation, no padding; of the target encoder the forward alone."""
        encoder, predictor, whole = self.encoder, self.predictor, counts.images * self.num_patches
        embed = 2 * 3 * self.patch_size**2 * encoder.width
        projections = 2 * encoder.width * predictor.width * (counts.context + counts.blocks)
        dropped = counts.prediction - counts.blocks
        # Backward costs twice the forward, less the patch embedding's gradient with respect to the pixels.
        return {
            "target encoder": embed * whole
            + _forward(encoder, encoder.depth, whole, whole * self.num_patches, whole - counts.targets),
            "context encoder": 2 * embed * counts.context
            + 3 * _forward(encoder, encoder.depth, counts.context, counts.context_pairs),
            "predictor": 3
            * (_forward(predictor, predictor.depth, counts.prediction, counts.prediction_pairs, dropped) + projections),
        }

    def model(self, counts: Counts) -> float:
        """What MFU counts."""
        return sum(self.parts(counts).values())

    def hardware(self, counts: Counts) -> float:
        """What HFU counts: the same, what is computed again, and attention's scores in its backward, always again."""
        encoder, predictor = self.encoder, self.predictor
        last_too = self.recomputed_predictor_blocks == predictor.depth
        dropped = (counts.prediction - counts.blocks) * last_too
        return (
            self.model(counts)
            + 2 * encoder.depth * encoder.width * counts.context_pairs
            + 2 * predictor.depth * predictor.width * counts.prediction_pairs
            + self._again(encoder, self.recomputed_encoder_blocks, counts.context, counts.context_pairs, 0.0)
            + self._again(
                predictor, self.recomputed_predictor_blocks, counts.prediction, counts.prediction_pairs, dropped
            )
        )

    def _again(self, size: ViTSize, depth: int, tokens: float, pairs: float, dropped: float) -> float:
        unneeded = 0 if self.compiled else 2 * size.width * size.mlp_width * (depth * tokens - dropped)
        return _forward(size, depth, tokens, pairs, dropped) - unneeded


def _forward(size: ViTSize, depth: int, tokens: float, pairs: float, dropped: float = 0.0) -> float:
    """Of tokens through blocks. dropped: tokens that leave after the attention of the last one."""
    after = 2 * size.width**2 + 4 * size.width * size.mlp_width
    return depth * ((6 * size.width**2 + after) * tokens + 4 * size.width * pairs) - after * dropped


def rates(*, model: float, hardware: float, seconds: float, devices: int, peak: float | None) -> dict[str, Any]:
    """A step's keys of a record. model, hardware: FLOPs of all devices. peak: of one, in FLOP/s; None: not known.

    mfu and hfu are shares of the peak, and only there where it is known.
    """
    keys = {"model_flops": model, "flops_per_second_per_device": model / seconds / devices}
    if peak:
        keys |= {"mfu": model / seconds / devices / peak, "hfu": hardware / seconds / devices / peak}
    return keys
