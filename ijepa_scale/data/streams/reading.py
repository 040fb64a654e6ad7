"""The images of one shard (a Parquet, Arrow or tar file, or a single image), one after another, from any row on."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.sources.shards import open_shard, shard_kind, table_batches
from ijepa_scale.data.sources.tars import open_tar, tar_samples


@dataclass(frozen=True)
class Encoded:
    """An image as stored: its content, or the path or URL of its file. index: its row in the shard."""

    index: int
    content: bytes | None
    path: str


class ShardPosition(NamedTuple):
    """Between two rows of a shard. rows: read already. byte: at which to go on; only tars need that."""

    rows: int = 0
    byte: int = 0


START = ShardPosition()


def read_shard(
    location: str, *, column: str, start: ShardPosition = START, share: tuple[int, int] = (0, 1), patience: Patience
) -> Iterator[tuple[ShardPosition, Encoded | None]]:
    """Every row from start on: the position after it, and its image if the row is in the share, else None.

    column: of images, in Parquet and Arrow files; the ending of images, in tars, or "" for the likeliest.
    share: (r, n) takes the rows whose number modulo n is r.
    Raises StreamError where the shard cannot be opened or the network fails for good, and DAMAGED for bad content.
    """
    kind = shard_kind(location)
    if kind in ("image", None):
        if start.rows == 0:
            yield ShardPosition(1), Encoded(0, None, location) if share[0] == 0 else None
        return
    with open_shard(location, patience) as file:
        if kind == "tar":
            yield from _tar_rows(file, location, column, start, share)
            return
        for first, batch in table_batches(file, location, start.rows, [column]):
            values = batch.column(0)
            for row in range(max(start.rows, first), first + batch.num_rows):
                mine = row % share[1] == share[0]
                yield ShardPosition(row + 1), _encoded(row, values[row - first].as_py()) if mine else None


def _encoded(row: int, value: Any) -> Encoded:
    if isinstance(value, dict):
        return Encoded(row, value["bytes"], os.fsdecode(value.get("path") or ""))
    return Encoded(row, value, "")


def _tar_rows(
    file: BinaryIO, location: str, column: str, start: ShardPosition, share: tuple[int, int]
) -> Iterator[tuple[ShardPosition, Encoded | None]]:
    """The image of each sample. A position is at the sample read last, which is then passed over."""
    row, byte = start
    first = row - 1 if row else 0

    def mine(number: int) -> bool:
        return first + number >= row and (first + number) % share[1] == share[0]

    samples = tar_samples(open_tar(file, location, byte), location, column=column, contents=mine)
    for number, sample in enumerate(samples):
        if first + number >= row:
            image = Encoded(first + number, sample.content, sample.name) if mine(number) else None
            yield ShardPosition(first + number + 1, sample.start), image
