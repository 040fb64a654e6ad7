"""Reads checkpoints of the public I-JEPA reference (facebookresearch/ijepa)."""

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.positions import sincos_pos_embed
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VIT_SIZES, VisionTransformer
from ijepa_scale.objectives.ijepa import IJepa

Weights = dict[str, torch.Tensor]
PARTS = ("encoder", "predictor", "target_encoder")
PREFIX = "module."  # the reference saves its networks inside DistributedDataParallel
POS_EMBED_TOLERANCE = 1e-5  # between two ways to compute a sine in fp32


def load_reference_checkpoint(
    path: str | Path, *, heads: int | None = None, predictor_heads: int | None = None
) -> IJepa:
    """The three networks of a checkpoint in the public reference's layout, on the CPU, fp32.

    All sizes are read from the tensors but the number of heads, which no tensor shows. heads: the encoders'; None: as
    in the entry of VIT_SIZES with that width, depth and mlp_width. predictor_heads: None: as many as the encoders'.
    Raises ValueError unless the file holds every weight of the three networks, with its shape, and no other, and the
    position embeddings that we compute.
    """
    checkpoint = _read(Path(path))
    try:
        encoder, predictor, target_encoder = (_weights(checkpoint, part) for part in PARTS)
        num_patches = _shape(encoder, "pos_embed", 3)[1]
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(f"encoder.pos_embed has {num_patches} patches, which is no square grid")
        patch_size = _shape(encoder, "patch_embed.proj.weight", 4)[-1]
        width = _shape(encoder, "norm.weight", 1)[0]
        size = _encoder_size(width, *_depth_and_mlp_width(encoder, "blocks"), heads)
        predictor_width = _shape(predictor, "predictor_norm.weight", 1)[0]
        depth, mlp_width = _depth_and_mlp_width(predictor, "predictor_blocks")
        predictor_heads = size.heads if predictor_heads is None else predictor_heads
        predictor_size = ViTSize(width=predictor_width, depth=depth, heads=predictor_heads, mlp_width=mlp_width)
        with torch.device("meta"):  # every weight comes from the file: no memory, no random numbers before
            context, target = (
                VisionTransformer(size, image_size=side * patch_size, patch_size=patch_size) for _ in range(2)
            )
            model = IJepa(context, Predictor(predictor_size, encoder_width=width, grid=context.grid), target)
        _load(model.context_encoder, encoder, "encoder")
        _load(model.predictor, predictor, "predictor")
        _load(model.target_encoder, target_encoder, "target_encoder")
    except ValueError as error:
        raise ValueError(f"cannot load {path} as a checkpoint of the I-JEPA reference: {error}") from error
    return model


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no checkpoint file {path}")
    try:
        # mmap: the optimizer's moments, half of the file, are never read. Files of torch < 1.6 have no zip to map.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a damaged pickle raises has no common type
        reason = " ".join(str(error).split(".")[0].split()) or type(error).__name__
        raise ValueError(
            f"{path} is no whole file of torch.save() that holds tensors and plain values only: {reason}"
        ) from error
    missing = [part for part in PARTS if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(part), dict)]
    if missing:
        found = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} is no checkpoint of the I-JEPA reference: it has no weights under {', '.join(missing)}, "
            f"but holds {found or 'nothing'}"
        )
    return checkpoint


def _weights(checkpoint: dict[str, Any], part: str) -> Weights:
    """One network's tensors by their own names. Raises ValueError for what is no tensor or lacks the prefix."""
    for name, value in checkpoint[part].items():
        if not str(name).startswith(PREFIX):
            raise ValueError(f"{part} holds {name}, but the reference's names begin with {PREFIX}")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ValueError(f"{part}.{name} is no tensor of floating-point numbers")
    return {name.removeprefix(PREFIX): value for name, value in checkpoint[part].items()}


def _shape(weights: Weights, name: str, ndim: int) -> torch.Size:
    if name not in weights or weights[name].ndim != ndim:
        got = f"is {tuple(weights[name].shape)}" if name in weights else "is missing"
        raise ValueError(f"{name} {got}; it gives the network's size and has {ndim} dimensions")
    return weights[name].shape


def _depth_and_mlp_width(weights: Weights, blocks: str) -> tuple[int, int]:
    mlp_width = _shape(weights, f"{blocks}.0.mlp.fc1.weight", 2)[0]
    numbers = (re.match(rf"{blocks}\.(\d+)\.", name) for name in weights)
    return 1 + max(int(number[1]) for number in numbers if number), mlp_width


def _encoder_size(width: int, depth: int, mlp_width: int, heads: int | None) -> ViTSize:
    if heads is not None:
        return ViTSize(width=width, depth=depth, heads=heads, mlp_width=mlp_width)
    for size in VIT_SIZES.values():
        if (size.width, size.depth, size.mlp_width) == (width, depth, mlp_width):
            return size
    raise ValueError(
        f"no known size has width {width}, depth {depth} and mlp_width {mlp_width}, and weights do not show the number "
        "of heads; give heads"
    )


def _load(network: nn.Module, weights: Weights, part: str) -> None:
    """Put weights into a network on the meta device. Raises ValueError where names, shapes or positions differ."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    problems = [f"it lacks {part}.{name}" for name in expected if name not in weights]
    problems += [f"it has an unexpected {part}.{name}" for name in weights if name not in expected]
    problems += [
        f"{part}.{name} is {tuple(weights[name].shape)} and should be {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)
    for name in ("pos_embed", "predictor_pos_embed"):
        if name in expected:
            _check_pos_embed(weights[name], f"{part}.{name}")
    # Copies: the networks must outlive the file.
    network.load_state_dict({name: t.to(torch.float32, copy=True) for name, t in weights.items()}, assign=True)


def _check_pos_embed(stored_1ND: torch.Tensor, name: str) -> None:
    _, num_patches, width = stored_1ND.shape
    side = math.isqrt(num_patches)
    difference = (stored_1ND[0].double() - sincos_pos_embed(width, PatchGrid(side, side)).double()).abs().max().item()
    if not difference <= POS_EMBED_TOLERANCE:
        raise ValueError(
            f"{name} differs by up to {difference:.2g} from the fixed sine-cosine embedding "
            f"({POS_EMBED_TOLERANCE:.0e} is allowed)"
        )
