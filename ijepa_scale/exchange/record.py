"""What an export says of a network beside its weights, in the header of its safetensors file, and encoders by that."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ijepa_scale.exchange.networks import NETWORKS, Loaded
from ijepa_scale.exchange.weights import Weights, check_tensors, digest, encoder_of, header
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.predictor import Predictor

KEY = "ijepa_scale"


@dataclass(frozen=True, kw_only=True)
class Record:
    """network: "target", "context" or "predictor". image_size, patch_size: pixels a side. encoder_width: of what a
    predictor reads, None of an encoder. out_width: of what it puts out; None: as wide. step, config: as of Loaded.
    """

    network: str
    size: ViTSize
    image_size: int
    patch_size: int
    encoder_width: int | None = None
    out_width: int | None = None
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
            out_width=network.predictor_proj.out_features if predicts else None,
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


def encoder_from(
    weights: Weights,
    path: Path,
    name: str,
    *,
    heads: int | None = None,
    record: Record | None = None,
    notes: Sequence[str] = (),
) -> Loaded:
    """An encoder of weights by our names, and of what is said beside them. path: of what they are from.

    heads: None: as the record says, or as is usual. Raises ValueError as encoder_of() and check_tensors().
    """
    check_tensors(weights)
    encoder, more = encoder_of(weights, heads=record.size.heads if heads is None and record else heads)
    return Loaded(
        network=encoder,
        name=name,
        image_size=encoder.grid.rows * encoder.patch_embed.patch_size,
        path=path,
        sha256=digest(encoder),
        step=record.step if record else None,
        config=record.config if record else None,
        notes=(*notes, *more),
    )
