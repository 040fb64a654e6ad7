"""What an export says of a network beside its weights, in the header of its safetensors file."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ijepa_scale.exchange.networks import NETWORKS, Loaded
from ijepa_scale.exchange.weights import header
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.predictor import Predictor

KEY = "ijepa_scale"


@dataclass(frozen=True, kw_only=True)
class Record:
    """network: "target", "context" or "predictor". image_size, patch_size: pixels a side. encoder_width: of what a
    predictor reads, None of an encoder. step, config: as of Loaded.
    """

    network: str
    size: ViTSize
    image_size: int
    patch_size: int
    encoder_width: int | None = None
    step: int | None = None
    config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, loaded: Loaded) -> "Record":
        network: Any = loaded.network
        predicts = isinstance(network, Predictor)
        positions = network.predictor_pos_embed if predicts else network.pos_embed
        return cls(
            network=loaded.name,
            size=network.size,
            image_size=loaded.image_size,
            patch_size=loaded.image_size // math.isqrt(positions.shape[1]),
            encoder_width=network.predictor_embed.in_features if predicts else None,
            step=loaded.step,
            config=loaded.config,
        )

    def save(self, weights: dict[str, torch.Tensor], path: Path) -> None:
        """Weights with this record in their file's header."""
        path.touch()
        mode = path.stat().st_mode  # as the umask says; safetensors' own files are their owner's alone
        save_file(weights, path, metadata={"format": "pt", KEY: json.dumps(asdict(self))})
        path.chmod(mode)


def read_record(path: Path) -> Record | None:
    """The record of a safetensors file; None where another program wrote it. ValueError for one that is damaged."""
    if path.suffix != ".safetensors" or KEY not in (found := header(path)):
        return None
    try:
        values = json.loads(found[KEY])
        record = Record(**{**values, "size": ViTSize(**values["size"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the header of {path} cannot be read: {error}") from error
    if record.network not in NETWORKS:
        raise ValueError(f"the header of {path} tells of an unknown network {record.network!r}")
    return record
