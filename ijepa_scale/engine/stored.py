"""What a checkpoint holds, read without the engine that wrote it: to look at it, and to check it."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ijepa_scale.engine.checkpoint import KINDS, Checkpoint, _file_index

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
        index = _file_index(checkpoint, files)
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
        index = _file_index(checkpoint, files)
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
