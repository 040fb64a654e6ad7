"""CSV, TSV and JSON Lines files that list images: which column holds the paths, and the labels."""

import functools
import logging
import os
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from ijepa_scale.data.remote import is_remote
from ijepa_scale.data.shards import shard_kind

_log = logging.getLogger(__name__)

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
PATH_COLUMNS = ("image", "image_path", "path", "file_name", "file", "filename", "image_url", "url")  # looked at first
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")
_SAMPLED = 64


@dataclass(frozen=True)
class ListedImages:
    """paths: absolute, or URLs. labels: a number or a name an image, None where one has none; [] without labels."""

    paths: list[str]
    labels: list[int | str | None]


def is_table(name: str) -> bool:
    return name.lower().endswith(TABLE_ENDINGS)


def tables_at(folder: str) -> list[str]:
    """The tables in a folder itself, by name."""
    return sorted(name for name in os.listdir(folder) if is_table(name) and not name.startswith("."))


def listed_images(path: str) -> ListedImages:
    """The images that a table lists, by paths relative to the table. ValueError where no column holds such paths."""
    stat = os.stat(path)
    return _listed_images(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _listed_images(path: str, size: int, changed: int) -> ListedImages:
    try:
        if path.lower().endswith((".csv", ".tsv")):
            options = pa.csv.ParseOptions(delimiter="\t" if path.lower().endswith(".tsv") else ",")
            table = pa.csv.read_csv(path, parse_options=options)
        else:
            table = pa.json.read_json(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    for name in (*PATH_COLUMNS, *LABEL_COLUMNS):
        if name in table.column_names and pa.types.is_binary(table.schema.field(name).type):
            raise ValueError(f"the column {name!r} of {path} is not UTF-8 text; save the file in that encoding")
    images = [name for name in table.column_names if is_remote(name) or shard_kind(name) == "image"]
    if images:
        raise ValueError(
            f"{path} begins with an image, {images[0]!r}, where the names of columns belong; add a first line such as "
            "path,label"
        )
    return ListedImages(_paths(table, path), _labels(table))


def _paths(table: pa.Table, source: str) -> list[str]:
    root = os.path.dirname(source)
    texts = [name for name in table.column_names if _is_text(table.schema.field(name).type)]
    texts.sort(key=lambda name: PATH_COLUMNS.index(name) if name in PATH_COLUMNS else len(PATH_COLUMNS))
    columns = {}
    for name in texts:
        values = [value or "" for value in table.column(name).to_pylist()]
        columns[name] = [value if is_remote(value) else os.path.join(root, value) for value in values]
    for is_image in (os.path.isfile, lambda path: is_remote(path) and shard_kind(path) == "image", is_remote):
        for name, paths in columns.items():
            if any(map(is_image, paths[:: max(1, len(paths) // _SAMPLED)])):
                _log.info("%s: the images are those of its column %r", source, name)
                return paths
    for name in texts:
        if name in PATH_COLUMNS and any(map(os.path.isfile, columns[name])):
            return columns[name]
    first = next(iter(columns.items()), None)
    tried = f"the first value of {first[0]!r} would be {first[1][0]!r}" if first and first[1] else "there are none"
    raise ValueError(
        f"no column of {source} holds paths of existing image files, relative to the table or absolute: {tried}; its "
        f"columns are: {', '.join(table.column_names)}"
    )


def _labels(table: pa.Table) -> list[int | str | None]:
    for name in LABEL_COLUMNS:
        if name in table.column_names:
            kind = table.schema.field(name).type
            if pa.types.is_integer(kind) or _is_text(kind):
                return table.column(name).to_pylist()
    return []


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
