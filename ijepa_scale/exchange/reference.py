"""Reads checkpoints of the public I-JEPA reference (facebookresearch/ijepa)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ijepa_scale.exchange.networks import Loaded, Networks
from ijepa_scale.exchange.weights import (
    POS_EMBED_TOLERANCE,
    Weights,
    check_tensors,
    depth_and_mlp_width,
    digest,
    encoder_shape,
    fill,
    pos_embed_difference,
    read_pickle,
    shape_of,
)
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.ijepa import IJepa

PARTS = {"context": "encoder", "predictor": "predictor", "target": "target_encoder"}
PREFIX = "module."  # the reference saves its networks inside DistributedDataParallel


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
    context, predictor, target = (_network(Path(path), checkpoint, name, heads, predictor_heads) for name in PARTS)
    assert isinstance(context, VisionTransformer) and isinstance(target, VisionTransformer)
    assert isinstance(predictor, Predictor)
    return IJepa(context, predictor, target)


def networks(path: Path) -> Networks:
    """What load() gives of such a checkpoint: one network is read, the other two are not. Errors: as above, of it."""
    checkpoint = _read(path)

    def read(name: str) -> Loaded:
        network = _network(path, checkpoint, name, None, None)
        rows = encoder_shape(_weights(checkpoint, "encoder"), None)[1]
        return Loaded(network=network, name=name, image_size=rows, path=path, sha256=digest(network))

    return Networks(path=path, names=tuple(PARTS), read=read)


def is_reference(content: Any) -> bool:
    """Whether what a file holds is meant to be such a checkpoint; timm's may have an "encoder" too."""
    return isinstance(content, dict) and bool({"predictor", "target_encoder"} & content.keys())


def _network(
    path: Path, checkpoint: dict[str, Any], name: str, heads: int | None, predictor_heads: int | None
) -> nn.Module:
    try:
        encoder, weights = _weights(checkpoint, "encoder"), _weights(checkpoint, PARTS[name])
        size, image_size, patch_size = encoder_shape(encoder, heads)
        with torch.device("meta"):  # every weight comes from the file: no memory, no random numbers before
            network: nn.Module
            if name == "predictor":
                grid = PatchGrid.of_image(image_size, image_size, patch_size)
                network = Predictor(
                    _predictor_size(weights, size, predictor_heads), encoder_width=size.width, grid=grid
                )
            else:
                network = VisionTransformer(size, image_size=image_size, patch_size=patch_size)
        fill(network, weights, f"{PARTS[name]}.")
        position = "predictor_pos_embed" if name == "predictor" else "pos_embed"
        _check_pos_embed(network.get_buffer(position), f"{PARTS[name]}.{position}")
    except ValueError as error:
        raise ValueError(f"cannot load {path} as a checkpoint of the I-JEPA reference: {error}") from error
    return network


def _predictor_size(weights: Weights, encoder: ViTSize, heads: int | None) -> ViTSize:
    width = shape_of(weights, "predictor_norm.weight", 1)[0]
    depth, mlp_width = depth_and_mlp_width(weights, "predictor_blocks")
    return ViTSize(width=width, depth=depth, heads=encoder.heads if heads is None else heads, mlp_width=mlp_width)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no checkpoint file {path}")
    checkpoint = read_pickle(path)
    parts = PARTS.values()
    missing = [part for part in parts if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(part), dict)]
    if missing:
        found = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} is no checkpoint of the I-JEPA reference: it has no weights under {', '.join(missing)}, "
            f"but holds {found or 'nothing'}"
        )
    return checkpoint


def _weights(checkpoint: dict[str, Any], part: str) -> Weights:
    """One network's tensors by their own names. Raises ValueError for what is no tensor or lacks the prefix."""
    for name in checkpoint[part]:
        if not str(name).startswith(PREFIX):
            raise ValueError(f"{part} holds {name}, but the reference's names begin with {PREFIX}")
    check_tensors(checkpoint[part], f"{part}.")
    return {name.removeprefix(PREFIX): value for name, value in checkpoint[part].items()}


def _check_pos_embed(stored_1ND: torch.Tensor, name: str) -> None:
    difference = pos_embed_difference(stored_1ND)
    if not difference <= POS_EMBED_TOLERANCE:
        raise ValueError(
            f"{name} differs by up to {difference:.2g} from the fixed sine-cosine embedding "
            f"({POS_EMBED_TOLERANCE:.0e} is allowed)"
        )
