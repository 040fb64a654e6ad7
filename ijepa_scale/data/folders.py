"""Files of a data folder, and the splits and classes that their names and folders tell."""

import functools
import itertools
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ijepa_scale.data.transforms import image_extensions

_log = logging.getLogger(__name__)

SPLIT_NAMES = {  # as `datasets` reads them in the names of files and folders
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class FolderSplit:
    """Image files of one split, relative to the folder of all, and the names of their classes (none: no labels)."""

    files: list[str]
    classes: list[str]

    def labels(self) -> list[int]:
        """Indices into classes, one for each file: the class is the name of the folder it lies in."""
        number = {name: i for i, name in enumerate(self.classes)}
        return [number[file.split("/")[-2]] for file in self.files]


def list_files(root: str) -> dict[str, list[str]]:
    """Files below root that may be data, by kind, relative to root and sorted."""
    kinds = dict.fromkeys(image_extensions(), "images") | {".parquet": "parquet", ".arrow": "arrow"}
    files: dict[str, list[str]] = {"parquet": [], "arrow": [], "tar": [], "images": []}
    for path in _walk(root, "", ()):
        is_tar = path.lower().endswith((".tar", ".tar.gz", ".tgz"))
        kind = "tar" if is_tar else kinds.get(os.path.splitext(path)[1].lower())
        if kind and not (kind == "arrow" and os.path.basename(path).startswith("cache-")):  # left by `Dataset.map`
            files[kind].append(path)
    return {kind: sorted(paths) for kind, paths in files.items()}


def _walk(root: str, folder: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Relative paths of all files below root/folder that are not hidden. Follows links, except in circles."""
    here = os.path.join(root, folder)
    stat = os.stat(here)
    if (stat.st_dev, stat.st_ino) in ancestors:
        return
    ancestors += ((stat.st_dev, stat.st_ino),)
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            path = os.path.join(folder, entry.name)
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from _walk(root, path, ancestors)
            else:
                yield path


def shard_splits(files: list[str]) -> dict[str, list[str]]:
    """Shards by the split that their folder or name tells (data-train-00000-of-00002.arrow), else train."""
    by_split: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.lower())
        by_split.setdefault(next((SPLIT_NAMES[w] for w in words if w in SPLIT_NAMES), "train"), []).append(file)
    return by_split


def image_splits(root: str, files: list[str]) -> dict[str, FolderSplit]:
    """Image files by split. The first folders that differ are splits if all, or two of them, are named so; else all is
    train. A folder that holds all files tells nothing, unless it is named as a split.

    A split whose images all lie in one level of folders is labelled with these; numbers are the same in all splits.
    root: where the files are, for warnings.
    """
    shared = _shared(files)
    tops = {_top(file[len(shared) :]) for file in files}
    named = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    if len(named) < len(tops) and len(set(named.values())) < 2:
        named = {}
    by_split: dict[str, list[str]] = {}
    for file in files:
        split = named.get(_top(file[len(shared) :])) if named else "train"
        if split is not None:
            by_split.setdefault(split, []).append(file)
    ignored = sorted(printable(top) or "images at the top" for top in tops - named.keys()) if named else []
    if ignored:
        warn_once(f"{printable(root)}: in no split, so left out: {', '.join(ignored)}")
    if not named:
        _warn_of_deeper_splits(root, shared, files)
    depth = shared.count("/") + (2 if named else 1)
    labelled = {split for split, part in by_split.items() if all(file.count("/") == depth for file in part)}
    classes = sorted({file.split("/")[-2] for split in labelled for file in by_split[split]})
    classes = classes if len(classes) > 1 else []
    return {split: FolderSplit(by_split[split], classes if split in labelled else []) for split in sorted(by_split)}


def _shared(files: list[str]) -> str:
    """The folders that all files lie in, with a slash at the end, up to the first that is named as a split."""
    common = os.path.commonpath([os.path.dirname(min(files)), os.path.dirname(max(files))])  # then it is all files'
    folders = itertools.takewhile(lambda folder: folder and folder.lower() not in SPLIT_NAMES, common.split("/"))
    return "".join(f"{folder}/" for folder in folders)


def _warn_of_deeper_splits(root: str, shared: str, files: list[str]) -> None:
    folders = {os.path.dirname(file[len(shared) :]) for file in files}
    deeper = {name for folder in folders for name in folder.split("/")[1:] if name.lower() in SPLIT_NAMES}
    if len({SPLIT_NAMES[name.lower()] for name in deeper}) > 1:
        warn_once(
            f"{printable(root)}: all images are taken for training, also those in folders named "
            f"{', '.join(sorted(deeper))}, which lie too deep to be splits; to have splits, give the folder that holds "
            "these as the source"
        )


def _top(file: str) -> str:
    """The folder at the top that holds a file; "" for a file at the top itself."""
    return file.partition("/")[0] if "/" in file else ""


@functools.lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """A source is looked at several times before training starts."""
    _log.warning("%s", text)


def printable(path: str) -> str:
    """A path in printable form: names of files need not be UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()
