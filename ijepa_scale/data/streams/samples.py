"""A few images of a source's shards in a file, to be read by index: for health checks, reports and previews."""

import itertools
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ijepa_scale.data.decoding import MAX_PIXELS
from ijepa_scale.data.files import written_whole
from ijepa_scale.data.images import ImageSet, is_label, open_file, open_images
from ijepa_scale.data.sources.copies import check_copy, explained, parts_of
from ijepa_scale.data.sources.folders import printable
from ijepa_scale.data.sources.inspection import find_split, inspect_source
from ijepa_scale.data.sources.remote import DeadLinkError, Patience, is_remote, read_listed, shown
from ijepa_scale.data.sources.shards import DAMAGED, damage_of, first_dataset, first_rows, open_shard, shard_kind
from ijepa_scale.data.sources.splits import source_builder
from ijepa_scale.data.sources.tars import TarNotes, open_tar, tar_samples
from ijepa_scale.data.streams.opening import open_shards
from ijepa_scale.data.streams.shard_stream import Shards

_log = logging.getLogger(__name__)

_SAMPLED_SHARDS = 16
PREVIEWED = 64  # images
_SCHEMA = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])


def sample_images(shards: Shards, path: Path, *, count: int, patience: Patience) -> Path:
    """Write about count images, the first of up to 16 shards, to an Arrow file that `open_images` reads.

    Labels come along where the shards have them. Of damaged shards it takes what comes before the damage, as training
    does. What is there already is kept, so that resumed runs use the same.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    places: Sequence[int] = range(len(shards.locations))
    if shard_kind(shards.locations[0]) in ("image", None):  # one image each
        places = places[:: max(1, len(places) // count)][:count]
        each = 1
    else:
        places = places[:: -(-len(places) // _SAMPLED_SHARDS)]
        each = -(-count // len(places))
    _log.info("%s: reading %d images for the health check and the report into %s", shards.name, count, path)
    damage: list[str] = []
    tables = _first_tables(shards, places, each, patience, damage)
    written = 0
    with written_whole(path) as file:
        if (first := next(tables, None)) is not None:
            with pa.ipc.new_stream(file, first.schema) as writer:
                for table in itertools.chain([first], tables):
                    writer.write_table(_like(table, first.schema))
                    written += table.num_rows
        if not written:
            why = damage[0] if damage else "the first rows of its shards hold no images; check data.source"
            raise ValueError(f"{shards.name}: {why}")
    return path


def preview_images(
    source: str,
    *,
    split: str = "train",
    cache_dir: str | None = None,
    min_side: int = 1,
    max_pixels: int = MAX_PIXELS,
    column: str = "",
    config: str = "",
) -> ImageSet:
    """As open_images, with its errors, but without a copy of Parquet: of that, the first images of some shards."""
    chosen: dict[str, Any] = {"split": split, "cache_dir": cache_dir, "column": column, "config": config}
    if inspect_source(source, column)[0] != "parquet":
        return open_images(source, min_side=min_side, max_pixels=max_pixels, **chosen)
    builder = source_builder(source, cache_dir, config=config)
    found = find_split(list(map(str, builder.config.data_files)), split, source)
    check_copy(parts_of(builder, found), found, source, cache_dir)
    shards = open_shards(source, patience=Patience(0), **chosen)
    locations = shards.locations[:: -(-len(shards.locations) // _SAMPLED_SHARDS)]
    each = -(-PREVIEWED // len(locations))
    with explained(f"cannot read {source!r}"):
        tables = [_first_labelled(location, shards.column, each, Patience(0)) for location in locations]
    table = pa.concat_tables(tables, promote_options="default")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "preview.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        name = f"{os.path.basename(os.path.abspath(source))}:{shards.name.rpartition(':')[2]}"
        # Mapped: it lives on without its name.
        return open_file(path, name=name, max_pixels=max_pixels, num_images=shards.num_images)


def _first_tables(
    shards: Shards, places: Sequence[int], count: int, patience: Patience, damage: list[str]
) -> Iterator[pa.Table]:
    """The first images of each shard; what keeps one from being read at all is added to damage."""
    for place in places:
        location = shards.locations[place]
        try:
            if shard_kind(location) in ("parquet", "arrow", "tar"):
                yield _first_labelled(location, shards.column, count, patience)
            else:
                yield _image_row(place, shards.locations, patience)
        except DAMAGED as error:
            damage.append(damage_of(location, error))


def _like(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with these columns: null where it has none, as labels that some shards alone have."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _image_row(place: int, locations: Sequence[str], patience: Patience) -> pa.Table:
    """An image that is a shard of its own; no row for a dead link of a list, which training passes over, too."""
    location = locations[place]
    try:
        content = read_listed(location, locations, patience) if is_remote(location) else Path(location).read_bytes()
    except DeadLinkError:
        return _SCHEMA.empty_table()
    return pa.Table.from_pylist([{"image": {"bytes": content, "path": shown(location, place)}}], _SCHEMA)


def _first_labelled(location: str, column: str, count: int, patience: Patience) -> pa.Table:
    """The first images of a shard, with what labels it has."""
    if shard_kind(location) != "tar":
        features = first_dataset(location, 0, patience).features
        keep = [column, *(name for name, feature in features.items() if is_label(name, feature) and name != column)]
        schema = type(features)({name: features[name] for name in keep}).arrow_schema
        return first_rows(location, count, patience).select(keep).cast(schema)
    rows: list[dict[str, Any]] = []
    notes = TarNotes()
    with open_shard(location, patience) as file:
        try:
            for sample in tar_samples(open_tar(file, location), location, column=column, notes=notes):
                image = {"bytes": sample.content, "path": printable(sample.name)}
                rows.append({"image": image, "label": sample.label})
                if len(rows) == count:
                    break
        except DAMAGED:
            if not rows:
                raise
    if is_remote(location):  # of local ones `open_shards` did
        notes.say(f"the first images of {shown(location)}", column)
    return pa.Table.from_pylist(rows, _SCHEMA)
