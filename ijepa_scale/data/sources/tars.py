"""WebDataset tars: their samples one after another, and an index that finds each image without unpacking anything.

As in WebDataset, files that follow one another and whose names agree up to their first dot are one sample: 0001.jpg,
0001.seg.png, 0001.cls. Its image is the one that most likely is the photograph (`columns.py`: jpg before left.png, that
before seg.png), or the one with the ending that was asked for; others are left out. Its label, if any, is the number in
its .cls file.

What follows a dot and is no name of a field (letters, then two digits at most, as in view12) belongs to the name of the
sample, as in IMG_2024.05.01.jpg and frame.0001.png: each is a sample of its own. But 0001.0.png, which follows a
0001.cls, is the image of that sample. All this depends on nothing but the files of the sample itself, so that a stream
can go on from the first file of any.

A link to another file of the tar is read there, where the tar is a local file that is not compressed.
"""

import fcntl
import functools
import gzip
import hashlib
import itertools
import json
import logging
import os
import posixpath
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from ijepa_scale.data.decoding import image_extensions
from ijepa_scale.data.files import make_cache, write_whole, written_whole
from ijepa_scale.data.sources.columns import standing
from ijepa_scale.data.sources.folders import printable, warn_once
from ijepa_scale.data.sources.remote import is_remote

_log = logging.getLogger(__name__)

_IMAGE = pa.struct(
    [
        ("bytes", pa.binary()),  # none: as for files of a folder
        ("path", pa.string()),  # the member's name, in printable form
        ("tar", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)
INDEX_SCHEMA = pa.schema([("image", _IMAGE), ("label", pa.int64())])
_FORMAT = 2  # of the index
_PIECE = 100_000  # rows of an index that are kept when its making is stopped
_FIELD = re.compile(r"[a-z][a-z_-]*\d{0,2}", re.IGNORECASE)  # seg, left_image, view12; not 05, 0001, x1y2
_DAMAGE = (tarfile.TarError, zlib.error, EOFError, OSError)
_LINKS = "links to files that are not in the tar, or that cannot be gone back to in a compressed or remote one"
_BARE, _NO_ENDING = "samples without such an image", "files whose names have no ending"


def open_tar(file: BinaryIO, location: str, start: int = 0) -> tarfile.TarFile:
    """A tar, compressed or not, from a member's first byte on."""
    if is_compressed(location):
        file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
    if start:
        file.seek(start)
    return tarfile.TarFile(fileobj=file, mode="r")


def tar_ending(column: str) -> str:
    """An ending as the user gave it, such as .seg.PNG, the way members are told apart by it."""
    return column.lower().removeprefix(".")


def is_compressed(location: str) -> bool:
    return re.search(r"\.t?gz([?#]|$)", location.lower()) is not None


@dataclass
class TarNotes:
    """What was met in tars: images by their endings, and what else was left out: how many, and the first name."""

    taken: dict[str, int] = field(default_factory=dict)
    further: dict[str, int] = field(default_factory=dict)  # in samples of which another image was taken, or none
    others: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, what: str, name: str) -> None:
        count, first = self.others.get(what, (0, printable(name)))
        self.others[what] = count + 1, first

    def say(self, where: str, column: str) -> None:
        """ValueError where nothing has the ending that was asked for. One line for the user where much is left out."""
        endings = ", ".join(sorted(self.taken.keys() | self.further.keys())) or "none"
        if column and not self.taken:
            raise ValueError(f"no image in {where} has the ending {column!r} (data.column); endings there: {endings}")
        said = []
        if (further := sum(self.further.values())) and not column:
            most = "most images, " * (further > sum(self.taken.values()))
            said.append(
                f"{most}{further:,} further images of samples ({_counts(self.further)}; read: {_counts(self.taken)}): "
                "files whose names agree up to their first dot are one sample; data.column (--column of other "
                "commands) chooses another ending"
            )
        said += [f"{what}: {count:,}, the first {name}" for what, (count, name) in self.others.items()]
        if said:
            warn_once(f"{where}: left out: {'; '.join(said)}")


def _counts(endings: dict[str, int]) -> str:
    shown = [f"{count:,} {ending}" for ending, count in sorted(endings.items(), key=lambda item: -item[1])]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more endings" if len(shown) > 5 else "")


@dataclass
class TarSample:
    """An image and its label. start: of the first file of the sample. offset, size: of the image's content."""

    key: str
    start: int
    name: str = ""
    ending: str = ""
    offset: int = 0
    size: int = 0
    content: bytes = b""
    label: int | None = None


def tar_samples(
    tar: tarfile.TarFile,
    location: str,
    *,
    column: str = "",
    contents: Callable[[int], bool] = lambda number: True,
    notes: TarNotes | None = None,
    limit: int | None = None,
) -> Iterator[TarSample]:
    """Every sample that has an image. Raises what tarfile and gzip do at damage, after the last that is whole.

    column: the ending of the images; "": the likeliest of each sample. contents: whether that of a sample, numbered
    from 0, is wanted; else it is empty. notes: to be told of what is left out. limit: how many files to look at.
    """
    notes = notes or TarNotes()
    links = _Links(location)
    sample: TarSample | None = None
    met: list[str] = []  # endings of the sample's images
    number = 0
    try:
        for member in itertools.chain(itertools.islice(_members(tar), limit), [None]):
            key, ending = _key(member, sample) if member else ("", "")
            if member and not ending:
                notes.leave_out(_NO_ENDING, member.name)
                continue
            if sample and key != sample.key:
                _note(notes, sample, met)
                if sample.name:
                    yield sample
                    number += 1
                sample, met = None, []
            if member is None:
                break
            sample = sample or TarSample(key, member.offset)
            if ending == "cls":
                text = links.content(tar, member).strip()
                sample.label = int(text) if text.isdigit() and len(text) < 18 else None
            elif is_image_field(ending):
                if (place := links.place(member)) is None:
                    notes.leave_out(_LINKS, member.name)
                    continue
                met.append(ending)
                if _comes_first(ending, sample, column):
                    sample.name = ""  # should this content be damaged, the sample has no image
                    sample.content = links.content(tar, member) if contents(number) else b""
                    sample.name, sample.ending, (sample.offset, sample.size) = member.name, ending, place
    except _DAMAGE:
        if sample and sample.name:
            yield sample
        raise


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every file and link that is not hidden."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every one
        hidden = member.name.startswith(".", member.name.rfind("/") + 1)
        if not hidden and (member.isfile() or member.islnk() or member.issym()):
            yield member
    assert tar.fileobj
    tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


def _key(member: tarfile.TarInfo, sample: TarSample | None) -> tuple[str, str]:
    """(name of the sample that a file belongs to, ending). sample: the one before it, which has no end yet."""
    folder, _, name = member.name.rpartition("/")
    parts = name.split(".")
    cut = 1
    if len(parts) > 2 and not (sample and not sample.name and sample.key == f"{folder}/{parts[0]}"):
        cut = max((i for i, part in enumerate(parts[:-1], start=1) if not _FIELD.fullmatch(part)), default=1)
    return f"{folder}/{'.'.join(parts[:cut])}", ".".join(parts[cut:]).lower()


def _comes_first(ending: str, sample: TarSample, column: str) -> bool:
    if column:
        return ending == column and not sample.name
    return not sample.name or standing(ending) < standing(sample.ending)


def _note(notes: TarNotes, sample: TarSample, endings: list[str]) -> None:
    if sample.name:
        notes.taken[sample.ending] = notes.taken.get(sample.ending, 0) + 1
        endings.remove(sample.ending)
    else:
        notes.leave_out(_BARE, sample.key.lstrip("/"))
    for ending in endings:
        notes.further[ending] = notes.further.get(ending, 0) + 1


class _Links:
    """Where the content of a tar's files and links is. Links are followed in a local tar that is not compressed."""

    def __init__(self, location: str):
        self._location = location
        self._targets: dict[str, tuple[int, int]] | None = None

    def place(self, member: tarfile.TarInfo) -> tuple[int, int] | None:
        """(offset, size); None for a link that leads to no file of the tar, or to one that cannot be gone back to."""
        if member.isfile():
            return member.offset_data, member.size
        if self._targets is None:  # only where there are links: it is another pass over the headers
            self._targets = {}
            if not is_remote(self._location) and not is_compressed(self._location):
                self._targets = self._scan()
        return self._targets.get(_target(member))

    def content(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        if member.isfile():
            file = tar.extractfile(member)
            return file.read() if file else b""
        place = self.place(member)
        return read_member(self._location, *place) if place else b""

    def _scan(self) -> dict[str, tuple[int, int]]:
        places: dict[str, tuple[int, int]] = {}
        with open(self._location, "rb") as file:
            try:
                for member in _members(open_tar(file, self._location)):
                    place = (member.offset_data, member.size) if member.isfile() else places.get(_target(member))
                    if place:
                        places[posixpath.normpath(member.name)] = place
            except _DAMAGE:
                pass  # who reads the samples will meet it
        return places


def _target(link: tarfile.TarInfo) -> str:
    folder = "" if link.islnk() else posixpath.dirname(link.name)
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def first_notes(file: BinaryIO, location: str, column: str, limit: int) -> TarNotes:
    """What the first files of a tar tell; damage ends it."""
    notes = TarNotes()
    try:
        for _ in tar_samples(
            open_tar(file, location), location, column=column, contents=lambda _: False, notes=notes, limit=limit
        ):
            pass
    except _DAMAGE:
        pass  # who reads the samples will meet it
    return notes


@functools.lru_cache(maxsize=1024)
def is_image_field(ending: str) -> bool:
    return "." + ending.rpartition(".")[2] in image_extensions()


def read_member(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise OSError(f"{path} ends before byte {offset + size}: it has changed since it was indexed")
    return content


def tar_index(paths: list[str], cache_dir: Path, column: str = "") -> Path:
    """An Arrow file of INDEX_SCHEMA with a row for each sample of local tars, made once and kept in cache_dir.

    column: the ending of the images; "": the likeliest of each sample. Says what is left out.
    """
    compressed = next((path for path in paths if is_compressed(path)), None)
    if compressed:
        raise ValueError(
            f"{compressed} is compressed, so its images cannot be read in any order: unpack it to a .tar (images are "
            "compressed already), or, for training, set data.streaming=true"
        )
    stats = [os.stat(path) for path in paths]
    facts = [_FORMAT, column, *((p, s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True))]
    index = cache_dir / "tar-index" / f"{hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()}.arrow"
    where = printable(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    if not index.exists():
        make_cache(index.parent)
        with open(index.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when its holder dies
            if not index.exists():
                size = sum(stat.st_size for stat in stats)
                _log.info("indexing %d tars of %.3f GB in all, once; the index is %s", len(paths), size / 1e9, index)
                _make_index(paths, column, index)
    TarNotes(**json.loads(index.with_suffix(".json").read_bytes())).say(where, column)
    return index


def _make_index(paths: list[str], column: str, index: Path) -> None:
    """Write an index and its notes. What a call that was stopped has done is kept, in pieces, for the next."""
    folder = index.with_suffix(".pieces")
    folder.mkdir(exist_ok=True)
    pieces, done, notes = sorted(folder.glob("*.arrow")), 0, TarNotes()
    if pieces:
        done = int(pieces[-1].stem)
        notes = TarNotes(**json.loads(pa.ipc.open_stream(pieces[-1].read_bytes()).schema.metadata[b"notes"]))
    rows: list[dict] = []
    for number, path in enumerate(paths[done:], start=done + 1):
        rows += _index_rows(path, column, notes)
        if len(rows) >= _PIECE or number == len(paths):
            told = INDEX_SCHEMA.with_metadata({"notes": json.dumps(asdict(notes))})
            pieces.append(folder / f"{number:08}.arrow")  # so many tars are done with it
            _write_stream(pieces[-1], told, [pa.Table.from_pylist(rows, told)])
            rows = []
    read = (pa.ipc.open_stream(piece.read_bytes()).read_all() for piece in pieces)
    write_whole(index.with_suffix(".json"), json.dumps(asdict(notes)))  # first: an index has its notes
    _write_stream(index, INDEX_SCHEMA, (table.replace_schema_metadata(None) for table in read))
    shutil.rmtree(folder)


def _write_stream(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    with written_whole(path) as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _index_rows(path: str, column: str, notes: TarNotes) -> list[dict]:
    try:
        with open(path, "rb") as file:
            samples = tar_samples(open_tar(file, path), path, column=column, contents=lambda number: False, notes=notes)
            return [
                {
                    "image": {
                        "path": printable(sample.name),
                        "tar": path,
                        "offset": sample.offset,
                        "size": sample.size,
                    },
                    "label": sample.label,
                }
                for sample in samples
            ]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it anew, or take it out of the folder") from error
