"""WebDataset tars: their members one after another, and an index that finds each image without unpacking anything.

As in WebDataset, files whose names agree up to their first dot are one sample. Its image is the first image file in it:
others are masks, depth and the like. Its label, if any, is the number in its .cls file.
"""

import gzip
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from ijepa_scale.data.cache import make_cache
from ijepa_scale.data.folders import printable
from ijepa_scale.data.transforms import image_extensions

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
_FORMAT = 1  # of the index
_PIECE = 100_000  # rows written at a time


def open_tar(file: BinaryIO, location: str, start: int = 0) -> tarfile.TarFile:
    """A tar, compressed or not, from a member's first byte on."""
    if is_compressed(location):
        file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
    if start:
        file.seek(start)
    return tarfile.TarFile(fileobj=file, mode="r")


def is_compressed(location: str) -> bool:
    return re.search(r"\.t?gz([?#]|$)", location.lower()) is not None


def tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(sample, ending, member) of every file."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every one
        folder, _, name = member.name.rpartition("/")
        base, _, ending = name.partition(".")
        if member.isfile() and base and ending:
            yield f"{folder}/{base}", ending.lower(), member
    assert tar.fileobj
    tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


def is_image_field(ending: str) -> bool:
    return "." + ending.rpartition(".")[2] in image_extensions()


def tar_samples(tar: tarfile.TarFile, *, contents: bool = True) -> Iterator[tuple[tarfile.TarInfo, bytes, int | None]]:
    """(member of the image, its content, label) of every sample that has an image. contents: else they are empty."""
    image: tuple[tarfile.TarInfo, bytes] | None = None
    label, last = None, None
    for sample, ending, member in tar_members(tar):
        if sample != last:
            if image:
                yield *image, label
            image, label, last = None, None, sample
        if ending == "cls":
            text = _content(tar, member).strip()
            label = int(text) if text.isdigit() and len(text) < 18 else None
        elif image is None and is_image_field(ending):
            image = member, _content(tar, member) if contents else b""
    if image:
        yield *image, label


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def read_member(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise OSError(f"{path} ends before byte {offset + size}: it has changed since it was indexed")
    return content


def tar_index(paths: list[str], cache_dir: Path) -> Path:
    """An Arrow file of INDEX_SCHEMA with a row for each sample of local tars, made once and kept in cache_dir."""
    compressed = next((path for path in paths if is_compressed(path)), None)
    if compressed:
        raise ValueError(
            f"{compressed} is compressed, so its images cannot be read in any order: unpack it to a .tar (images are "
            "compressed already), or, for training, set data.streaming=true"
        )
    stats = [os.stat(path) for path in paths]
    facts = [_FORMAT, *((p, s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True))]
    index = cache_dir / "tar-index" / f"{hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()}.arrow"
    if index.exists():
        return index
    size = sum(stat.st_size for stat in stats)
    _log.info("indexing %d tars of %.3f GB in all, once; the index is %s", len(paths), size / 1e9, index)
    make_cache(index.parent)
    partial = index.with_name(f".{index.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, INDEX_SCHEMA) as writer:
            rows = []
            for path in paths:
                rows += _rows(path)
                if len(rows) >= _PIECE:
                    writer.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))
        os.replace(partial, index)
    finally:
        partial.unlink(missing_ok=True)
    return index


def _rows(path: str) -> list[dict]:
    try:
        with open(path, "rb") as file:
            return [
                {
                    "image": {
                        "path": printable(member.name),
                        "tar": path,
                        "offset": member.offset_data,
                        "size": member.size,
                    },
                    "label": label,
                }
                for member, _, label in tar_samples(open_tar(file, path), contents=False)
            ]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it anew, or take it out of the folder") from error
