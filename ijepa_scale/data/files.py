"""Files and folders that are written whole or not at all, and the cache, for what is made once of a source."""

import contextlib
import errno
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

CACHE_TAG = "CACHEDIR.TAG"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` at the end of the block, in the place of what was there.

    It is on the disk by then, so that neither a kill nor a power cut leaves half of it under that name. After an error
    all is as before. Several processes may write the same path: the last one's content stays.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` at the end of the block, in the place of what was there.

    All of it is on the disk by then. After an error all is as before. What is replaced is moved aside first, next to
    it: a kill between the two moves leaves it there, under a hidden name that ends in .replaced.
    """
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (
        path.with_name(f".{path.name}.{secrets.token_hex(4)}.{end}") for end in ("partial", "replaced")
    )
    partial.mkdir()
    try:
        yield partial
        for written in (*partial.rglob("*"), partial):
            sync(written)
        if path.exists():
            os.rename(path, replaced)
        os.rename(partial, path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped: what is not looked at is not read, and a header cannot ask for memory.

    ValueError for a file that is damaged, or that holds Python objects, which are never made.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, zipfile.BadZipFile, OverflowError) as error:
        raise ValueError(
            f"{path} is no whole .npy file of numbers ({error}): delete it, and it is made again"
        ) from error


def write_whole(path: Path, content: str) -> None:
    """Write a text, in UTF-8, whole or not at all."""
    with written_whole(path) as file:
        file.write(content.encode())


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that were killed had written so far. No other process may write to the folder now."""
    for leftover in folder.glob(".*.partial"):
        if leftover.is_file():
            leftover.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_path(path: str) -> Path:
    """An absolute path, the home folder in the place of ~. Raises ValueError where no home folder is known."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for the cache {path}; set data.cache_dir to another") from error


def make_cache(folder: Path) -> Path:
    """The folder, made if need be. Raises ValueError, naming data.cache_dir, where nothing can be written to it.

    A new one is marked as a cache: in a source what lies in it is no data.
    """
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if new:
            (folder / CACHE_TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} cannot be written: {error.strerror}; set data.cache_dir to one that can"
        ) from error
    return folder


def usable_cores() -> frozenset[int]:
    """Numbers of the cores that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
