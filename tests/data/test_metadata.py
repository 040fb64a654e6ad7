import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features

from ijepa_scale.data.decoding import BadImageError, Limits, decode, open_croppable, with_image
from ijepa_scale.data.images import open_images
from ijepa_scale.data.metadata import without_metadata

TURNED = Image.Exif()
TURNED[0x0112], TURNED[0x010E] = 6, "a description"
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
BIG = zlib.compress(bytes(3 << 20))  # past Pillow's MAX_TEXT_CHUNK


def encoded(file_format, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, file_format, **options)
    return file.getvalue()


def chunk(kind, data, *, crc=0):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ crc)


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def inserted(content, before, extra):
    at = content.index(before) - 4
    return content[:at] + extra + content[at:]


def broken_png(content):
    yield from (inserted(content, b"IDAT", chunk(b"quUx", b"unknown", crc=1)), content[:-12] + b"\0\0\0\x90tEXtcut")
    for kind, size in ((b"gAMA", 4), (b"pHYs", 9), (b"cHRM", 32), (b"sRGB", 1), (b"tRNS", 6), (b"tIME", 7)):
        for extra in (chunk(kind, b""), chunk(kind, bytes(size - 1)), chunk(kind, bytes(size), crc=1)):
            yield inserted(content, b"IDAT", extra)
    for text in (
        b"zTXtk\0\0" + BIG,
        b"iTXtk\0\1\0\0\0" + BIG,
        b"iCCPk\0\0" + BIG,
        b"iCCPk\0",
        b"zTXtk\0\7x",
        b"eXIf" + b"x",
    ):
        for before in (b"IDAT", b"IEND"):
            yield inserted(content, before, chunk(text[:4], text[4:]))
    yield inserted(content, b"IDAT", b"".join(chunk(b"tEXt", b"%d\0" % i + bytes(1 << 20)) for i in range(65)))
    for animation in (b"acTLab", b"fcTLab", b"fcTL" + bytes(26), b"fcTL\0\0\0\5" + bytes(22)):
        yield inserted(content, b"IDAT", chunk(animation[:4], animation[4:]))


def broken_jpeg(content):
    exif = TURNED.tobytes()
    for marker, data in [
        *((0xE1, exif[: len(exif) - cut]) for cut in range(1, len(exif) - 6, 5)),
        (0xE0, b"JFIF\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\1\3part"),
        (0xE2, b"MPF\0"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
        (0xEE, b"Adobe"),
        (0xFE, b""),
    ]:
        yield content[:2] + segment(marker, data) + content[2:]
    yield content[:2] + b"\xff\xe5\0\0" + content[2:]


def broken_webp(content):
    whole = encoded("WEBP", exif=TURNED.tobytes(), icc_profile=b"colours" * 9, lossless=True)
    at = whole.index(b"EXIF")
    yield from (whole[:at], whole[:-9], whole[: at + 4] + b"\xff\xff\0\0" + whole[at + 8 :])


def broken_tiff(content):
    order, first = "<", struct.unpack("<I", content[4:8])[0]
    (count,) = struct.unpack_from(order + "H", content, first)
    for at in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from("<HHII", content, at)
        if tag in (270, 282, 700):
            for entry in (
                (kind, values + 70_000, value),
                (kind, values, 2**32 - 9),
                *((k, values, value) for k in (3, 5, 9)),
            ):
                yield content[:at] + struct.pack("<HHII", tag, *entry) + content[at + 12 :]


def broken_avif(content):
    whole = encoded("AVIF", exif=b"Exif\0\0" + TURNED.tobytes()[6:], quality=100, subsampling="4:4:4")
    at = whole.index(b"*\0", whole.index(b"mdat")) if b"II*\0" in whole else whole.index(b"MM\0*")
    yield whole[: at - 1] + b"XXXX" + whole[at + 3 :]


FORMATS = {
    "PNG": (broken_png, {}),
    "JPEG": (broken_jpeg, {"quality": 95}),
    "WEBP": (broken_webp, {"lossless": True}),
    "TIFF": (broken_tiff, {"tiffinfo": {270: "a description", 700: b"<x/>" * 9}, "dpi": (72, 72)}),
}
if features.check("avif"):
    FORMATS["AVIF"] = (broken_avif, {"quality": 100, "subsampling": "4:4:4"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FORMATS)
def test_metadata_never_stops_pixels(file_format):
    broken, options = FORMATS[file_format]
    clean = encoded(file_format, **options)
    expected = np.asarray(decode(clean))
    files = list(broken(clean))
    assert files and expected.shape == (20, 30, 3)
    for number, content in enumerate(files):
        upright = [expected, np.rot90(expected, -1)]  # an Exif that is broken further down may still be read
        for read in (decode, lambda file: open_croppable(file).crop((0, 0, *open_croppable(file).size))):
            found = np.asarray(read(content))
            assert any(np.array_equal(found, image) for image in upright), (number, found.shape)
        assert with_image(content, lambda image: image.size) == (30, 20)


def test_an_orientation_that_can_be_read_is_kept():
    exif = TURNED.tobytes()
    png = inserted(encoded("PNG", exif=TURNED), b"IDAT", chunk(b"gAMA", b""))
    jpeg = encoded("JPEG", exif=TURNED, quality=95)
    jpeg = jpeg[:2] + segment(0xEE, b"Adobe") + jpeg[2:]
    webp = encoded("WEBP", exif=exif, xmp=b"<x/>", lossless=True)[:-3]  # the XMP comes last
    tiff = next(broken_tiff(encoded("TIFF", exif=TURNED)))
    for content in (png, jpeg, webp, tiff):
        assert decode(content).size == (20, 30)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_pixels_stay_refused_and_why_is_told(file_format, tmp_path):
    """Also where the metadata is broken: the reason is then that of the pixels."""
    _, options = FORMATS[file_format]
    clean = encoded(file_format, **options)
    bad = {"PNG": (b"IDAT", chunk(b"gAMA", b"")), "JPEG": (b"\xff\xda", segment(0xE2, b"ICC_PROFILE\0"))}
    files = [clean[:cut] for cut in range(8, len(clean) * 3 // 4, 31)]
    if file_format in bad:
        mark, extra = bad[file_format]
        start = clean.index(mark) - (4 if file_format == "PNG" else 0)
        files += [clean[:start] + extra + clean[start:cut] for cut in range(start + 20, start + 500, 60)]
    for number, content in enumerate(files):
        (tmp_path / f"{number:03}.{file_format.lower()}").write_bytes(content)
    images = open_images(str(tmp_path))
    for index in range(len(images)):
        with pytest.raises(BadImageError, match=r": .+") as caught:
            images.read(index)
        assert "gAMA" not in caught.value.reason and "0x" not in str(caught.value)
        if index >= len(files) - 5 and file_format in ("PNG", "JPEG"):
            assert "truncated" in caught.value.reason


def test_pillows_reason_for_an_unknown_file_is_told():
    png, jpeg = encoded("PNG"), encoded("JPEG")
    for content, reason in (
        (png[:29] + b"\0" + png[30:], r"PNG: broken PNG file \(bad header checksum in b'IHDR'\)"),
        (png[:8] + b"\0\0\0\1" + bytes(60), r"PNG: broken PNG file \(chunk"),
        (
            jpeg[: jpeg.index(b"\xff\xc0") + 4] + b"\x0c" + jpeg[jpeg.index(b"\xff\xc0") + 5 :],
            "JPEG: cannot handle 12-bit",
        ),
    ):
        with pytest.raises(ValueError, match=f"no image of a known format .as {reason}"):
            decode(content)


def test_what_has_no_metadata_is_not_read_twice():
    png, webp = encoded("PNG"), encoded("WEBP")
    for content in (
        png,
        png[:-30],
        webp,
        b"",
        b"text",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"II*\0\xff\xff\xff\xff",
        b"RI",
    ):
        assert list(without_metadata(content)) == []
    assert len(list(without_metadata(encoded("PNG", exif=TURNED)))) == 1
    assert len(list(without_metadata(inserted(encoded("PNG", exif=TURNED), b"IDAT", chunk(b"quUx", b""))))) == 2


@pytest.mark.parametrize("file_format, factor", [("JPEG", 8), ("JPEG2000", 2)])
def test_large_images_are_decoded_at_a_part_of_their_size(file_format, factor):
    if file_format == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow reads no JPEG 2000")
    y, x = np.mgrid[0:203, 0:301]
    image = Image.fromarray(np.stack([x * 0.8, y, x * 0], -1).astype(np.uint8))
    content = encoded(file_format, image)
    whole = np.asarray(decode(content)).astype(float)
    for max_pixels in (301 * 203, 301 * 203 - 1, 301 * 203 // 4 + 200):
        part = 1 if max_pixels == 301 * 203 else 2
        found = decode(content, Limits(max_pixels=max_pixels))
        assert found.size == (-(-301 // part), -(-203 // part)) == open_croppable(content, Limits(1, max_pixels)).size
        assert np.abs(np.asarray(found)[:100, :150] - whole[::part, ::part][:100, :150]).mean() < 4
    smallest = -(-301 // factor) * -(-203 // factor)
    assert min(decode(content, Limits(max_pixels=smallest)).size) == -(-203 // factor)
    with pytest.raises(ValueError, match=r"301 x 203 pixels: more than the .* of data\.max_pixels; raise it"):
        decode(content, Limits(max_pixels=smallest // 2))
    if file_format == "JPEG":
        with pytest.raises(ValueError, match="301 x 203 pixels"):  # all coefficients are held
            decode(encoded("JPEG", image, progressive=True), Limits(max_pixels=301 * 203 - 1))


def test_pillows_own_limit_is_as_before_and_nothing_is_printed_for_each_image():
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as importing ijepa_scale.data.decoding leaves it
        assert decode(encoded("PNG"), Limits(max_pixels=601)).size == (30, 20)
    with pytest.raises(ValueError):
        decode(encoded("PNG"), Limits(max_pixels=599))
    assert before == Image.MAX_IMAGE_PIXELS
