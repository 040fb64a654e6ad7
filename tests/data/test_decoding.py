import io
import math

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.data.decoding import image_extensions, open_encoded, to_rgb
from tests.data.small_sources import photo


def stored(image, file_format="PNG", **options):
    """The image after a trip through a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return open_encoded(file.getvalue())


def rgb(image):
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return np.asarray(converted).astype(int)


def gray_to_rgb(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("file_format, dtype", [("PNG", "uint16"), ("TIFF", "uint16"), ("TIFF", "int32")])
def test_16_bit_gray_is_scaled_not_clipped(file_format, dtype):
    values = np.linspace(0, 65535, 300).round().reshape(15, 20).astype(dtype)
    image = stored(Image.fromarray(values), file_format)
    assert image.mode in ("I;16", "I")
    np.testing.assert_array_equal(rgb(image), gray_to_rgb(np.rint(values / 257)))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_every_deep_integer_mode(mode):
    values = np.array([[0, 257, 513], [40000, 65535, 128]])
    raw = values.astype({"I;16B": ">u2", "I": "=i4"}.get(mode, "<u2")).tobytes()
    np.testing.assert_array_equal(rgb(Image.frombytes(mode, (3, 2), raw)), gray_to_rgb(np.rint(values / 257)))


def test_32_bit_integers_past_16_bits_are_scaled_by_their_maximum():
    image = Image.fromarray(np.array([[-5, 0, 500_000, 1_000_000]], dtype=np.int32))
    np.testing.assert_array_equal(rgb(image)[0, :, 0], [0, 0, 128, 255])


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_the_white_their_maximum_suggests(white):
    values = np.linspace(0, 0.9 * white, 12, dtype=np.float32).reshape(3, 4)
    image = stored(Image.fromarray(values), "TIFF")
    assert image.mode == "F"
    np.testing.assert_array_equal(rgb(image), gray_to_rgb(np.rint(values.astype(float) * 255 / white)))


def test_floats_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        to_rgb(Image.fromarray(np.array([[0.0, math.nan]], dtype=np.float32)))


def test_16_bit_colour_keeps_its_brightness():
    import struct
    import zlib

    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_allclose(rgb(open_encoded(png)), values.astype(float) / 257, atol=1)


def test_gray_and_one_bit():
    np.testing.assert_array_equal(rgb(stored(Image.fromarray(RAMP))), gray_to_rgb(RAMP))
    bits = RAMP % 3 == 0
    image = stored(Image.fromarray(bits))
    assert image.mode == "1"
    np.testing.assert_array_equal(rgb(image), gray_to_rgb(bits * 255))


def test_cmyk():
    cmyk = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    image = stored(Image.frombytes("CMYK", (5, 4), cmyk.tobytes()), "TIFF")
    assert image.mode == "CMYK"
    ink, black = cmyk[..., :3].astype(float), cmyk[..., 3:].astype(float)
    np.testing.assert_allclose(rgb(image), (255 - ink) * (255 - black) / 255, atol=1)


def test_cmyk_jpeg_is_not_a_negative():
    image = stored(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")  # magenta and yellow ink: red
    assert image.mode == "CMYK"
    np.testing.assert_allclose(rgb(image)[8, 8], [255, 0, 0], atol=3)


def test_ycbcr():
    image = Image.new("YCbCr", (2, 2), (76, 85, 255))  # BT.601 of pure red
    np.testing.assert_allclose(rgb(image)[0, 0], [255, 0, 0], atol=2)


def test_alpha_lies_on_white():
    rgba = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    image = stored(Image.fromarray(rgba))
    assert image.mode == "RGBA"
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(rgb(image), expected, atol=1)
    assert (rgb(image)[0] == 255).all() and (rgb(image)[1] == rgba[1, :, :3]).all()


def test_gray_with_alpha_lies_on_white():
    la = np.random.default_rng(0).integers(0, 256, (8, 9, 2), dtype=np.uint8)
    image = stored(Image.frombytes("LA", (9, 8), la.tobytes()))
    assert image.mode == "LA"
    alpha = la[..., 1] / 255
    np.testing.assert_allclose(rgb(image), gray_to_rgb(la[..., 0] * alpha + 255 * (1 - alpha)), atol=1)


PALETTE = [(255, 0, 0), (0, 255, 0), (10, 20, 30), (200, 100, 0)]


def paletted():
    image = Image.frombytes("P", (4, 1), bytes([0, 1, 2, 3]))
    image.putpalette([value for colour in PALETTE for value in colour])
    return image


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette(file_format):
    image = stored(paletted(), file_format)
    assert image.mode == "P"
    np.testing.assert_array_equal(rgb(image)[0], PALETTE)


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour(file_format):
    image = stored(paletted(), file_format, transparency=2)
    np.testing.assert_array_equal(rgb(image)[0], [*PALETTE[:2], (255, 255, 255), PALETTE[3]])


def test_palette_with_an_alpha_for_each_colour():
    image = stored(paletted(), "PNG", transparency=bytes([255, 0, 51, 255]))
    faded = [0.2 * value + 0.8 * 255 for value in PALETTE[2]]
    np.testing.assert_allclose(rgb(image)[0], [PALETTE[0], (255, 255, 255), faded, PALETTE[3]], atol=1)


def test_rgb_with_a_transparent_colour():
    image = stored(Image.fromarray(np.array([PALETTE], dtype=np.uint8)), "PNG", transparency=(0, 255, 0))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(rgb(image)[0], [PALETTE[0], (255, 255, 255), *PALETTE[2:]])


# What must be done to the stored rows and columns to see the image upright, as the Exif standard words it.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
    9: lambda stored: stored,
}


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.asarray(photo(12, 8))
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = stored(Image.fromarray(pixels), file_format, exif=exif, **options)
    np.testing.assert_array_equal(rgb(image), UPRIGHT[orientation](pixels))


def test_exif_orientation_of_16_bit_gray():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = (np.arange(6, dtype=np.uint16) * 10000).reshape(2, 3)
    image = stored(Image.fromarray(values), "PNG", exif=exif)
    np.testing.assert_array_equal(rgb(image), gray_to_rgb(np.rot90(np.rint(values / 257), -1)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"garbage", b"MM\0*\0\0", b"II*\0\xff\xff\xff\xff", b"MM\0\x9f\0\0\0\x08"])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_does_not_spoil_the_pixels(exif, file_format):
    image = stored(photo(12, 8), file_format, exif=b"Exif\0\0" + exif)
    assert rgb(image).shape == (8, 12, 3)


def test_rgb_is_not_copied():
    image = photo(8, 8)
    assert to_rgb(image) is image


def test_open_encoded_names_what_is_wrong(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("hello")
    for file in (str(path), b"hello"):
        with pytest.raises(ValueError, match="5 bytes that are no image of a known format"):
            open_encoded(file)
    with pytest.raises(ValueError, match="there are no bytes"):
        open_encoded(b"")


def test_postscript_is_never_run():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match="no image of a known format"):
        open_encoded(eps)
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif"} <= image_extensions()
    assert not {".eps", ".ps", ".h5", ".mpg"} & image_extensions()
