"""Files of a data folder, and the splits and classes that their names and folders tell."""

import functools
import logging
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ijepa_scale.data.decoding import begins_as_image, image_extensions
from ijepa_scale.data.files import CACHE_TAG

_log = logging.getLogger(__name__)

SPLIT_NAMES = {  # as `datasets` reads them in the names of files and folders
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# What Windows, macOS, Synology and QNAP keep beside files: what was deleted, thumbnails, snapshots. In lower case.
SYSTEM_FOLDERS = {
    *("$recycle.bin", "system volume information", "__macosx"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),
}

# Runs of this package, whose pictures are no data, and caches (bford.info/cachedir).
OWN_FOLDERS = (("metrics.jsonl", "config.yaml"), (CACHE_TAG,))


@dataclass(frozen=True)
class FolderSplit:
    """Image files of one split, relative to the folder of all, and the names of their classes (none: no labels)."""

    files: list[str]
    classes: list[str]

    def labels(self) -> list[int | None]:
        """Indices into classes, one for each file: the class is the name of the folder it lies in.

        Files beside the class folders have none.
        """
        number = {name: i for i, name in enumerate(self.classes)}
        depth = max(file.count("/") for file in self.files)
        return [number[file.split("/")[-2]] if file.count("/") == depth else None for file in self.files]


@dataclass(frozen=True)
class Listing:
    """What lies below a folder: files that may be data, by kind; the others; folders that are not looked into.

    All are relative to the folder and sorted.
    """

    kinds: dict[str, list[str]]
    others: list[str]
    system: list[str]


def list_files(root: str) -> Listing:
    """The files below root by what they may be.

    Files without an ending are images if they begin as such. What is hidden is passed over.
    """
    kinds = dict.fromkeys(image_extensions(), "images") | {".parquet": "parquet", ".arrow": "arrow"}
    files: dict[str, list[str]] = {"parquet": [], "arrow": [], "tar": [], "images": []}
    others: list[str] = []
    system: list[str] = []
    for path in _walk(root, "", (), system):
        is_tar = path.lower().endswith((".tar", ".tar.gz", ".tgz"))
        ending = os.path.splitext(path)[1].lower()
        kind = "tar" if is_tar else kinds.get(ending)
        if kind is None and not ending and begins_as_image(os.path.join(root, path)):
            kind = "images"
        if kind == "arrow" and os.path.basename(path).startswith("cache-"):  # left by `Dataset.map`
            continue
        (files[kind] if kind else others).append(path)
    return Listing({kind: sorted(paths) for kind, paths in files.items()}, sorted(others), sorted(system))


def _walk(root: str, folder: str, ancestors: tuple[tuple[int, int], ...], system: list[str]) -> Iterator[str]:
    """Relative paths of all files below root/folder that are not hidden. Follows links, except in circles.

    Folders of SYSTEM_FOLDERS and those that hold files of OWN_FOLDERS are added to system instead.
    """
    here = os.path.join(root, folder)
    try:
        stat = os.stat(here)
        if (stat.st_dev, stat.st_ino) in ancestors:
            return
        with os.scandir(here) as scanned:
            entries = list(scanned)
    except PermissionError:
        if not folder:
            raise
        warn_once(f"{printable(here)}: no permission to read this folder, so what lies in it is left out")
        return
    ancestors += ((stat.st_dev, stat.st_ino),)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = os.path.join(folder, entry.name)
        if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
            yield path
        elif entry.name.lower() in SYSTEM_FOLDERS or any(_has(entry.path, names) for names in OWN_FOLDERS):
            system.append(path)
        else:
            yield from _walk(root, path, ancestors, system)


def whole_split(name: object) -> str:
    """Of what `datasets` calls a saved split, train where it is a part, as of train[:10%], and where it has no name."""
    return re.split(r"[\[+]", str(name or "train"))[0]


def _has(folder: str, names: tuple[str, ...]) -> bool:
    return all(os.path.isfile(os.path.join(folder, name)) for name in names)


def judging_split(splits: Collection[str], besides: str = "") -> str:
    """The validation split by any of its names, else the test split; "" where there is none. besides: not this one."""
    kept = [name for name, meaning in SPLIT_NAMES.items() if meaning != "train" and name != besides]
    return next((name for name in kept if name in splits), "")


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

    A split whose images lie in one level of folders is labelled with these; numbers are the same in all splits. Stray
    images above that level, fewer than those in it, have no label. root: where the files are, for warnings.
    """
    shared = _shared(files)
    top_of = [_top(file, shared) for file in files]
    tops = set(top_of)
    named = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    if tops - named.keys() == {""} and set(named.values()) == {"train"}:
        named[""] = "train"
    if len(named) < len(tops) and len(set(named.values())) < 2:
        named = {}
    by_split: dict[str, list[str]] = {}
    for file, top in zip(files, top_of, strict=True):
        split = named.get(top) if named else "train"
        if split is not None:
            by_split.setdefault(split, []).append(file)
    ignored = sorted(printable(top) or "images at the top" for top in tops - named.keys()) if named else []
    if ignored:
        warn_once(f"{printable(root)}: in no split, so left out: {', '.join(ignored)}")
    if not named:
        _warn_of_deeper_splits(root, shared, files)
    depth = shared.count("/") + (2 if named else 1)
    labelled = {split for split, part in by_split.items() if _one_level(part, depth)}
    classes = sorted({f.split("/")[-2] for split in labelled for f in by_split[split] if f.count("/") == depth})
    classes = classes if len(classes) > 1 else []
    if strays := [f for split in labelled for f in by_split[split] if classes and f.count("/") < depth]:
        warn_once(
            f"{printable(root)}: {len(strays)} of the images, such as {printable(strays[0])}, lie outside of "
            "the folders that are taken for classes: they are trained on, and have no label"
        )
    return {split: FolderSplit(by_split[split], classes if split in labelled else []) for split in sorted(by_split)}


def _one_level(files: list[str], depth: int) -> bool:
    """Whether most files lie under depth folders, and none under more."""
    depths = [file.count("/") for file in files]
    return max(depths) == depth and 2 * depths.count(depth) > len(files)


def _shared(files: list[str]) -> str:
    """The folders that all files lie in, but for a few above, with a slash at the end; up to one named as a split."""
    shared = ""
    while True:
        below = [file for file in files if file.find("/", len(shared)) >= 0]
        tops = {_top(file, shared) for file in below}
        top = next(iter(tops), "")
        if len(tops) != 1 or top.lower() in SPLIT_NAMES or 2 * len(below) <= len(files):
            return shared
        shared, files = f"{shared}{top}/", below


def _warn_of_deeper_splits(root: str, shared: str, files: list[str]) -> None:
    folders = {os.path.dirname(file[len(shared) :]) for file in files if file.startswith(shared)}
    deeper = {name for folder in folders for name in folder.split("/")[1:] if name.lower() in SPLIT_NAMES}
    if len({SPLIT_NAMES[name.lower()] for name in deeper}) > 1:
        warn_once(
            f"{printable(root)}: all images are taken for training, also those in folders named "
            f"{', '.join(sorted(deeper))}, which lie too deep to be splits; to have splits, give the folder that holds "
            "these as the source"
        )


def _top(file: str, shared: str) -> str:
    """The first folder below shared that holds a file; "" for a file in or above shared."""
    if not file.startswith(shared):
        return ""
    end = file.find("/", len(shared))
    return file[len(shared) : end] if end >= 0 else ""


def warn_once(text: str) -> None:
    """A source is looked at several times before training starts."""
    say_once(logging.WARNING, text)


@functools.lru_cache(maxsize=64)
def say_once(level: int, text: str) -> None:
    """Log a text at its first time only."""
    _log.log(level, "%s", text)


def printable(path: str) -> str:
    """A path in printable form: names of files need not be UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()
