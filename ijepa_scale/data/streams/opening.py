"""A source -> its shards, to be streamed, and what their first rows tell."""

import contextlib
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from ijepa_scale.data.images import image_column
from ijepa_scale.data.sources.copies import explained
from ijepa_scale.data.sources.folders import image_splits, shard_splits, whole_split
from ijepa_scale.data.sources.inspection import check_all_there, check_choice, find_split, inspect_source
from ijepa_scale.data.sources.remote import Patience, is_remote, shown
from ijepa_scale.data.sources.shards import DAMAGED, check_columns, damage_of, first_dataset, open_shard, shard_kind
from ijepa_scale.data.sources.splits import source_builder
from ijepa_scale.data.sources.tables import listed_images
from ijepa_scale.data.sources.tars import first_notes, tar_ending
from ijepa_scale.data.streams.shard_stream import Shards

_LOCAL_FILES, _REMOTE_FILES = 2000, 100  # of the first tar, whose headers are looked at


def shard_locations(
    source: str, cache_dir: str | None = None, *, column: str = "", config: str = ""
) -> dict[str, list[str]]:
    """The splits of a source as lists of shards. Reads names only, of Hub data too, and copies nothing."""
    kind, files = inspect_source(source, column)
    check_choice(kind, source, column=column, config=config)
    path = Path(source).expanduser().absolute()
    root = str(path.parent if path.is_file() else path)
    if kind == "saved":
        with explained(f"cannot read {str(path)!r}"):
            return _saved_shards(path)
    if kind in ("arrow", "tar"):
        return {split: [os.path.join(root, file) for file in part] for split, part in shard_splits(files).items()}
    if kind == "table":
        return {
            split: listed_images(os.path.join(root, part[0]), column).paths
            for split, part in shard_splits(files).items()
        }
    if kind == "images":
        return {
            split: [os.path.join(root, file) for file in part.files]
            for split, part in image_splits(root, files).items()
        }
    if kind == "list":
        names = {posixpath.basename(file): file for file in files}
        if len(names) < len(files):
            return {"train": files}
        return {split: [names[name] for name in part] for split, part in shard_splits(list(names)).items()}
    builder = source_builder(source, cache_dir, config=config)
    return {str(split): [str(file) for file in part] for split, part in (builder.config.data_files or {}).items()}


def _saved_shards(path: Path) -> dict[str, list[str]]:
    """What `save_to_disk` notes to be its own: beside it may lie what it saved there before."""
    saved = path / "dataset_dict.json"
    folders = [path / split for split in json.loads(saved.read_bytes())["splits"]] if saved.is_file() else [path]
    splits = {}
    for folder in folders:
        state = json.loads((folder / "state.json").read_bytes())
        name = folder.name if saved.is_file() else whole_split(state["_split"])
        splits[name] = [str(folder / file["filename"]) for file in state["_data_files"]]
    return splits


def open_shards(
    source: str,
    *,
    split: str = "train",
    cache_dir: str | None = None,
    column: str = "",
    config: str = "",
    patience: Patience,
) -> Shards:
    """The shards of one split, and what their first rows tell. ValueError for a source that cannot be streamed.

    column, config: as of `open_images`.
    """
    splits = shard_locations(source, cache_dir, column=column, config=config)
    found = find_split(list(splits), split, source)
    locations = splits[found]
    if not locations:
        raise ValueError(f"split {found!r} of {source!r} has no files; it must hold at least one image")
    foreign = [location for location in locations if shard_kind(location) is None]
    kind = inspect_source(source, column)[0]
    images = kind in ("images", "table")
    if foreign and not images:
        instead = "give such files" if kind == "list" else "set data.streaming=false to copy it to the cache instead"
        raise ValueError(
            f"{source!r} cannot be streamed: {foreign[0]} is no .parquet, .arrow, .tar or image file; {instead}"
        )
    if kind == "list" and not is_remote(source):
        check_all_there(locations, source)
    column = "" if images else _column(source, locations[0], column, patience)
    named = source.partition("?")[0] if is_remote(source) else source  # a query may be a secret
    name = f"{posixpath.basename(named.rstrip('/'))}:{found}"
    count = len(locations) if images else _count(source, found, locations, column, cache_dir, config)
    return Shards(name, locations, column, count)


def _column(source: str, location: str, column: str, patience: Patience) -> str:
    """The column of images, or their ending in tars, as the first shard has it; says what tars leave out."""
    kind = shard_kind(location)
    if kind in ("parquet", "arrow"):
        with _named_damage(location):
            rows = first_dataset(location, 32, patience)
        return image_column(rows, source, column)
    if kind != "tar":
        check_choice("images", source, column=column, config="")
        return ""
    ending = tar_ending(column)
    if ending or not is_remote(location):  # of remote ones the first that are read tell the rest
        with open_shard(location, patience) as file:
            notes = first_notes(file, location, ending, _REMOTE_FILES if is_remote(location) else _LOCAL_FILES)
        notes.say(f"the first files of {shown(location)}", ending)
    return ending


@contextlib.contextmanager
def _named_damage(location: str) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise ValueError(damage_of(location, error)) from error


def _count(source: str, split: str, locations: Sequence[str], column: str, cache_dir: str | None, config: str) -> int:
    """Rows in all shards where that is known without reading them, else 0. StreamError for one without the column."""
    if is_remote(locations[0]):
        if locations[0].startswith("hf://") and not is_remote(source):
            told = (source_builder(source, cache_dir, config=config).info.splits or {}).get(split)
            return (told.num_examples or 0) if told else 0
        return 0
    kind = shard_kind(locations[0])
    return sum(_rows_in(location, column) for location in locations) if kind in ("parquet", "arrow") else 0


def _rows_in(location: str, column: str) -> int:
    import datasets

    with _named_damage(location):
        if shard_kind(location) == "parquet":
            metadata = pq.read_metadata(location)
            rows, names = metadata.num_rows, metadata.schema.to_arrow_schema().names
        else:
            dataset = datasets.Dataset.from_file(location)
            rows, names = len(dataset), dataset.column_names
    check_columns(location, names, [column])
    return rows
