"""A file of an encoder's weights alone, in any wrapping: by timm's names, which are ours, or by transformers'."""

from pathlib import Path
from typing import Any

import torch

from ijepa_scale.exchange.networks import Loaded, Networks
from ijepa_scale.exchange.record import encoder_from, read_record
from ijepa_scale.exchange.transformers import is_named, to_ours
from ijepa_scale.exchange.weights import Weights, check_tensors, read_pickle, read_safetensors, without_prefixes

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "encoder")  # where weights are kept, the first wins
PREFIXES = ("module.", "_orig_mod.", "backbone.")  # of wrappers


def networks(path: Path, content: Any = None) -> Networks:
    """What load() gives of a file of weights. content: what it holds, of a pickle that has been read already."""
    record = read_record(path)

    def read(name: str) -> Loaded:
        try:
            weights = _unwrapped(content if content is not None else _read(path))
            if is_named(weights):
                check_tensors(weights)
                weights = to_ours(weights)
            return encoder_from(weights, path, name, record=record)
        except ValueError as error:
            raise ValueError(f"cannot load {path} as the weights of a vision transformer: {error}") from error

    return Networks.of_encoder(path, record.network if record else None, read)


def _read(path: Path) -> Any:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def _unwrapped(content: Any) -> Weights:
    """The weights in what a file holds, by their own names. ValueError where there are none."""
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"it holds no weights by name, but {found or 'nothing'}")
    return without_prefixes(content, PREFIXES, "patch_embed.")
