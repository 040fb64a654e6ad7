"""What a source is, by its name and the names of its files: its kind, its files, and what may be chosen of it."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ijepa_scale.data.lfs import LFS_ADVICE, is_pointer_file
from ijepa_scale.data.sources.contents import folder_contents
from ijepa_scale.data.sources.folders import SPLIT_NAMES, shard_splits, warn_once
from ijepa_scale.data.sources.remote import hub_file, is_remote
from ijepa_scale.data.sources.shards import shard_kind
from ijepa_scale.data.sources.tables import is_table, listed_images, tables_at

HOW_TO_STREAM = "for training set data.streaming=true; for anything else give a folder of local files"


def find_split(splits: list[str], split: str, source: str) -> str:
    names = [name for name in splits if name == split]
    names += [name for name in splits if SPLIT_NAMES.get(name, name) == SPLIT_NAMES.get(split, split)]
    if not names:
        raise ValueError(f"{source!r} has no split {split!r}; it has: {', '.join(splits)}")
    return names[0]


def inspect_source(source: str, column: str = "") -> tuple[str, list[str]]:
    """The kind of a source (saved, parquet, arrow, tar, images, table, list, hub), and its files.

    Files are relative to the source's folder; of a list (URLs, or a path with braces) they are as given.
    column: of the images, where the user gave one, for a table that may list them.
    """
    with _permitted(source):
        return _inspect(source, column)


def check_there(source: str, *, streaming: bool) -> None:
    """ValueError for what is no file or folder here and cannot be elsewhere, or cannot be read so. It opens nothing."""
    path = Path(source).expanduser()
    with _permitted(source):
        if source != "scenes" and not path.exists():
            kind, files = _kind_elsewhere(source, repr(str(path.absolute())))
            if kind == "list" and not streaming:
                raise ValueError(f"{source!r} can be streamed only: {HOW_TO_STREAM}")
            if kind == "list" and not is_remote(source):
                check_all_there(files, source)


def check_all_there(files: list[str], source: str) -> None:
    """ValueError where some of the files that a source names are not on this machine."""
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise ValueError(
            f"{missing[0]} is missing, one of {len(missing)} missing among the {len(files)} files of {source!r}; bring "
            "them back, or give their folder as the source, for what is there"
        )
    if pointers := [file for file in files if is_pointer_file(file)]:
        raise ValueError(f"{pointers[0]}, of {source!r}, is one of the {LFS_ADVICE}")


@contextlib.contextmanager
def _permitted(source: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"no permission to read {str(error.filename)!r}, of the source {source!r}") from error


def _inspect(source: str, column: str) -> tuple[str, list[str]]:
    if not source:  # Path takes it for the folder one is in
        raise ValueError("the source is empty, as a shell variable that is not set; give a folder, a file or a Hub id")
    path = Path(source).expanduser()
    here = repr(str(path.absolute()))
    if path.is_file():
        if is_pointer_file(str(path)):
            raise ValueError(f"{here} is one of the {LFS_ADVICE}")
        kind = "table" if is_table(path.name) else shard_kind(path.name)
        if kind in (None, "image"):
            raise ValueError(
                f"{here} is a single file; wants a folder, or a .parquet, .arrow, .tar, .csv, .tsv or .jsonl file"
            )
        return str(kind), [path.name]
    if path.is_dir():
        return _inspect_folder(path, here, column)
    return _kind_elsewhere(source, here)


def _kind_elsewhere(source: str, here: str) -> tuple[str, list[str]]:
    """As of inspect_source(), of what is no file or folder."""
    _refuse_scheme(source)
    if is_remote(source) or "{" in source:
        return "list", _listed_locations(source)
    if source == "scenes":  # which training renders before it gets here
        raise ValueError(
            f"there is no folder {here}, and only data.source=scenes of training renders scenes; give a folder"
        )
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):  # nor has it the form of a Hub id
        raise ValueError(f"there is no folder {here}; the source (data.source of a config) must name an existing one")
    return "hub", []


def _inspect_folder(path: Path, here: str, column: str) -> tuple[str, list[str]]:
    if (path / "dataset_dict.json").is_file() or _is_saved(path / "state.json"):
        return "saved", []
    found = folder_contents(str(path))
    if found.kind in ("images", "") and (tables := _tables_of(path, len(found.files), column)):
        return "table", tables
    if not found.files:
        held = f"; it holds {', '.join(found.left_out)}" if found.left_out else ""
        raise ValueError(
            f"the folder {here} holds no Parquet, Arrow, tar or image files at any depth, and no table that lists "
            f"images{held}"
        )
    found.say(str(path))
    return found.kind, found.files


def _is_saved(state: Path) -> bool:
    """Whether `save_to_disk` has written it: other programs call a file so, too."""
    try:
        return "_data_files" in json.loads(state.read_bytes())
    except FileNotFoundError:
        return False
    except (ValueError, TypeError, OSError):  # damaged, it is told when it is opened
        return True


def _refuse_scheme(source: str) -> None:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if scheme and not is_remote(source):
        mount = "mount it as a folder, copy it here, or give https:// URLs"
        raise ValueError(
            f"{source!r} cannot be read: {scheme[0]} is not among what a source may be (a local path, a Hub id, "
            "http://, https:// or hf://datasets/OWNER/NAME/FILE); "
            + (f"give {source[7:]}" if scheme[1] == "file" else mount)
        )


def _listed_locations(source: str) -> list[str]:
    locations = expand_braces(source if is_remote(source) else os.path.expanduser(source))
    for location in locations:
        if location.startswith("hf://") and hub_file(location) is None:
            raise ValueError(
                f"{location!r} names no file on the Hub: that is hf://datasets/OWNER/NAME/FILE, or "
                "hf://datasets/OWNER/NAME@REVISION/FILE; a whole data set is given by its id alone, OWNER/NAME"
            )
    return locations


def is_mapped(source: str, *, column: str = "") -> bool:
    """Whether images of a source are read by index where they are, without a copy or an index of them."""
    kind, files = inspect_source(source, column)
    if kind == "table":
        path = Path(source).expanduser()
        tables = [path] if path.is_file() else [path / file for file in files]
        return not any(is_remote(image) for table in tables for image in listed_images(str(table), column).paths)
    return kind in ("saved", "arrow", "images")


def _tables_of(folder: Path, num_files: int, column: str) -> list[str]:
    """The tables in a folder that list its images, one a split. num_files: the images that it could be read by, too."""
    tables = tables_at(str(folder))
    if not tables or any(len(files) > 1 for files in shard_splits(tables).values()):
        if tables and not num_files:
            raise ValueError(
                f"{folder} holds several tables for one split: {', '.join(tables)}; give one of them as the source"
            )
        return []
    listed: set[str] = set()
    for table in tables:
        try:
            listed.update(listed_images(str(folder / table), column).paths)
        except ValueError as error:
            if not num_files:
                raise
            warn_once(f"{error}; all image files below {folder} are read instead")
            return []
    if len(listed) < num_files:
        warn_once(
            f"{', '.join(tables)} in {folder} lists {len(listed)} images, and {num_files} lie there: only those listed "
            "are read; to read all, move it elsewhere"
        )
    return tables


def expand_braces(text: str) -> list[str]:
    """ "x-{000..002}.tar" -> three names; {a,b} as well, and several braces in one text."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        width = len(numbers[1])
        parts = [f"{i:0{width}}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        parts = match[1].split(",")
    if not parts or (len(parts) == 1 and not numbers):
        raise ValueError(f"{text!r}: braces hold a range, as {{0000..0015}}, or choices, as {{a,b}}; got {match[0]}")
    return [text[: match.start()] + part + rest for part in parts for rest in expand_braces(text[match.end() :])]


def check_choice(kind: str, source: str, *, column: str, config: str) -> None:
    """ValueError for a column or a configuration of what has none."""
    if config and (kind not in ("parquet", "hub") or Path(source).expanduser().is_file()):
        raise ValueError(
            f"data.config is {config!r}, and {source!r} has no configurations: a data set of the Hub has them, or a "
            "folder of Parquet files whose README.md lists some; leave it out"
        )
    if column and kind == "images":
        raise ValueError(
            f"data.column is {column!r}, and {source!r} is a folder of image files, which has no columns; leave it out"
        )
