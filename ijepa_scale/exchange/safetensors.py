"""Exports of our own: a safetensors file a network, each with its record, and a manifest of them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ijepa_scale.exchange.networks import Loaded, Networks
from ijepa_scale.exchange.record import Record, read_record
from ijepa_scale.exchange.weights import digest, fill, read_json, read_safetensors
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer

MANIFEST = "export.json"  # of exports of every format; of this one it lists the networks


def is_export(folder: Path) -> bool:
    """Whether a folder is an export in this format."""
    return (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("format") == "safetensors"


def networks(folder: Path) -> Networks:
    """What load() gives of an export."""
    entries = read_json(folder / MANIFEST).get("networks", {})
    files = {name: folder / f"{name}.safetensors" for name in entries}

    def read(name: str) -> Loaded:
        if not files[name].is_file():
            raise ValueError(f"{folder / MANIFEST} tells of {files[name].name}, which is not there")
        loaded = _read(files[name], read_record(files[name]))
        if loaded.sha256 != entries[name].get("sha256"):
            raise ValueError(f"{files[name]} does not match its SHA-256 in {MANIFEST}: it was changed or damaged")
        return loaded

    return Networks(path=folder, names=tuple(files), read=read)


def networks_of_file(path: Path, record: Record) -> Networks:
    """What load() gives of one file of an export. record: its own."""
    return Networks(path=path, names=(record.network,), read=lambda name: _read(path, record))


def write(loaded: Loaded, folder: Path) -> None:
    """One network's file. The manifest is written when all are there."""
    Record.of(loaded).save(dict(loaded.network.state_dict()), folder / f"{loaded.name}.safetensors")


def _read(path: Path, record: Record | None) -> Loaded:
    if record is None:
        raise ValueError(f"{path} is no export of ours: its header has no record of the network")
    try:
        network = _empty(record)
        fill(network, read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}") from error
    facts: dict[str, Any] = {"image_size": record.image_size, "step": record.step, "config": record.config}
    return Loaded(network=network, name=record.network, path=path, sha256=digest(network), **facts)


def _empty(record: Record) -> nn.Module:
    """The network of a record, without memory for its weights."""
    side, patch_size = record.image_size, record.patch_size
    with torch.device("meta"):
        if record.encoder_width is None:
            return VisionTransformer(record.size, image_size=side, patch_size=patch_size)
        grid = PatchGrid.of_image(side, side, patch_size)
        return Predictor(record.size, encoder_width=record.encoder_width, out_width=record.out_width, grid=grid)
