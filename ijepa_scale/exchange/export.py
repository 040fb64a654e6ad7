"""A network that can be loaded -> a folder in another format, written whole or not at all."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from ijepa_scale.config import without_secrets
from ijepa_scale.data.files import folder_written_whole
from ijepa_scale.exchange import onnx, safetensors, timm, transformers
from ijepa_scale.exchange.card import card
from ijepa_scale.exchange.load import find
from ijepa_scale.exchange.networks import Loaded
from ijepa_scale.exchange.record import Record
from ijepa_scale.exchange.safetensors import MANIFEST
from ijepa_scale.exchange.weights import digest, read_json

CARD = "README.md"
SHARED = ("step", "config")  # by all networks of what is exported
FORMATS: dict[str, Callable[[Loaded, Path], None]] = {
    "transformers": transformers.write,
    "timm": timm.write,
    "onnx": onnx.write,
    "safetensors": safetensors.write,
}


def export(what: str, out: Path, *, form: str, network: str | None = None, licence: str = "unknown") -> list[Loaded]:
    """Write networks of whatever find() takes to a folder, with a model card and a manifest; what each was, emptied.

    form: a key of FORMATS. network: "target", "context" or "predictor"; None: the target encoder, and in safetensors
    every network. No more than one network is in memory at a time. licence: as of card().
    Raises ValueError for a network that a format has no class for, for a folder that holds something else than an
    earlier export, and whatever find() and the formats raise.
    """
    if network == "predictor" and form != "safetensors":
        raise ValueError(f"{form} has no class for the predictor; export it with --format safetensors")
    check_free(out)
    found = find(what)
    names = found.names if form == "safetensors" and network is None else (network or "target",)
    done: list[Loaded] = []
    entries = {}
    with folder_written_whole(out) as folder:
        for name in names:
            loaded = found.load(name)
            loaded = replace(loaded, config=without_secrets(loaded.config))  # of an older manifest
            FORMATS[form](loaded, folder)
            record = {key: value for key, value in asdict(Record.of(loaded)).items() if key not in SHARED}
            entries[loaded.name] = {**record, "sha256": digest(loaded.network)}
            done.append(replace(loaded, network=_emptied(loaded.network)))
            del loaded  # before the next one is read
        (folder / CARD).write_text(card(form, done, licence, scored=found.names[0]), encoding="utf-8")
        shared = {key: getattr(done[0], key) for key in SHARED}
        manifest = {"format": form, "from": str(done[0].path), **shared, "networks": entries}
        files = sorted([*(file.name for file in folder.iterdir()), MANIFEST])
        (folder / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n", encoding="utf-8")
    return done


def check_free(out: Path) -> None:
    """ValueError where a folder holds anything that no export has written; it would be replaced as a whole."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    there = {file.name for file in out.iterdir()} if out.is_dir() else set()
    ours = set(read_json(out / MANIFEST).get("files", [])) if MANIFEST in there else set()
    if there - ours:
        raise ValueError(
            f"--out {out} holds {', '.join(sorted(there - ours)[:3])}, which no export has written; give an empty "
            "folder, a new one, or that of an earlier export"
        )


def _emptied(network: nn.Module) -> nn.Module:
    """The same without memory for its weights: its sizes alone."""
    return network.to(torch.device("meta"))
