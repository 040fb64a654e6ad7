"""One encoded image -> an upright RGB image, whatever its format, its metadata or its size.

A file is given as its content (bytes) or its path (str). A JPEG that is to be cropped is not decoded here: its crop
decodes it, and only as far down as it reaches (jpeg.py).
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from ijepa_scale.data.jpeg import JpegHeader, decode_rows, read_header
from ijepa_scale.data.lfs import LFS_ADVICE, is_pointer, is_pointer_file
from ijepa_scale.data.metadata import without_metadata

T = TypeVar("T")

# Of metadata, and of many pixels. The image is good, and every loader process would say so anew.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 500_000_000  # of an image as it is decoded, where nobody says another number; Pillow takes 4 bytes for one
WHOLE_PIXELS = 178_956_970  # formats that can be decoded at a half, a quarter, ... are so above: Pillow's own limit
_REDUCIBLE = ("JPEG", "JPEG2000")
_REREAD_BYTES = 1 << 30  # larger files are not read into memory for a second try

# EPS would run Ghostscript on the data; the others are stubs without a decoder of their own.
_NOT_PICTURES = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
_MARKED = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> what undoes it (Exif 2.32, section 4.6.4)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_PIXELS = 1 << 22  # converted at a time


class BadImageError(ValueError):
    """An image cannot be read. The message names the sample and the reason."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


@dataclass(frozen=True)
class Limits:
    """min_side: pixels; images with a shorter side are bad. max_pixels: of an image as it is decoded; 0: any number."""

    min_side: int = 1
    max_pixels: int = MAX_PIXELS

    def check_side(self, size: tuple[int, int]) -> None:
        """BadImageError for a (width, height) with a side under min_side."""
        if min(size) < self.min_side:
            raise BadImageError(f"{size[0]} x {size[1]} pixels, less than {self.min_side} a side")


USUAL = Limits()


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, without its name. ValueError where it is no fault of the image: a package lacks."""
    if isinstance(error, ImportError):
        raise ValueError(f"no image can be read: {error}; install it: pip install {error.name}") from error
    return error.reason if isinstance(error, BadImageError) else f"{type(error).__name__}: {error}"


@functools.cache
def _formats() -> tuple[str, ...]:
    """Names of the image formats to try, likely ones first."""
    Image.init()
    formats = [name for name in Image.ID if name not in _NOT_PICTURES]
    return tuple(sorted(formats, key=lambda name: name not in ("JPEG", "PNG", "WEBP")))


def image_extensions() -> set[str]:
    """Endings of file names that `open_encoded` can read, in lower case with their dot."""
    return {ending for ending, name in Image.registered_extensions().items() if name in _formats()}


def begins_as_image(path: str) -> bool:
    """Whether a file is an image by its first bytes, of a format whose files begin with a mark of their own."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:  # a broken link, or no permission: it is no image that can be read
        return False
    accepts = [Image.OPEN[name][1] for name in _formats() if name in _MARKED]
    if not any(accept is not None and accept(start) is True for accept in accepts):
        return False
    try:
        with open_encoded(path):
            return True
    except Exception:  # decoders raise whatever the bytes lead them to
        return False


class TooManyPixelsError(ValueError):
    """An image would take more memory than it may."""


@contextlib.contextmanager
def _limited(max_pixels: int) -> Iterator[None]:
    """Our limit is Pillow's within, which is one for the process, and which it refuses to pass twofold."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2) or None
    try:
        yield
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(_too_many(str(error).partition(" exceeds")[0], max_pixels)) from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _too_many(what: str, max_pixels: int) -> str:
    return (
        f"{what}: more than the {max_pixels:,} of data.max_pixels; raise it (0: any number; one takes 4 bytes or more "
        "when decoded), or store the image smaller"
    )


def open_encoded(file: bytes | str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file, given as its content (bytes) or its path (str), as far as its header.

    TooManyPixelsError for one of more than max_pixels (0: any), unless its format can be decoded at a part of its size.
    """
    if not file:
        raise ValueError("there are no bytes")
    try:
        with _limited(max_pixels):
            return _open(file, _formats())
    except UnidentifiedImageError as error:  # its message is an address in memory
        if is_pointer(file) if isinstance(file, bytes) else is_pointer_file(file):
            raise ValueError(f"it is one of the {LFS_ADVICE}") from error
        size = len(file) if isinstance(file, bytes) else os.path.getsize(file)
        raise ValueError(f"{size} bytes that are no image of a known format{_complaint(file)}") from error
    except TooManyPixelsError:
        with contextlib.suppress(UnidentifiedImageError), _limited(0):
            return _open(file, _REDUCIBLE)
        raise


def _open(file: bytes | str, formats: tuple[str, ...]) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats)


def _complaint(file: bytes | str) -> str:
    """What Pillow's reader of the file's format has against it; Image.open() keeps that to itself."""
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
        prefix = opened.read(16)
        for name in _formats():
            factory, accept = Image.OPEN[name]
            accepted: bool | str = False
            try:
                accepted = accept(prefix) if accept else False
                if accepted and not isinstance(accepted, str):
                    opened.seek(0)
                    factory(opened, "")
            except Exception as error:  # readers raise whatever the bytes lead them to
                accepted = accepted and f"as {name}: {error}"
            if isinstance(accepted, str):
                return f" ({accepted})"
    return ""


def with_image(file: bytes | str, use: Callable[[Image.Image], T], *, max_pixels: int = MAX_PIXELS) -> T:
    """use() of the opened image; where that fails, once more of the file without its metadata.

    An error is then of the pixels. max_pixels: as of open_encoded(), for the decoding, too.
    """
    try:
        with _limited(max_pixels), open_encoded(file, max_pixels=max_pixels) as image:
            return use(image)
    except (TooManyPixelsError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever the bytes lead them to
        failure = error
    try:
        for lighter in without_metadata(_content(file) or b""):
            try:
                with _limited(max_pixels), open_encoded(lighter, max_pixels=max_pixels) as image:
                    return use(image)
            except Exception as error:
                failure = error
        raise failure
    finally:
        del failure  # it would hold this frame, and the file's content


def _content(file: bytes | str) -> bytes:
    if not isinstance(file, str):
        return file
    if not os.path.isfile(file) or os.path.getsize(file) > _REREAD_BYTES:
        return b""
    with open(file, "rb") as opened:
        return opened.read()


def decode(file: bytes | str, limits: Limits = USUAL) -> Image.Image:
    """An encoded image as to_rgb() gives it, whatever its metadata. Of a huge JPEG or JPEG 2000 a smaller version.

    That is a half (JPEG 2000) or a half, a quarter or an eighth (JPEG) of its sides, so that it takes no more memory
    than WHOLE_PIXELS do. TooManyPixelsError where more than limits.max_pixels are left, BadImageError for a side under
    limits.min_side; otherwise whatever the bytes lead a decoder to raise.
    """

    def decoded(image: Image.Image) -> Image.Image:
        _reduce(image, limits.max_pixels)
        return to_rgb(image)

    rgb = with_image(file, decoded, max_pixels=limits.max_pixels)
    limits.check_side(rgb.size)
    return rgb


def stored_size(file: bytes | str, limits: Limits = USUAL) -> tuple[int, int]:
    """(width, height) of an encoded image as stored, from its header alone."""
    return with_image(file, lambda image: image.size, max_pixels=limits.max_pixels)


def _reduce(image: Any, max_pixels: int) -> None:
    width, height = image.size
    most = min(WHOLE_PIXELS, max_pixels or WHOLE_PIXELS)
    factors = {"JPEG": (1, 2, 4, 8), "MPO": (1, 2, 4, 8), "JPEG2000": (1, 2)}.get(image.format, (1,))
    factor = next((factor for factor in factors if width * height <= most * factor**2), factors[-1])
    # libjpeg holds all of a progressive image's coefficients, which take about as much as its pixels.
    held = width * height // (1 if image.info.get("progressive") else factor**2)
    if max_pixels and held > max_pixels:
        raise TooManyPixelsError(_too_many(f"{width} x {height} pixels", max_pixels))
    if factor > 1 and image.format == "JPEG2000":
        image.reduce = 1  # by halving once. Twice fails for some sizes: Pillow 11 to 13 rounds them as libjpeg does not
    elif factor > 1:
        image.draft(None, (width // factor, height // factor))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: upright (EXIF orientation) and in RGB.

    Transparency lies on white. Integers and floats of more than 8 bits are scaled, not clipped: white is 65535 for the
    16-bit modes and for "I"; for "F", which has no such convention, it is the first of 1, 255 and 65535 that holds the
    image's maximum. Where even 65535 does not, white is that maximum. Colour profiles are ignored.
    """
    image.load()  # first: a TIFF turns itself upright here, and a PNG may hold its EXIF after its pixels
    transpose = _UPRIGHT.get(_orientation(image))
    if transpose is not None:
        image = image.transpose(transpose)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # whatever the bytes lead PIL to: the pixels are still good
        return 1


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    stored = np.asarray(image)
    parts = np.array_split(stored, max(1, stored.size // _DEEP_PIXELS))  # of rows: a float64 takes 8 bytes
    if image.mode == "F" and not all(np.isfinite(part).all() for part in parts):
        raise ValueError("the image holds values that are not finite")
    candidates = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    largest = float(stored.max())
    white = next((white for white in candidates if largest <= white), largest)
    gray = [np.rint(np.clip(part.astype(np.float64), 0.0, None) * (255.0 / white)).astype(np.uint8) for part in parts]
    return Image.fromarray(np.concatenate(gray)).convert("RGB")


@dataclass(frozen=True)
class UprightJpeg:
    """A JPEG file to be cropped, not decoded yet."""

    content: bytes
    header: JpegHeader

    @property
    def size(self) -> tuple[int, int]:
        return self.header.size

    def crop(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """Pixels of (left, top, right, bottom), (height, width, 3) uint8. Damage further down may go unnoticed."""
        left, top, right, bottom = box
        pixels = decode_rows(self.content, self.header, bottom)
        if pixels is None:
            return np.array(decode(self.content).crop(box))
        return pixels[top:bottom, left:right]


def open_croppable(file: bytes | str, limits: Limits = USUAL) -> Image.Image | UprightJpeg:
    """As decode(), to be cropped: a JPEG that is upright as stored is not decoded yet.

    An error in such a JPEG's pixels comes when it is cropped.
    """
    content = file
    if isinstance(file, str) and os.path.splitext(file)[1].lower() in (".jpg", ".jpeg"):
        with open(file, "rb") as opened:
            content = opened.read()
    header = read_header(content) if isinstance(content, bytes) else None
    if header and limits.max_pixels and math.prod(header.size) > limits.max_pixels:
        header = None
    if header and isinstance(content, bytes) and not (header.metadata and _is_turned(content)):
        limits.check_side(header.size)
        return UprightJpeg(content, header)
    return decode(content, limits)


def _is_turned(file: bytes) -> bool:
    return with_image(file, lambda image: _orientation(image) in _UPRIGHT)
