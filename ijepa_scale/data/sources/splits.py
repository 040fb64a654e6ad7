"""The splits of a source, and how `datasets` opens each of them, to be read by index."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijepa_scale.data.files import make_cache
from ijepa_scale.data.sources.clones import clone_builder
from ijepa_scale.data.sources.copies import cache_folder, copied_split, explained
from ijepa_scale.data.sources.folders import FolderSplit, image_splits, printable, shard_splits, whole_split
from ijepa_scale.data.sources.inspection import HOW_TO_STREAM, check_choice, inspect_source
from ijepa_scale.data.sources.remote import is_remote
from ijepa_scale.data.sources.tables import ListedImages, listed_images
from ijepa_scale.data.sources.tars import tar_ending, tar_index

if TYPE_CHECKING:
    import datasets


def map_splits(
    source: str, cache_dir: str | None, *, column: str = "", config: str = ""
) -> tuple[str, dict[str, Callable[[], datasets.Dataset]]]:
    """The kind of a source, and how to load each of its splits: all files of a folder are listed, which takes time.

    column: of the images in a table, or their ending in tars.
    """
    kind, files = inspect_source(source, column)
    return kind, _loaders(kind, files, source, cache_dir, column, config)


def _loaders(
    kind: str, files: list[str], source: str, cache_dir: str | None, column: str, config: str
) -> dict[str, Callable[[], datasets.Dataset]]:
    import datasets

    check_choice(kind, source, column=column, config=config)
    path = Path(source).expanduser().absolute()
    root = str(path.parent if path.is_file() else path)
    if kind == "saved":
        if not any(path.rglob("*.arrow")):
            raise ValueError(f"{source!r} has no rows; it must hold at least one image")
        with explained(f"cannot read {source!r}"):
            saved = datasets.load_from_disk(str(path))
            saved = saved if isinstance(saved, datasets.DatasetDict) else {whole_split(saved.split): saved}
            for part in saved.values():
                _check_arrow(part)
        return {str(name): functools.partial(saved.__getitem__, name) for name in saved}
    if kind == "arrow":
        return {split: functools.partial(_arrow_files, root, part) for split, part in shard_splits(files).items()}
    if kind == "tar":
        index = functools.partial(_tar_files, root, cache=cache_folder(cache_dir), column=tar_ending(column))
        return {split: functools.partial(index, part) for split, part in shard_splits(files).items()}
    if kind == "table":
        tables = {
            split: listed_images(os.path.join(root, part[0]), column) for split, part in shard_splits(files).items()
        }
        names = sorted({label for table in tables.values() for label in table.labels if isinstance(label, str)})
        return {split: functools.partial(_listed_files, table, names) for split, table in tables.items()}
    if kind == "images":
        parts = image_splits(str(path), files)
        return {split: functools.partial(_image_files, str(path), part) for split, part in parts.items()}
    if kind == "list":
        raise ValueError(f"{source!r} can be streamed only: {HOW_TO_STREAM}")
    builder = source_builder(source, cache_dir, config=config)
    splits = builder.config.data_files or builder.info.splits or {}
    return {str(name): functools.partial(copied_split, builder, str(name), source, cache_dir) for name in splits}


def _arrow_files(root: str, files: list[str]) -> datasets.Dataset:
    import datasets

    with explained(f"cannot read the .arrow files of {root!r}"):
        read = datasets.concatenate_datasets([datasets.Dataset.from_file(os.path.join(root, file)) for file in files])
        _check_arrow(read)
        return read


def _check_arrow(dataset: datasets.Dataset) -> None:
    """Arrow believes the offsets of a file that it maps: where they are damaged, reading a row ends the process."""
    dataset.data.validate(full=True)


def _tar_files(root: str, files: list[str], cache: Path, column: str) -> datasets.Dataset:
    import datasets

    index = tar_index([os.path.join(root, file) for file in files], cache, column)
    return datasets.Dataset.from_file(str(index))


def _image_files(root: str, split: FolderSplit) -> datasets.Dataset:
    labels = split.labels() if split.classes else []
    return _files([os.path.join(root, file) for file in split.files], labels, split.classes)


def _listed_files(table: ListedImages, names: list[str]) -> datasets.Dataset:
    if url := next(filter(is_remote, table.paths), None):
        raise ValueError(f"the table lists URLs, such as {url!r}: {HOW_TO_STREAM}")
    number = {name: i for i, name in enumerate(names)}
    return _files(table.paths, [number[x] if isinstance(x, str) else x for x in table.labels], names)


def _files(paths: list[str], labels: list[int] | list[int | None], names: list[str]) -> datasets.Dataset:
    """A row for each file. names: of the classes, which labels number; none: the labels are the classes themselves."""
    import datasets
    import pyarrow as pa

    encoded = [os.fsencode(path) for path in paths]  # bytes: a name need not be UTF-8
    arrays = [pa.nulls(len(paths), pa.binary()), pa.array(encoded, pa.large_binary())]
    columns = {"image": pa.StructArray.from_arrays(arrays, ["bytes", "path"])}
    features: dict[str, Any] = {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("large_binary")}}
    if labels:
        columns["label"] = pa.array(labels, type=pa.int64())
        printed = [printable(name) for name in names]
        features["label"] = datasets.ClassLabel(names=printed) if names else datasets.Value("int64")
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(pa.table(columns), info=info, fingerprint="folder")  # else it hashes all of the paths


def source_builder(source: str, cache_dir: str | None, *, config: str = "") -> Any:
    """The `datasets` builder of Parquet or Hub data. config: one of its configurations; "": the only or usual one."""
    import datasets

    # It tells a server of every data set that it opens, of local files too, and waits for seconds where there is none.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    path = Path(source).expanduser().absolute()
    cache = str(make_cache(cache_folder(cache_dir)))
    missing = "" if path.exists() else f" on the Hub, and there is no folder {str(path)!r} either"
    with explained(f"cannot open {source!r}{missing}", hub_id="" if path.exists() else source):
        if path.is_file():
            return datasets.load_dataset_builder("parquet", data_files=str(path), cache_dir=cache)
        where = str(path) if path.is_dir() else source
        try:
            if path.is_dir():
                return clone_builder(where, inspect_source(source)[1], cache, config)
            return datasets.load_dataset_builder(where, name=config or None, cache_dir=cache)
        except ValueError:
            names: list[str] = []
            with contextlib.suppress(Exception):  # then it is the first error that tells
                names = datasets.get_dataset_config_names(where)
            if config in names or len(names) < (1 if config else 2):
                raise
    wrong = f"no configuration {config!r}, but" if config else "several configurations:"
    raise ValueError(
        f"{source!r} has {wrong} {', '.join(names)}; choose one, for example data.config={names[0]} (--config of "
        "ijepa-scale embed and ijepa-scale prepare)"
    )
