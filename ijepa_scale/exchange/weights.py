"""Tensors of a file, and networks of the sizes that they show. Used by the reader of every format but runs."""

import argparse
import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.blocks import NORM_EPS, ViTSize
from ijepa_scale.models.positions import sincos_pos_embed
from ijepa_scale.models.vit import VIT_SIZES, VisionTransformer

Weights = dict[str, torch.Tensor]
Module = TypeVar("Module", bound=nn.Module)
POS_EMBED_TOLERANCE = 1e-5  # between two ways to compute a sine in fp32
OURS = re.compile(
    r"pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
)
LISTED = 8  # tensors that do not fit, by name; of a block's they are repeated in every block
MOST_NORM_EPS = 1e-5  # another than ours moves features in proportion; from here on they are another model's


def read_pickle(path: Path) -> Any:
    """What torch.save() wrote, on the CPU. ValueError for a damaged file and for one that would run code."""
    try:
        # mmap: what is not asked for, as an optimizer's moments, is never read. Files of torch < 1.6 have no zip to
        # map. Training scripts save their arguments as a Namespace, which is a bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a damaged pickle raises has no common type
        reason = " ".join(str(error).split(".")[0].split()) or type(error).__name__
        raise ValueError(
            f"{path} is no whole file of torch.save() that holds tensors and plain values only: {reason}"
        ) from error


def read_safetensors(path: Path) -> Weights:
    """Raises ValueError for a file that is not whole."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises ValueError for a file that is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def read_shards(folder: Path) -> Weights:
    """Weights of a folder as from_pretrained() takes it, in one file or in several with an index.

    model.safetensors is preferred to pytorch_model.bin. Raises ValueError where there is none, or one is damaged.
    """
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            weights: Weights = {}
            for file in sorted(set(read_json(index).get("weight_map", {}).values())):
                if Path(file).name != file or not (folder / file).is_file():
                    raise ValueError(f"{index} names {file}, and there is no such file in {folder}")
                weights.update(read(folder / file))
            return weights
    raise ValueError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def check_tensors(weights: Any, part: str = "") -> None:
    """ValueError for anything but tensors of floating-point numbers by name."""
    if not isinstance(weights, dict):
        raise ValueError(f"it holds a {type(weights).__name__}, and no tensors by name")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ValueError(f"{part}{name} is no tensor of floating-point numbers")


def shape_of(weights: Weights, name: str, ndim: int) -> torch.Size:
    """ValueError unless that tensor is there and has so many dimensions."""
    if name not in weights or weights[name].ndim != ndim:
        got = f"is {tuple(weights[name].shape)}" if name in weights else "is missing"
        raise ValueError(f"{name} {got}; it gives the network's size and has {ndim} dimensions")
    return weights[name].shape


def depth_and_mlp_width(weights: Weights, blocks: str) -> tuple[int, int]:
    mlp_width = shape_of(weights, f"{blocks}.0.mlp.fc1.weight", 2)[0]
    numbers = (re.match(rf"{blocks}\.(\d+)\.", name) for name in weights)
    return 1 + max(int(number[1]) for number in numbers if number), mlp_width


def encoder_shape(weights: Weights, heads: int | None) -> tuple[ViTSize, int, int]:
    """An encoder's sizes, image size and patch size in pixels, of its weights by our names.

    heads: which no tensor shows; None: as in the entry of VIT_SIZES with that width, depth and mlp_width. Raises
    ValueError where there is none, for another grid than a square one, and where tensors that show sizes are missing.
    """
    num_patches = shape_of(weights, "pos_embed", 3)[1]
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"pos_embed {tuple(weights['pos_embed'].shape)} has {num_patches} patches, which is no square grid"
        )
    patch_size = shape_of(weights, "patch_embed.proj.weight", 4)[-1]
    width = shape_of(weights, "patch_embed.proj.weight", 4)[0]
    size = encoder_size(width, *depth_and_mlp_width(weights, "blocks"), heads)
    return size, side * patch_size, patch_size


def encoder_size(width: int, depth: int, mlp_width: int, heads: int | None) -> ViTSize:
    if heads is not None:
        return ViTSize(width=width, depth=depth, heads=heads, mlp_width=mlp_width)
    for size in VIT_SIZES.values():
        if (size.width, size.depth, size.mlp_width) == (width, depth, mlp_width):
            return size
    raise ValueError(
        f"no known size has width {width}, depth {depth} and mlp_width {mlp_width}, and weights do not show the number "
        "of heads; give heads"
    )


def encoder_of(weights: Weights, *, heads: int | None) -> tuple[VisionTransformer, list[str]]:
    """An encoder on the CPU in fp32 with these weights, by our names, and what its user should be told.

    heads, errors: as of encoder_shape(). Position embeddings are taken as they are, also learned ones.
    """
    # First, and all of them: a class token, register tokens or layer scale explain whatever else does not fit.
    _raise_listed([_unexpected(name, tensor) for name, tensor in weights.items() if not OURS.fullmatch(name)])
    size, image_size, patch_size = encoder_shape(weights, heads)
    with torch.device("meta"):  # every weight comes from the file: no memory, no random numbers before
        encoder = VisionTransformer(size, image_size=image_size, patch_size=patch_size)
    fill(encoder, weights)
    notes = []
    if heads is None:
        notes.append(f"nothing says how many heads there are: {size.heads}, as others of width {size.width} have")
    if not (difference := pos_embed_difference(encoder.pos_embed)) <= POS_EMBED_TOLERANCE:
        notes.append(f"its position embeddings are its own: they differ by up to {difference:.2g} from the fixed ones")
    return encoder, notes


def fill(network: nn.Module, weights: Weights, part: str = "") -> None:
    """Put all of a network's weights in their places, in fp32. part: what messages name the tensors by.

    Raises ValueError that lists what is missing, unexpected or of another shape.
    """
    check_fit(weights, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, part)
    # Copies: the networks must outlive the file.
    network.load_state_dict({name: t.to(torch.float32, copy=True) for name, t in weights.items()}, assign=True)


def check_fit(weights: Weights, expected: Mapping[str, tuple[int, ...]], part: str = "") -> None:
    """ValueError, by name and shape, where weights are others than expected."""
    problems = [f"it lacks {part}{name} {shape}" for name, shape in expected.items() if name not in weights]
    problems += [_unexpected(part + name, tensor) for name, tensor in weights.items() if name not in expected]
    problems += [
        f"{part}{name} is {tuple(weights[name].shape)} and should be {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    _raise_listed(problems)


def _unexpected(name: str, tensor: torch.Tensor) -> str:
    return f"it has an unexpected {name} {tuple(tensor.shape)}"


def _raise_listed(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError("; ".join(problems[:LISTED]) + more)


def pos_embed_difference(stored_1ND: torch.Tensor) -> float:
    """The most by which the embeddings of a square grid differ from the fixed ones; NaN where they are NaN."""
    _, num_patches, width = stored_1ND.shape
    side = math.isqrt(num_patches)
    return (stored_1ND[0].double() - sincos_pos_embed(width, PatchGrid(side, side)).double()).abs().max().item()


def eps_notes(eps: float) -> list[str]:
    """What to tell of another epsilon of LayerNorm than ours. ValueError where features would be another model's.

    A smaller one, as IJepaConfig's default of 1e-12, moves a token by half of the difference over its variance.
    """
    if eps > MOST_NORM_EPS:
        raise ValueError(f"its LayerNorms add {eps:g} to the variance and ours {NORM_EPS:g}: features would differ")
    return (
        [] if eps == NORM_EPS else [f"its LayerNorms add {eps:g} to the variance, ours {NORM_EPS:g}: nearly the same"]
    )


def digest(network: nn.Module) -> str:
    """SHA-256 of its weights, in hexadecimal: a whole file may also hold moments, and would take its time."""
    sha256 = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        sha256.update(name.encode())
        sha256.update(tensor.contiguous().numpy())
    return sha256.hexdigest()


def without_prefixes(weights: Mapping[str, Any], prefixes: Iterable[str], first: str) -> dict[str, Any]:
    """The same without what wrappers put before names. first: how one of the names begins in the end."""
    stripped = dict(weights)
    for _ in range(3):  # of a wrapper in a wrapper
        for prefix in prefixes:
            if any(name.startswith(prefix + first) for name in stripped) or all(n.startswith(prefix) for n in stripped):
                stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    return stripped
