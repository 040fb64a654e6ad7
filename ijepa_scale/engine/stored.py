"""What a checkpoint holds, read without the engine that wrote it: to look at it, to check it, to copy it."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.data.files import sync
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.checkpoint import KINDS, Checkpoint

Names = Mapping[str, Mapping[str, int]]  # kind -> parameter -> its number of elements


@dataclass(frozen=True)
class Held:
    """All of one kind: parameters, their elements, and in how many pieces these lie."""

    kind: str
    parameters: int
    elements: int
    pieces: int


def held(checkpoint: Checkpoint) -> list[Held]:
    """What there is of each kind. ValueError where a file cannot be read."""
    with contextlib.ExitStack() as files:
        found = []
        index = checkpoints.file_index(checkpoint, files)
        for kind in KINDS:
            of_kind = [pieces for (other, _), pieces in index.items() if other == kind]
            lengths = [_length(piece) for pieces in of_kind for piece in pieces]
            found.append(Held(kind, len(of_kind), sum(lengths), len(lengths)))
        return found


def faults(checkpoint: Checkpoint, expected: Names) -> Iterator[str]:
    """What is wrong with a checkpoint whose files are as they were written, in words.

    expected: what there must be. Each element of each parameter must be there once, and be finite.
    """
    with contextlib.ExitStack() as files:
        index = checkpoints.file_index(checkpoint, files)
        wanted = {(kind, name): count for kind, names in expected.items() for name, count in names.items()}
        for kind, name in sorted(index.keys() - wanted.keys()):
            yield f"{name} ({kind}) belongs to no network of its config"
        for (kind, name), count in wanted.items():
            at = 0
            for first, key, file in sorted(index.get((kind, name), ()), key=lambda piece: piece[0]):
                if first != at:
                    break
                values = file.get_tensor(key)
                if not bool(torch.isfinite(values).all()):
                    yield f"{name} ({kind}) holds NaN or infinity"
                at += len(values)
            if at != count:
                yield f"{name} ({kind}) is there up to element {at:,} of {count:,}"


def _length(piece: tuple) -> int:
    _, key, file = piece
    return file.get_slice(key).get_shape()[0]


def copy(checkpoint: Checkpoint, folder: Path, manifest: dict[str, Any]) -> Checkpoint:
    """The same state under another manifest, whole or not at all, as folder/step-XXXXXXXX. OSError where it fails."""
    partial, final = (folder / f"{start}{checkpoints.folder_name(checkpoint.step)}" for start in (".partial-", ""))
    try:
        checkpoints.make_room(partial, sum(entry["bytes"] for entry in manifest["files"]))
        for entry in manifest["files"]:
            shutil.copyfile(checkpoint.path / entry["name"], partial / entry["name"])
            sync(partial / entry["name"])
            if checkpoints.sha256_of(partial / entry["name"]) != entry["sha256"]:
                raise OSError(f"{partial / entry['name']} reads back differently than it was written")
        checkpoints.publish(partial, final, manifest)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint(final, checkpoints.read_manifest(final))
