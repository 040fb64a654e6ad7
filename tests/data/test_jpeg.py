import io

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.data import transforms
from ijepa_scale.data.decoding import BadImageError, UprightJpeg, open_croppable, open_encoded, to_rgb
from ijepa_scale.data.images import open_images
from ijepa_scale.data.jpeg import decode_rows, read_header
from ijepa_scale.data.order import generator_for
from ijepa_scale.data.transforms import RandomCrop, random_resized_crop
from tests.data.small_sources import photo

TURNED = Image.Exif()
TURNED[0x0112] = 6
UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 1
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>8</tiff:Orientation></x:xmpmeta>'


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def patched(content, at, *values):
    return content[:at] + bytes(values) + content[at + len(values) :]


def assert_cropped_as_by_pillow(content, count=12, size=24):
    for i in range(count):
        ours = random_resized_crop(open_croppable(content), generator_for(1, i), size, flip=True)
        with open_encoded(content) as image:
            definition = random_resized_crop(to_rgb(image), generator_for(1, i), size, flip=True)
        np.testing.assert_array_equal(ours, definition)


@pytest.mark.parametrize("image_size", [(60, 200), (200, 61), (17, 16), (1, 1), (8, 333)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"quality": 30, "optimize": True},
        {"exif": UPRIGHT},
    ],
    ids=lambda options: "-".join(options),
)
def test_crops_of_jpeg_are_those_of_pillow(image_size, options):
    content = jpeg(photo(*image_size), **options)
    assert isinstance(open_croppable(content), UprightJpeg)
    assert_cropped_as_by_pillow(content)


@pytest.mark.parametrize(
    "content, fast",
    [
        (jpeg(photo(40, 70).convert("L")), True),
        (jpeg(photo(40, 70).convert("CMYK")), False),
        (jpeg(photo(40, 70), exif=TURNED), False),
        (jpeg(photo(40, 70), xmp=XMP), False),
        (jpeg(photo(40, 70)) + b"\n", False),
        (jpeg(photo(40, 70), comment=b"a comment", icc_profile=b"colours" * 9000), True),
    ],
    ids=["gray", "cmyk", "turned", "turned by XMP", "bytes after the end", "more segments"],
)
def test_unusual_jpeg(content, fast):
    assert isinstance(open_croppable(content), UprightJpeg) == fast
    assert_cropped_as_by_pillow(content)


@pytest.mark.parametrize("subsampling, step", [("4:4:4", 8), ("4:2:2", 8), ("4:2:0", 16)])
def test_rows_that_no_crop_needs_are_not_decoded(subsampling, step):
    content = jpeg(photo(50, 400), subsampling=subsampling)
    header, whole = read_header(content), np.asarray(Image.open(io.BytesIO(content)))
    for rows in (1, step - 1, step, 77, 399, 400):
        found = decode_rows(content, header, rows)
        assert rows <= len(found) <= min(400, rows + 2 * step)
        np.testing.assert_array_equal(found[:rows], whole[:rows])


def test_rows_are_not_cut_where_they_do_not_come_in_order():
    assert read_header(jpeg(photo(50, 90), progressive=True)).step == 0
    content = jpeg(photo(50, 90))
    scan = content.index(b"\xff\xda")
    assert read_header(content).step == 16
    assert read_header(patched(content, scan + 4, 1)).step == 0  # a scan for each colour


def test_damage():
    content = jpeg(photo(60, 200))
    for cut in (1, 2, 5, 100, len(content) // 2):  # Pillow takes some of these, and refuses others
        try:
            with open_encoded(content[:-cut]) as image:
                to_rgb(image)
        except OSError:
            with pytest.raises(OSError, match="truncated"):
                random_resized_crop(open_croppable(content[:-cut]), generator_for(0), 8)
        else:
            assert_cropped_as_by_pillow(content[:-cut])
    assert_cropped_as_by_pillow(patched(content, len(content) * 2 // 3, 0, 1, 2, 3, 4, 5, 6, 7))


def test_headers_that_are_left_to_pillow():
    content = jpeg(photo(60, 200))
    frame = content.index(b"\xff\xc0")
    assert read_header(content).size == (60, 200)
    assert read_header(patched(content, frame + 5, 0xFF, 0xDC, 0xFF, 0xDC)) is None  # 65,500 x 65,500: a bomb
    assert read_header(patched(content, frame + 5, 0, 0)) is None  # the height comes later
    assert read_header(patched(content, frame + 4, 12)) is None  # 12 bits
    assert read_header(patched(content, frame + 1, 0xC9)) is None  # arithmetic coding
    assert read_header(patched(content, frame + 9, 200)) is None
    for cut in range(len(content)):
        assert read_header(content[:cut] + b"\xff\xd9") is None or cut > content.index(b"\xff\xda")
    for other in (b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", content[2:]):
        assert read_header(other) is None


def test_what_libjpeg_refuses_goes_to_pillow():
    content = jpeg(photo(60, 200))
    broken = patched(content, content.index(b"\xff\xdb") + 1, 0xFE)  # a table becomes a comment
    assert decode_rows(broken, read_header(broken), 10) is None
    with pytest.raises(OSError, match="broken data stream"):
        random_resized_crop(open_croppable(broken), generator_for(0), 8)


def test_folders_of_files(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(photo(60, 200)))
    (tmp_path / "1.jpg").write_bytes(jpeg(photo(60, 200))[:900])
    images = open_images(str(tmp_path), min_side=60)
    crop = RandomCrop(8, key=(0,))
    expected = random_resized_crop(photo_again(tmp_path / "0.jpg"), generator_for(0), 8)
    for index, bad in ((0, []), (1, [1])):
        found, met = images.crop_or_substitute(index, crop)
        np.testing.assert_array_equal(found, expected)
        assert [image.index for image in met] == bad
    assert images.content(0) == (tmp_path / "0.jpg").read_bytes()
    with pytest.raises(BadImageError, match="60 x 200 pixels, less than 61 a side"):
        open_images(str(tmp_path), min_side=61).crop_or_substitute(0, crop)


def photo_again(path):
    return to_rgb(open_encoded(str(path)))


@pytest.mark.parametrize("image_size", [(300, 200), (61, 400), (30, 30)])
@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_both_ways_of_resizing_agree_with_pillow(image_size, capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    image = photo(*image_size)
    # Pillow resizes rows or columns first, whichever is cheaper, and rounds and clips between.
    whole = image.resize((64, 64), Image.Resampling.BICUBIC)
    rows_first = image.resize((64, image.height), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    for form in (image, np.array(image)):
        ours = transforms._resized(form, 64).astype(int)
        differences = [np.abs(ours - np.asarray(other).astype(int)).max() for other in (whole, rows_first)]
        assert min(differences) <= (1 if capability == "AVX2" else 0)
