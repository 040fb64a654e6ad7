"""JPEG by libjpeg-turbo through simplejpeg, which takes 0.8 of Pillow's time, and only as far down as is needed.

Pillow remains the definition: what is unusual here, or fails, is left to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

_BASELINE, _PROGRESSIVE, _SCAN, _APP1 = (0xC0, 0xC1), 0xC2, 0xDA, 0xE1  # markers (ITU-T T.81, table B.1)
_FRAMES = (*_BASELINE, _PROGRESSIVE)
_CONTEXT_ROWS = 2  # of luma below a row, that smooth chroma upsampling reads


@dataclass(frozen=True)
class JpegHeader:
    """size: (width, height) as stored. metadata: EXIF or XMP, which may say that the image is to be turned.

    frame: where the frame header is. step: rows by which the image can be shortened; 0: it cannot be.
    """

    size: tuple[int, int]
    metadata: bool
    frame: int
    step: int


def read_header(content: bytes) -> JpegHeader | None:
    """None for anything but a complete 8-bit gray or three-colour JPEG, baseline or progressive."""
    if not content.startswith(b"\xff\xd8\xff") or not content.endswith(b"\xff\xd9"):
        return None
    at, frame, metadata = 2, 0, False
    while len(content) > at + 4 and content[at] == 0xFF:
        marker, length = content[at + 1], content[at + 2] << 8 | content[at + 3]
        if marker in _FRAMES:
            frame = at
        elif marker == _APP1:
            metadata = True
        elif marker == _SCAN:
            return _checked(content, frame, scan=at, metadata=metadata) if frame else None
        at += 2 + length
    return None


def _checked(content: bytes, frame: int, *, scan: int, metadata: bool) -> JpegHeader | None:
    depth, channels = content[frame + 4], content[frame + 9]
    if scan < frame + 10 + 3 * channels:
        return None
    height, width = (int.from_bytes(content[frame + at : frame + at + 2], "big") for at in (5, 7))
    too_large = width * height > (Image.MAX_IMAGE_PIXELS or math.inf)  # Pillow warns or refuses
    if depth != 8 or channels not in (1, 3) or not width or not height or too_large:
        return None
    sampling = max(content[frame + 11 + 3 * channel] & 15 for channel in range(channels))
    one_scan = content[frame + 1] in _BASELINE and content[scan + 4] == channels  # else rows do not come in order
    return JpegHeader((width, height), metadata, frame, 8 * sampling if one_scan else 0)


def decode_rows(content: bytes, header: JpegHeader, rows: int) -> np.ndarray | None:
    """At least the first `rows` rows, (height, width, 3) uint8, the pixels equal to Pillow's; None if that fails.

    Rows below are not decoded: the height in the header is lowered to what is needed, and libjpeg stops there.
    """
    import simplejpeg

    file: bytes | bytearray = content
    if header.step:
        needed = -(-(rows + _CONTEXT_ROWS) // header.step) * header.step
        if needed < header.size[1]:
            file = bytearray(content)
            file[header.frame + 5 : header.frame + 7] = needed.to_bytes(2, "big")
    try:
        return simplejpeg.decode_jpeg(file, colorspace="RGB", strict=False)  # as Pillow, which takes what libjpeg mends
    except ValueError:  # then Pillow reads it, or says what is wrong
        return None
