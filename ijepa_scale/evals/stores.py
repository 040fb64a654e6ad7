"""Where extracted features go: memory, or .npy files that are whole at the end, and that a stop may leave half done.

A half is kept as .NAME.npy.half, with what it was made with, and how far it got, in JOURNAL: the rows up to there are
on the disk. What a kill leaves past them is cut off by whoever goes on.
"""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ijepa_scale.data.files import read_array, write_whole, written_whole

JOURNAL = ".half.json"
SAVE_SECONDS = 10.0  # between two entries of the journal: what a kill costs at most


@dataclass
class InMemory:
    parts: list[np.ndarray] = field(default_factory=list)

    def append(self, rows: np.ndarray) -> None:
        self.parts.append(rows)

    def end(self) -> None:
        """There is nothing to do."""

    def rows_read(self) -> np.ndarray:
        return np.concatenate(self.parts)


@dataclass
class OnDisk:
    """Rows go to the end of a .npy file; how many they are is written at its beginning last."""

    file: BinaryIO
    path: Path
    rows: int = 0
    shape: tuple[int, ...] = ()  # of a row
    start: int = 0

    def append(self, rows: np.ndarray) -> None:
        if not self.rows:
            self._begin(rows.shape[1:])
        rows.tofile(self.file)
        self.rows += len(rows)

    def end(self) -> None:
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.start, "NumPy keeps room for the number of rows to grow"

    def rows_read(self) -> np.ndarray:
        """Once the file has its name."""
        return read_array(self.path)

    def go_on(self, rows: int, shape: Sequence[int]) -> bool:
        """Take up what the file holds, less what is past so many rows. False, and nothing done, if it holds fewer."""
        size = os.fstat(self.file.fileno()).st_size
        if rows:
            self._begin(tuple(shape))
        wanted = self.start + 4 * rows * math.prod(shape)
        if size < wanted:
            return False
        self.file.truncate(wanted)
        self.file.seek(wanted)
        self.rows = rows
        return True

    def begin_anew(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.rows, self.start = 0, 0

    def to_disk(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def _begin(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.file.seek(0)
        self._write_header()
        self.start = self.file.tell()

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)


@contextlib.contextmanager
def open_stores(
    folder: Path | None, names: Sequence[str], facts: dict[str, Any] | None, total: int
) -> Iterator["Stores"]:
    """A store by each name: in memory without a folder, else files, that get their names at the end of the block.

    facts, total: what the rows are made with, and of how many images. An error or a stop then leaves the halves, and
    what such an extraction has left is taken up; None: nothing is left or taken up. Raises ValueError where another
    process writes there.
    """
    if folder is None:
        yield Stores({name: InMemory() for name in names})
        return
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.npy" for name in names}
    journal = None if facts is None else Journal(folder, json.loads(json.dumps(facts)))
    if journal:
        journal.reopen(list(paths.values()), total)
    with contextlib.ExitStack() as files:
        opened = _kept_half if journal else written_whole
        stores = Stores(
            {name: OnDisk(files.enter_context(opened(path)), path) for name, path in paths.items()}, journal
        )
        try:
            yield stores
        except KeyboardInterrupt:
            stores.save()
            raise


class Stores:
    """The stores of an extraction, and how far it is. done: images; unreadable: those of them that have no row, why."""

    def __init__(self, stores: Mapping[str, Any], journal: "Journal | None" = None) -> None:
        self._stores, self._journal = stores, journal
        self._rows, self.done, self.unreadable = journal.take_up(stores) if journal else (0, 0, {})

    def begun(self, total: int) -> str:
        """What to say of halves; "" where there were none."""
        if self.done:
            return f"going on after {self.done:,} of {total:,} images: this was stopped before"
        if self._journal and self._journal.replaced:
            return f"what another command had left half done in {self._journal.folder} is deleted"
        return ""

    def append(self, found: Sequence[Sequence[np.ndarray]], done: int, unreadable: dict[int, str]) -> None:
        """found: of each further image that can be read a row for every store. done: images by now."""
        for store, rows in zip(self._stores.values(), zip(*found, strict=True), strict=False):  # none was read
            store.append(np.stack(rows))
        self._rows, self.done, self.unreadable = self._rows + len(found), done, unreadable
        if self._journal and self._journal.due():
            self.save()

    def save(self) -> None:
        """So that what is there by now is kept, if anything is."""
        if self._journal:
            self._journal.save(self._stores, done=self.done, rows=self._rows, unreadable=self.unreadable)

    def end(self) -> None:
        for store in self._stores.values():
            store.end()
        self.save()

    def discard(self) -> None:
        if self._journal:
            forget_half(self._journal.folder)

    def rows_read(self) -> dict[str, np.ndarray]:
        """By name; once the block has ended."""
        return {name: store.rows_read() for name, store in self._stores.items()}


@contextlib.contextmanager
def _kept_half(path: Path) -> Iterator[BinaryIO]:
    """As written_whole(), but what an error interrupts stays, under the name of the half, to be opened again."""
    half = _half_of(path)
    with os.fdopen(os.open(half, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, not with its loader processes
        except OSError as error:
            raise ValueError(
                f"{path.parent} is being written by another process; wait for it, or choose another folder"
            ) from error
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(half, path)


def _half_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.half")


def read_journal(folder: Path) -> dict[str, Any] | None:
    """What a stopped extraction says of itself: "facts", "done" images, "rows", "shapes", "unreadable"; else None."""
    path = folder / JOURNAL
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # which is there whole


def forget_half(folder: Path) -> None:
    """Delete what may be left of a stopped extraction."""
    for path in [folder / JOURNAL, *folder.glob(".*.npy.half")]:
        path.unlink(missing_ok=True)


@dataclass
class Journal:
    """How far an extraction got. facts: what it is made with, as JSON holds it: a half of another one is none of it."""

    folder: Path
    facts: dict[str, Any]
    saved_at: float = field(default_factory=time.monotonic)
    replaced: bool = False  # whether the half of another one was deleted

    def take_up(self, stores: Mapping[str, OnDisk]) -> tuple[int, int, dict[int, str]]:
        """Bring stores to where a stopped extraction left them: its rows, its images, and those of them without a row.

        All is begun anew where there is none, or one of other facts.
        """
        left = self._left()
        if left and all([store.go_on(left["rows"], left["shapes"][name]) for name, store in stores.items()]):
            return left["rows"], left["done"], {int(index): reason for index, reason in left["unreadable"].items()}
        self.replaced = (self.folder / JOURNAL).exists()
        (self.folder / JOURNAL).unlink(missing_ok=True)
        for store in stores.values():
            store.begin_anew()
        own = {_half_of(store.path) for store in stores.values()}
        for other in set(self.folder.glob(".*.npy.half")) - own:
            other.unlink()
        return 0, 0, {}

    def _left(self) -> dict[str, Any] | None:
        left = read_journal(self.folder)
        return left if left and left["facts"] == self.facts else None

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= SAVE_SECONDS

    def save(self, stores: Mapping[str, OnDisk], *, done: int, rows: int, unreadable: dict[int, str]) -> None:
        """Rows first: what the journal speaks of is on the disk."""
        for store in stores.values():
            store.to_disk()
        entry = {
            "facts": self.facts,
            "done": done,
            "rows": rows,
            "shapes": {name: store.shape for name, store in stores.items()},
            "unreadable": unreadable,
        }
        write_whole(self.folder / JOURNAL, json.dumps(entry))
        self.saved_at = time.monotonic()

    def reopen(self, paths: Sequence[Path], total: int) -> None:
        """Before stores are opened: what has its name already, though what goes with it is missing, is a half again."""
        left = self._left()
        if left and left["done"] == total:
            for path in paths:
                if path.is_file() and not _half_of(path).exists():
                    os.replace(path, _half_of(path))
