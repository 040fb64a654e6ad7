"""Folders of transformers' IJepaModel, read and written without transformers.

On disk both of its majors use the names of version 4: encoder.layer.N.attention.attention.query, ... Version 5 holds
others in memory, layers.N.attention.q_proj, ..., which are read too.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ijepa_kernels.patchify import IMAGENET_MEAN, IMAGENET_STD
from ijepa_scale.data.transforms import usual_shorter_side
from ijepa_scale.exchange.networks import Loaded, Networks
from ijepa_scale.exchange.record import Record, encoder_from, read_record
from ijepa_scale.exchange.weights import Weights, check_tensors, eps_notes, read_shards
from ijepa_scale.models.vit import NORM_EPS

OUTSIDE = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
OF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]  # the rows of our attn.qkv, in this order
FROM_VERSION_5 = {
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "attention.q_proj": QKV[0],
    "attention.k_proj": QKV[1],
    "attention.v_proj": QKV[2],
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
BLOCK = re.compile(r"(encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}  # of IJepaConfig


def is_named(weights: Mapping[str, Any]) -> bool:
    """Whether names are transformers'."""
    return OUTSIDE["pos_embed"] in weights


def networks(folder: Path, config: Mapping[str, Any]) -> Networks:
    """What load() gives of a folder with such a config.json. ValueError for another model than an IJepaModel."""
    if config["model_type"] != "ijepa":
        raise ValueError(f"{folder} holds a {config['model_type']} of transformers; only its ijepa can be loaded")
    config = {**DEFAULTS, **config}
    record = read_record(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else None

    def read(name: str) -> Loaded:
        try:
            if config["hidden_act"] != "gelu":
                raise ValueError(f"its hidden_act is {config['hidden_act']}, and ours is gelu")
            notes = eps_notes(config["layer_norm_eps"])
            weights = read_shards(folder)
            check_tensors(weights)
            return encoder_from(
                to_ours(weights), folder, name, heads=config["num_attention_heads"], record=record, notes=notes
            )
        except ValueError as error:
            raise ValueError(f"cannot load {folder} as an IJepaModel of transformers: {error}") from error

    return Networks.of_encoder(folder, record.network if record else None, read)


def to_ours(weights: Weights) -> Weights:
    """Weights by our names, from those of version 4 or 5. Whatever has no counterpart keeps its name."""
    outside = {theirs: ours for ours, theirs in OUTSIDE.items()}
    of_block = {theirs: ours for ours, theirs in OF_BLOCK.items()}
    renamed: Weights = {}
    thirds: dict[str, dict[str, str]] = defaultdict(dict)  # our name -> which third -> its name
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if name in outside or stem in outside:
            renamed[outside[name] if name in outside else f"{outside[stem]}.{kind}"] = tensor
            continue
        found = BLOCK.fullmatch(name)
        part = (FROM_VERSION_5.get(found[3], "") if found[1] == "layers" else found[3]) if found else ""
        if found and part in QKV:
            thirds[f"blocks.{found[2]}.attn.qkv.{found[4]}"][part] = name
        elif found and part in of_block:
            renamed[f"blocks.{found[2]}.{of_block[part]}.{found[4]}"] = tensor
        else:
            renamed[name] = tensor
    for ours, names in thirds.items():
        parts = [weights[names[third]] for third in QKV if third in names]
        if len(parts) == len(QKV) and len({part.shape for part in parts}) == 1:
            renamed[ours] = torch.cat(parts)
        else:
            renamed.update({name: weights[name] for name in names.values()})
    return renamed


def to_theirs(weights: Weights) -> Weights:
    """Weights by the names of version 4, which both majors read. Thirds of attn.qkv share its memory."""
    renamed: Weights = {}
    for name, tensor in weights.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        stem, _, kind = name.rpartition(".")
        if not found:
            renamed[OUTSIDE[name] if name in OUTSIDE else f"{OUTSIDE[stem]}.{kind}"] = tensor
        elif found[2] == "attn.qkv":
            for third, part in zip(QKV, tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{found[1]}.{third}.{found[3]}"] = part
        else:
            renamed[f"encoder.layer.{found[1]}.{OF_BLOCK[found[2]]}.{found[3]}"] = tensor
    return renamed


def write(loaded: Loaded, folder: Path) -> None:
    """A folder for AutoModel and AutoImageProcessor to read. loaded: an encoder."""
    record = Record.of(loaded)
    record.save(to_theirs(loaded.network.state_dict()), folder / "model.safetensors")
    for name, content in (("config.json", _config(record)), ("preprocessor_config.json", _processor(record))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(record: Record) -> dict[str, Any]:
    size = record.size
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": NORM_EPS,
        "image_size": record.image_size,
        "patch_size": record.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def _processor(record: Record) -> dict[str, Any]:
    """Of BitImageProcessor, which has no exception for images of exactly the size: see docs/export.md."""
    return {
        "image_processor_type": "BitImageProcessor",  # ViT's own squashes an image to a square
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": usual_shorter_side(record.image_size)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": record.image_size, "width": record.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
