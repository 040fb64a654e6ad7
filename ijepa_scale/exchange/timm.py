"""Vision transformers of timm without a class token: its folders, and its own models by name.

Our names of weights are timm's. What weights do not show, as heads and the activation, timm itself is asked for.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ijepa_kernels.patchify import IMAGENET_MEAN, IMAGENET_STD
from ijepa_scale.data.transforms import usual_shorter_side
from ijepa_scale.exchange.networks import Loaded, Networks
from ijepa_scale.exchange.record import Record, encoder_from, read_record
from ijepa_scale.exchange.weights import Weights, eps_notes, read_shards
from ijepa_scale.extras import needed
from ijepa_scale.models.vit import NORM_EPS, VIT_SIZES

SCHEME = "timm:"
# timm's own name, where its model of that name is ours. All of a model's arguments are written besides: no name is
# trusted with its heads, as vit_base_patch16_gap_224 has 16 where ViT-B has 12.
ARCHITECTURES = {
    ("vit_huge", 14, 224): "vit_huge_patch14_gap_224",
    ("vit_huge", 16, 448): "vit_huge_patch16_gap_448",
    ("vit_giant", 16, 224): "vit_giant_patch16_gap_224",
}
OTHERS = "vit_base_patch16_gap_224"


def networks_of_name(name: str) -> Networks:
    """What load() gives of an installed timm's model, its weights from timm's cache or where timm has them from."""

    def read(network: str) -> Loaded:
        timm = needed("timm", extra="export")
        try:
            model = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # what a name, a network and a cache lead to has no common type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"timm gives no weights of {name}: {reason}") from error
        return _encoder(model.state_dict(), Path(f"{SCHEME}{name}"), network, model=model)

    return Networks.of_encoder(Path(f"{SCHEME}{name}"), None, read)


def networks_of_folder(folder: Path) -> Networks:
    """What load() gives of a folder as timm's local-dir: and hf-hub: take it."""
    record = read_record(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else None

    def read(network: str) -> Loaded:
        timm = needed("timm", extra="export")
        try:
            with torch.device("meta"):  # for what its weights do not show
                model = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
        except Exception as error:  # what arguments lead to has no common type
            raise ValueError(f"timm cannot make the model of {folder / 'config.json'}: {error}") from error
        return _encoder(read_shards(folder), folder, network, model=model, record=record)

    return Networks.of_encoder(folder, record.network if record else None, read)


def _encoder(weights: Weights, path: Path, network: str, *, model: nn.Module, record: Record | None = None) -> Loaded:
    """model: timm's own of these weights."""
    try:
        notes = _differences(model)
        first: Any = model.get_submodule("blocks.0.attn")
        return encoder_from(weights, path, network, heads=first.num_heads, record=record, notes=notes)
    except ValueError as error:
        raise ValueError(f"cannot load {path} as a vision transformer of timm: {error}") from error


def _differences(model: Any) -> list[str]:
    """What to tell of a model's differences from ours that its weights do not show; ValueError for one that matters."""
    transformer = needed("timm", extra="export").models.vision_transformer
    if type(model) is not transformer.VisionTransformer:
        raise ValueError(f"it is a {type(model).__name__} of timm; wants its VisionTransformer")
    for block in model.blocks:
        if type(block) is not transformer.Block:
            raise ValueError(f"its blocks are {type(block).__name__}, and ours are pre-norm ones as timm's Block")
        if not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none":
            raise ValueError(f"its activation is {block.mlp.act}, and ours is the exact GELU")
    mean, std = model.pretrained_cfg.get("mean", IMAGENET_MEAN), model.pretrained_cfg.get("std", IMAGENET_STD)
    norms = [norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)]
    notes = eps_notes(max(norms, default=NORM_EPS))
    if (tuple(mean), tuple(std)) != (IMAGENET_MEAN, IMAGENET_STD):
        notes.append(
            f"warning: timm normalizes its pixels with mean {tuple(mean)} and std {tuple(std)}; ours are normalized "
            "with ImageNet's, and its features here are not those that it was trained for"
        )
    return notes


def write(loaded: Loaded, folder: Path) -> None:
    """A folder for timm.create_model("local-dir:...") to read. loaded: an encoder."""
    record = Record.of(loaded)
    record.save(dict(loaded.network.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(record), indent=2) + "\n", encoding="utf-8")


def config_of(record: Record) -> dict[str, Any]:
    """timm's config.json: its architecture, all the arguments of that, and how pixels are prepared."""
    size, side = record.size, record.image_size
    named = {VIT_SIZES[name]: timm_name for (name, *at), timm_name in ARCHITECTURES.items() if at == _at(record)}
    return {
        "architecture": named.get(size, OTHERS),
        "num_classes": 0,
        "num_features": size.width,
        "global_pool": "avg",
        "model_args": {
            "img_size": side,
            "patch_size": record.patch_size,
            "embed_dim": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "mlp_ratio": _quotient(size.mlp_width, size.width),
            "qkv_bias": True,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            "num_classes": 0,
        },
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": _share(side, usual_shorter_side(side)),
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _at(record: Record) -> list[int]:
    return [record.patch_size, record.image_size]


def _quotient(whole: int, part: int) -> float:
    """Such that int(part * quotient), as timm has it, is the whole again."""
    exact = whole / part
    return exact if int(part * exact) == whole else (whole + 0.5) / part


def _share(size: int, resized: int) -> float:
    """Such that floor(size / share), as timm has it, is the resized side again."""
    exact = size / resized
    return exact if math.floor(size / exact) == resized else size / (resized + 0.5)
