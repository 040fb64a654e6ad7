"""An image file without its metadata, for decoders that stop at what is wrong there although the pixels are good."""

import re
import struct
import zlib
from collections.abc import Callable, Iterator

_PNG, _EXIF = b"\x89PNG\r\n\x1a\n", b"Exif\0\0"
_SCAN, _APP0, _APP1, _APP14, _APP15, _COMMENT = 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE  # JPEG (ITU-T T.81, table B.1)
_TRNS_BYTES = {0: 2, 2: 6, 3: 1}  # at least, by the colour type
_WEBP_PIXELS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
_WEBP_ICC, _WEBP_EXIF, _WEBP_XMP = 0x20, 0x08, 0x04  # flags of VP8X
_TIFF_PIXELS = {*range(254, 267), 273, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332, 338, 339, 347}
_TIFF_PIXELS |= {*range(512, 533), 50674}  # JPEG of the old kind, YCbCr, LERC
_TIFF_ORIENTATION = 274


def without_metadata(content: bytes) -> Iterator[bytes]:
    """The file with nothing but pixels and its Exif, which may say how it is to be turned; then with pixels alone.

    Pixels, damaged or not, keep their bytes. Nothing comes for formats but PNG, JPEG, WebP, TIFF and AVIF, nor where a
    file would be as the one before it.
    """
    before = content
    for exif in (True, False):
        lighter = _rewriter(content)(content, exif)
        if lighter != before:
            yield lighter
            before = lighter


def _rewriter(content: bytes) -> Callable[[bytes, bool], bytes]:
    if content.startswith(_PNG):
        return _png
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return _webp
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff
    if content[4:8] == b"ftyp":
        return _avif
    return lambda content, exif: content


def _png(content: bytes, exif: bool) -> bytes:
    """Critical chunks as they are, and of the others tRNS and eXIf where they are whole."""
    kept, at, colour_type = [_PNG], len(_PNG), content[25:26]
    while len(content) >= at + 8 and content[at + 4 : at + 8].isalpha():
        length, kind = struct.unpack_from(">I4s", content, at)
        chunk = content[at : at + 12 + length]
        whole = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind == b"tRNS":
            wanted = whole and length >= _TRNS_BYTES.get(int.from_bytes(colour_type), length + 1)
        else:
            wanted = kind[:1].isupper() or (exif and whole and kind == b"eXIf")
        if wanted:
            kept.append(chunk)
        at += 12 + length
    return b"".join(kept) if any(chunk[4:8] == b"IDAT" for chunk in kept) else content


def _jpeg(content: bytes, exif: bool) -> bytes:
    """All but APP and COM segments, save JFIF's and Adobe's as libjpeg takes them: they say what the colours are."""
    kept, at = [content[:2]], 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], content[at + 2] << 8 | content[at + 3]
        if marker == 0xFF:  # a byte that fills up
            at += 1
            continue
        if marker == _SCAN:
            return b"".join([*kept, content[at:]])
        end = at + 2 + max(2, length)
        segment, data = content[at:end], content[at + 4 : end]
        metadata = _APP0 <= marker <= _APP15 or marker == _COMMENT
        jfif = marker == _APP0 and data.startswith(b"JFIF\0") and len(data) >= 14
        adobe = marker == _APP14 and data.startswith(b"Adobe") and len(data) >= 12
        if not metadata or jfif or adobe or (exif and marker == _APP1 and data.startswith(_EXIF)):
            kept.append(segment)
        at = end
    return content  # there are no pixels, or not where they belong


def _webp(content: bytes, exif: bool) -> bytes:
    kept, at = [], 12
    flags = ~(_WEBP_ICC | _WEBP_XMP | (0 if exif else _WEBP_EXIF))
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, at)
        end = at + 8 + size + size % 2
        chunk = bytearray(content[at:end])
        if kind == b"VP8X" and size:
            chunk[8] &= flags
        if kind in _WEBP_PIXELS or (exif and kind == b"EXIF" and len(chunk) == end - at):
            kept.append(bytes(chunk))
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(content: bytes, exif: bool) -> bytes:
    """The first page, its directory shortened where it is. Pixels and long values stay where they are."""
    order, big = "<" if content.startswith(b"II") else ">", content[2:4] in (b"+\0", b"\0+")
    offset_form, count_form, entry_size = (order + "Q", order + "Q", 20) if big else (order + "I", order + "H", 12)
    try:
        (at,) = struct.unpack_from(offset_form, content, 8 if big else 4)
        (count,) = struct.unpack_from(count_form, content, at)
    except struct.error:  # past the end
        return content
    first = at + struct.calcsize(count_form)
    starts = range(first, min(first + count * entry_size, len(content) - entry_size), entry_size)
    entries = [content[start : start + entry_size] for start in starts]
    wanted = _TIFF_PIXELS | ({_TIFF_ORIENTATION} if exif else set())
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in wanted]
    if len(kept) == count:
        return content
    directory = struct.pack(count_form, len(kept)) + b"".join(kept) + struct.pack(offset_form, 0)
    return content[:at] + directory + content[at + len(directory) :]


def _avif(content: bytes, exif: bool) -> bytes:
    """Exif, the one part of its metadata that is read, is called something else."""
    return content if exif else re.sub(rb"(infe[\2\3].{7})Exif", rb"\1none", content, flags=re.DOTALL)
