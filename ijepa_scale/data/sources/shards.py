"""What a shard is, a file of many images or of one, by its name; how it is opened; its first rows."""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ijepa_scale.data.decoding import image_extensions, reason_of
from ijepa_scale.data.sources.folders import printable
from ijepa_scale.data.sources.remote import Patience, StreamError, is_remote, open_location, shown

SHARD_KINDS = {  # ending of a location -> kind; anything else that Pillow knows is a shard of one image
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
}
# What the decoders of shards raise for damaged content. pyarrow raises OSError for some; failures to read a remote file
# have become a StreamError before they get here.
DAMAGED = (tarfile.TarError, zlib.error, EOFError, OSError, pa.ArrowException)
_BATCH = 64  # rows of a local Parquet file that are held decompressed


def shard_kind(location: str) -> str | None:
    """parquet, arrow, tar or image, by the ending of a path or URL; None for others."""
    name = re.split(r"[?#]", location)[0].lower() if is_remote(location) else location.lower()
    kind = next((kind for ending, kind in SHARD_KINDS.items() if name.endswith(ending)), None)
    return kind or ("image" if os.path.splitext(name)[1] in image_extensions() else None)


def open_shard(location: str, patience: Patience) -> BinaryIO:
    """Its file. StreamError where it cannot be opened, which is no damage: it may come back."""
    try:
        return open_location(location, patience)
    except OSError as error:  # of a local file
        raise StreamError(f"{location} cannot be opened: {error.strerror or error}; bring it back") from error


def damage_of(location: str, error: Exception) -> str:
    """What to tell the user of a shard whose content is damaged."""
    return f"{shown(location)} cannot be read ({reason_of(error)}); get it anew, or take it out of the source"


def table_batches(
    file: BinaryIO, location: str, row: int, columns: list[str] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of its first row, batch) of a Parquet or Arrow file, from the batch that holds `row` on.

    Raises StreamError where it lacks one of the columns, as the file of another data set does.
    """
    if shard_kind(location) == "parquet":
        # A remote column chunk is read whole, so that reads go forward; a local one in pieces, as it may be the file.
        with pq.ParquetFile(file, buffer_size=0 if is_remote(location) else 1 << 20, pre_buffer=False) as parquet:
            check_columns(location, parquet.schema_arrow.names, columns or ())
            first = 0
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if end > row:
                    options = {"row_groups": [group], "columns": columns, "use_threads": False}
                    for batch in parquet.iter_batches(_BATCH, **options):
                        if first + batch.num_rows > row:
                            yield first, batch
                        first += batch.num_rows
                first = end
        return
    first = 0
    for batch in arrow_batches(pa.memory_map(location) if not is_remote(location) else file):
        if first + batch.num_rows > row:
            check_columns(location, batch.schema.names, columns or ())
            yield first, batch if columns is None else batch.select(columns)
        first += batch.num_rows


def check_columns(location: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """StreamError where a shard lacks a column that others of its source have."""
    if missing := [name for name in wanted if name not in names]:
        raise StreamError(
            f"{printable(shown(location))} has no column {missing[0]!r}, as other files of the source have; it has: "
            f"{', '.join(names)}. Give a folder with files of one data set"
        )


def arrow_batches(file: Any) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file, in either of its two formats."""
    try:
        yield from pa.ipc.open_stream(file)
    except pa.ArrowInvalid:  # the other of the two formats, unless something came already
        file.seek(0)
        if file.read(6) != b"ARROW1":
            raise
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def first_rows(location: str, count: int, patience: Patience) -> pa.Table:
    """The first rows of a Parquet or Arrow file, with all columns. DAMAGED where not even one can be read."""
    with open_shard(location, patience) as file:
        batches, rows = [], 0
        try:
            for _, batch in table_batches(file, location, 0, None):
                batches.append(batch.slice(0, count - rows))
                rows += batches[-1].num_rows
                if rows >= count:
                    break
        except DAMAGED:
            if not batches:
                raise
        if batches:
            return pa.Table.from_batches(batches)
        file.seek(0)
        schema = pq.read_schema(file) if shard_kind(location) == "parquet" else pa.ipc.open_stream(file).schema
        return schema.empty_table()


def first_dataset(location: str, count: int, patience: Patience) -> Any:
    """The same as a `datasets.Dataset`, which tells what the columns hold."""
    import datasets

    return datasets.Dataset(first_rows(location, count, patience), fingerprint="rows")
