"""A source -> its shards, to be streamed; and a few of its images in a file, to be read by index."""

import contextlib
import itertools
import logging
import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ijepa_scale.data.decoding import MAX_PIXELS, reason_of
from ijepa_scale.data.images import ImageSet, image_column, is_label, open_file, open_images
from ijepa_scale.data.lfs import LFS_ADVICE, is_pointer_file
from ijepa_scale.data.sources.copies import check_copy, explained
from ijepa_scale.data.sources.folders import image_splits, printable, shard_splits
from ijepa_scale.data.sources.kinds import check_choice, find_split, inspect_source, source_builder
from ijepa_scale.data.sources.remote import DeadLinkError, Patience, is_remote, read_listed
from ijepa_scale.data.sources.tables import listed_images
from ijepa_scale.data.sources.tars import TarNotes, first_notes, open_tar, tar_ending, tar_samples
from ijepa_scale.data.streams.shards import DAMAGED, first_rows, open_shard, shard_kind
from ijepa_scale.data.streams.streams import Shards

_log = logging.getLogger(__name__)

_SAMPLED_SHARDS = 16
_LOCAL_FILES, _REMOTE_FILES = 2000, 100  # of the first tar, whose headers are looked at
PREVIEWED = 64  # images
_DAMAGE = "cannot be read (%s); get it anew, or take it out of the source"
_SCHEMA = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])


def shard_locations(
    source: str, cache_dir: str | None = None, *, column: str = "", config: str = ""
) -> dict[str, list[str]]:
    """The splits of a source as lists of shards. Reads names only, of Hub data too, and copies nothing."""
    kind, files = inspect_source(source, column)
    check_choice(kind, source, column=column, config=config)
    path = Path(source).expanduser().absolute()
    root = str(path.parent if path.is_file() else path)
    if kind == "saved":
        return {
            str(split): sorted(str(file) for file in folder.glob("*.arrow") if not file.name.startswith("cache-"))
            for split, folder in _saved_splits(path).items()
        }
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


def _saved_splits(path: Path) -> dict[str, Path]:
    """The folders that `save_to_disk` made of the splits."""
    import datasets

    if (path / "dataset_dict.json").is_file():
        return {folder.name: folder for folder in sorted(path.iterdir()) if (folder / "state.json").is_file()}
    with explained(f"cannot read {str(path)!r}"):
        return {str(datasets.load_from_disk(str(path)).split or "train"): path}


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
        _check_there(locations, source)
    column = "" if images else _column(source, locations[0], column, patience)
    name = f"{posixpath.basename(source.rstrip('/'))}:{found}"
    return Shards(name, locations, column, _count(source, found, locations, images, cache_dir, config))


def _column(source: str, location: str, column: str, patience: Patience) -> str:
    """The column of images, or their ending in tars, as the first shard has it; says what tars leave out."""
    kind = shard_kind(location)
    if kind in ("parquet", "arrow"):
        with _named_damage(location):
            rows = first_rows(location, 32, patience)
        return image_column(_dataset(rows), source, column)
    if kind != "tar":
        check_choice("images", source, column=column, config="")
        return ""
    ending = tar_ending(column)
    if ending or not is_remote(location):  # of remote ones the first that are read tell the rest
        with open_shard(location, patience) as file:
            notes = first_notes(file, location, ending, _REMOTE_FILES if is_remote(location) else _LOCAL_FILES)
        notes.say(f"the first files of {location}", ending)
    return ending


def _check_there(files: list[str], source: str) -> None:
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise ValueError(
            f"{missing[0]} is missing, one of {len(missing)} missing among the {len(files)} files of {source!r}; bring "
            "them back, or give their folder as the source, for what is there"
        )
    if pointers := [file for file in files if is_pointer_file(file)]:
        raise ValueError(f"{pointers[0]}, of {source!r}, is one of the {LFS_ADVICE}")


@contextlib.contextmanager
def _named_damage(location: str) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"{location} {_DAMAGE % reason_of(error)}") from error


def _dataset(table: pa.Table) -> Any:
    import datasets

    return datasets.Dataset(table, fingerprint="rows")


def _count(source: str, split: str, locations: Sequence[str], images: bool, cache_dir: str | None, config: str) -> int:
    """Images in all, where that can be known without reading them; else 0."""
    if images:
        return len(locations)
    if is_remote(locations[0]):
        if locations[0].startswith("hf://") and not is_remote(source):
            told = (source_builder(source, cache_dir, config=config).info.splits or {}).get(split)
            return (told.num_examples or 0) if told else 0
        return 0
    kind = shard_kind(locations[0])
    return sum(_rows_in(location) for location in locations) if kind in ("parquet", "arrow") else 0


def _rows_in(location: str) -> int:
    import datasets

    with _named_damage(location):
        if shard_kind(location) == "parquet":
            return pq.read_metadata(location).num_rows
        return len(datasets.Dataset.from_file(location))


def sample_images(shards: Shards, path: Path, *, count: int, patience: Patience) -> Path:
    """Write about count images, the first of up to 16 shards, to an Arrow file that `open_images` reads.

    Labels come along where the shards have them. Of damaged shards it takes what comes before the damage, as training
    does. What is there already is kept, so that resumed runs use the same.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    locations = list(shards.locations)
    if shard_kind(locations[0]) in ("image", None):  # one image each
        locations = locations[:: max(1, len(locations) // count)][:count]
        each = 1
    else:
        locations = locations[:: -(-len(locations) // _SAMPLED_SHARDS)]
        each = -(-count // len(locations))
    _log.info("%s: reading %d images for the health check and the report into %s", shards.name, count, path)
    damage: list[str] = []
    tables = _first_tables(shards, locations, each, patience, damage)
    written = 0
    try:
        if (first := next(tables, None)) is not None:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
                for table in itertools.chain([first], tables):
                    writer.write_table(table.cast(first.schema))
                    written += table.num_rows
        if not written:
            why = damage[0] if damage else "the first rows of its shards hold no images; check data.source"
            raise ValueError(f"{shards.name}: {why}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


class Preview(ImageSet):
    """A few images of a set that stand for all of it: each for those of the indices next to its own."""

    def __init__(self, held: ImageSet, num_images: int) -> None:
        self.__dict__.update(held.__dict__)
        self._num_held, self.num_images = len(held), num_images

    def _value(self, index: int) -> Any:
        return super()._value(index * self._num_held // self.num_images)


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
    check_copy(builder, find_split(list(map(str, builder.config.data_files)), split, source), source, cache_dir)
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
        return Preview(
            open_file(path, name=name, max_pixels=max_pixels), shards.num_images
        )  # mapped: it lives on without its name


def _first_tables(
    shards: Shards, locations: list[str], count: int, patience: Patience, damage: list[str]
) -> Iterator[pa.Table]:
    """The first images of each shard; what keeps one from being read at all is added to damage."""
    for location in locations:
        try:
            if shard_kind(location) in ("parquet", "arrow", "tar"):
                yield _first_labelled(location, shards.column, count, patience)
            else:
                yield _image_row(location, shards.locations, patience)
        except DAMAGED as error:
            damage.append(f"{location} {_DAMAGE % reason_of(error)}")


def _image_row(location: str, locations: Sequence[str], patience: Patience) -> pa.Table:
    """An image that is a shard of its own; no row for a dead link of a list, which training passes over, too."""
    try:
        content = read_listed(location, locations, patience) if is_remote(location) else Path(location).read_bytes()
    except DeadLinkError:
        return _SCHEMA.empty_table()
    return pa.Table.from_pylist([{"image": {"bytes": content, "path": location}}], _SCHEMA)


def _first_labelled(location: str, column: str, count: int, patience: Patience) -> pa.Table:
    """The first images of a shard, with what labels it has."""
    if shard_kind(location) != "tar":
        features = _dataset(first_rows(location, 0, patience)).features
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
        notes.say(f"the first images of {location}", column)
    return pa.Table.from_pylist(rows, _SCHEMA)
