"""Where a stream goes on after a restart, as a value and as a checkpoint holds it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

OptionalPositions = Sequence["StreamPosition | None"]  # None: a stream that has not begun


@dataclass(frozen=True)
class SourcePosition:
    """Where a stream goes on in one of its sources: before the first image of a block, and how far into the block.

    pass_number: of passes over its shards before this one. shard: in the order of this pass. rows, byte: as of
    ShardPosition. block: of blocks before this one in the pass. done, images: handed out of the block, and of the pass.
    """

    pass_number: int = 0
    shard: int = 0
    rows: int = 0
    byte: int = 0
    block: int = 0
    done: int = 0
    images: int = 0


BEGINNING = SourcePosition()


@dataclass(frozen=True)
class StreamPosition:
    """taken: images handed out in all, which say whose turn it is among the sources. sources: a position in each."""

    taken: int
    sources: tuple[SourcePosition, ...]

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint's manifest holds it."""
        return asdict(self)


def saved_positions(manifest: dict[str, Any]) -> list[list[StreamPosition | None]]:
    """Every rank's streams' positions of a checkpoint's manifest; [] where the run streamed nothing.

    Older checkpoints call them "stream_states", and the first four numbers of each source its "place".
    """
    ranks = manifest.get("stream_positions") or manifest.get("stream_states") or []
    return [[position and _from_json(position) for position in streams] for streams in ranks]


def _from_json(position: dict[str, Any]) -> StreamPosition:
    sources = []
    for source in position["sources"]:
        numbers = {name: number for name, number in source.items() if name != "place"}
        numbers |= zip(("pass_number", "shard", "rows", "byte"), source.get("place", ()), strict=False)
        sources.append(SourcePosition(**numbers))
    return StreamPosition(position["taken"], tuple(sources))
