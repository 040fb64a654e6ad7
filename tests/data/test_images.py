import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import check_images, open_images
from ijepa_scale.data.transforms import RandomCrop
from tests.data.small_sources import WHOLE
from tests.processes import assert_all, run_ranks


def pixels(i, width=10, height=8):
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(i, file_format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, file_format, **options)
    return file.getvalue()


def write_parquet(path, count=5, first=0, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(first + i), "path": f"{first + i}.png"} for i in range(count)]
    pq.write_table(pa.table({"image": pa.array(images, IMAGE), **columns}), path)


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write_files(root, files):
    """files: name -> index of the image, or bytes."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(content) if isinstance(content, int) else content)


def contents(images):
    """Which of the images of `pixels` are in a set, in its order."""
    known = {pixels(i).tobytes(): i for i in range(60)}
    return [known[np.asarray(images.read(i)).tobytes()] for i in range(len(images))]


# Columns


def test_the_first_image_column_or_the_one_called_image(tmp_path, caplog):
    def saved(name, *columns):
        data = {column: [{"bytes": encoded(i), "path": None}] for i, column in enumerate(columns)}
        features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
        datasets.Dataset.from_dict(data, features=features).save_to_disk(tmp_path / name)
        return open_images(str(tmp_path / name))

    assert contents(saved("a", "photo")) == [0]
    assert not caplog.records
    assert contents(saved("b", "left", "right")) == [0]
    assert "several columns of images (left, right); reading 'left'" in caplog.text
    assert contents(saved("c", "left", "image")) == [1]


def test_plain_bytes_are_found(tmp_path):
    table = pa.table({"id": [b"x", b"y"], "jpeg": [encoded(0), encoded(1)], "size": [1, 2]})
    pq.write_table(table, tmp_path / "x.parquet")
    images = open_images(str(tmp_path / "x.parquet"))
    assert contents(images) == [0, 1]
    assert images.sample_id(1) == "train[1]"


def test_bytes_are_found_though_the_first_is_bad(tmp_path):
    pq.write_table(pa.table({"picture": [b"", b"oops", None, encoded(1)]}), tmp_path / "x.parquet")
    images = open_images(str(tmp_path / "x.parquet"))
    assert np.array_equal(np.asarray(images.read(3)), pixels(1))
    with pytest.raises(BadImageError, match=r"train\[2\]: .*there are no bytes"):
        images.read(2)


def test_integer_labels(tmp_path):
    columns = {
        "label": pa.array([3, 1, None, 3, -1], pa.int16()),
        "labels": pa.array([1, 2, 3, 4, 10_000]),
        "class": pa.array([0, 9_999, 0, 0, 0]),
        "size": pa.array([1, 2, 3, 4, 5]),
        "name": pa.array(list("abcde")),
    }
    write_parquet(tmp_path / "x.parquet", 5, **columns)
    labels = open_images(str(tmp_path / "x.parquet")).label_columns()
    assert labels.keys() == {"label", "class"}  # labels holds too large a value, the rest are no labels
    assert labels["label"].values.tolist() == [3, 1, -1, 3, -1]
    assert labels["label"].values.dtype == np.int64
    assert labels["label"].names == ["0", "1", "2", "3"]
    assert len(labels["class"].names) == 10_000


def test_a_negative_label_is_none_and_a_negative_number_a_class_of_its_own(tmp_path):
    write_parquet(tmp_path / "x.parquet", 4, label=pa.array([-1, 5, None, 2]), kind=pa.array([-3, 5, None, 2]))
    images = open_images(str(tmp_path / "x.parquet"))
    label, kind = images.classes("label"), images.classes("kind")
    assert (label.names, label.values.tolist()) == (["2", "5"], [-1, 1, -1, 0])
    assert (kind.names, kind.values.tolist()) == (["-3", "2", "5"], [0, 2, -1, 1])


def test_class_labels_without_an_image_read(tmp_path):
    columns = {"image": [{"bytes": b"bad", "path": None}] * 3, "breed": [1, -1, 0], "none": [-1, -1, -1]}
    features = {"image": datasets.Image(), "breed": datasets.ClassLabel(names=["x", "y"])}
    features["none"] = datasets.ClassLabel(names=["x", "y"])
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(tmp_path / "set")
    labels = open_images(str(tmp_path / "set")).label_columns()
    assert labels.keys() == {"breed"}  # test sets come with labels that are all -1
    assert (labels["breed"].names, labels["breed"].values.tolist()) == (["x", "y"], [1, -1, 0])


def test_a_package_that_is_missing_is_no_fault_of_an_image(tmp_path, monkeypatch):
    write_files(tmp_path, {"0.jpg": encoded(0, "JPEG")})
    images = open_images(str(tmp_path))
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ValueError, match=r"^no image can be read: .*simplejpeg.*; install it: pip install simplejpeg$"):
        images.crop_or_substitute(0, RandomCrop(8, key=(0,)))


# Bad images


def bad_files():
    jpeg, png = encoded(0, "JPEG", quality=95), encoded(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut.png": png[: len(png) // 2],
        "cut.webp": encoded(0, "WEBP")[:60],
        "cut.gif": encoded(0, "GIF")[:-60],
        "cut.bmp": encoded(0, "BMP")[:-60],
        "cut.tiff": encoded(0, "TIFF")[:60],
        "empty.jpg": b"",
        "header_only.jpg": jpeg[:20],
        "garbage.jpg": bytes(range(256)) * 4,
        "page.jpg": b"<html>404 Not Found</html>",
        "flipped.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "not_finite.tiff": not_finite_tiff(),
    }


def not_finite_tiff():
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("name", sorted(bad_files()))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_images_are_named(tmp_path, name):
    write_files(tmp_path, {name: bad_files()[name], "good.png": 1})
    images = open_images(str(tmp_path))
    index = 1 - [images.sample_id(i).endswith("good.png") for i in range(2)].index(True)
    with pytest.raises(BadImageError, match=f"cannot read .*{name}: .+") as error:
        images.read(index)
    assert error.value.reason and error.value.reason in str(error.value) and "0x" not in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.reason) == (str(error.value), error.value.reason)
    assert np.array_equal(np.asarray(images.crop_or_substitute(index, WHOLE)[0]), pixels(1))


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_may_be_large_up_to_a_limit(tmp_path):
    """Pillow's own is 179 million pixels."""
    write_files(tmp_path, {"bomb.png": one_bit(30_000, 20_000), "good.png": 1})
    images = open_images(str(tmp_path))
    for use in (images.read, images.size):
        with pytest.raises(
            BadImageError, match=r"bomb\.png: .*600000000 pixels\): more than the 500,000,000 of data\.max_pi"
        ):
            use(0)
    assert [bad.sample_id for bad in images.crop_or_substitute(0, WHOLE)[1]] == [str(tmp_path / "bomb.png")]
    for max_pixels in (600_000_000, 0):
        assert open_images(str(tmp_path), max_pixels=max_pixels).size(0) == (30_000, 20_000)
    with pytest.raises(BadImageError, match=r"10 x 8 pixels.*more than the 79 of"):
        open_images(str(tmp_path), max_pixels=79).read(1)
    assert open_images(str(tmp_path), max_pixels=80).read(1).size == (10, 8)


def one_bit(width, height):
    """A PNG of a bit a pixel, which takes hardly any bytes."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, rows = (
        struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0),
        zlib.compress(bytes((width // 8 + 1) * height)),
    )
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_images_below_min_side_are_bad(tmp_path):
    write_files(tmp_path, {"small.png": 1})
    source = str(tmp_path)
    assert open_images(source, min_side=8).read(0).size == (10, 8)
    with pytest.raises(BadImageError, match=r"small\.png: 10 x 8 pixels, less than 9 a side"):
        open_images(source, min_side=9).read(0)


def test_images_are_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gray = io.BytesIO()
    Image.fromarray(np.array([[0, 65535], [257, 514]], dtype=np.uint16)).save(gray, "PNG")
    write_files(tmp_path, {"1.png": encoded(1, exif=exif), "2.png": gray.getvalue()})
    images = open_images(str(tmp_path))
    assert np.array_equal(np.asarray(images.read(0)), np.rot90(pixels(1), -1))
    assert np.asarray(images.read(1))[..., 1].tolist() == [[0, 255], [1, 2]]
    assert images.read(1).mode == "RGB"
    assert images.size(0) == (10, 8)


def test_an_index_outside_is_an_error_not_a_bad_image(tmp_path):
    write_files(tmp_path, {"1.png": 1})
    images = open_images(str(tmp_path))
    for read in (images.read, lambda index: images.crop_or_substitute(index, WHOLE)):
        with pytest.raises(IndexError):
            read(1)


# Substitutes


def half_bad(folder, count=40):
    write_files(folder, {f"{i:02d}.png": i if i % 2 else b"bad" for i in range(count)})
    return open_images(str(folder))


def read_all(images, order):
    found = {}
    for i in order:
        image, bad = images.crop_or_substitute(i, WHOLE)
        found[i] = (np.asarray(image).tobytes(), [(b.index, Path(b.sample_id).name, b.reason) for b in bad])
    return [found[i] for i in sorted(found)]


def test_substitutes_depend_on_the_index_alone(tmp_path):
    images = half_bad(tmp_path / "set")
    forward = read_all(images, range(40))
    assert read_all(images, reversed(range(40))) == forward
    assert read_all(pickle.loads(pickle.dumps(images)), range(40)) == forward
    good = [pixels(i).tobytes() for i in range(1, 40, 2)]
    for i, (content, bad) in enumerate(forward):
        if i % 2:
            assert content == pixels(i).tobytes() and bad == []
        else:
            assert content in good
            assert bad[0] == (i, f"{i:02d}.png", "ValueError: 3 bytes that are no image of a known format")
            assert len({index for index, *_ in bad}) == len(bad) and all(index % 2 == 0 for index, *_ in bad)
    # They differ between bad images: a favourite would be seen twenty times as often.
    assert len({content for content, bad in forward if bad}) > 8
    assert max(len(bad) for _, bad in forward) > 1  # a bad substitute is passed over, and told of


def test_substitutes_are_the_same_in_workers_and_in_another_process(tmp_path):
    images = half_bad(tmp_path / "set", 20)
    expected = read_all(images, range(20))
    loader = torch.utils.data.DataLoader(_Reader(images), batch_size=None, num_workers=2, collate_fn=tuple)
    assert list(loader) == expected
    assert_all(run_ranks(read_from_the_last_on, 1, tmp_path, str(tmp_path / "set"), str(tmp_path / "found.json")))
    found = json.loads((tmp_path / "found.json").read_text())
    fresh = [(bytes.fromhex(content), bad) for content, bad in reversed(found)]
    assert fresh == [(content, [index for index, *_ in bad]) for content, bad in expected]


def read_from_the_last_on(source, result):
    images = open_images(source)
    found = [images.crop_or_substitute(i, WHOLE) for i in reversed(range(20))]
    Path(result).write_text(json.dumps([[pixels.tobytes().hex(), [b.index for b in bad]] for pixels, bad in found]))


class _Reader(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return read_all(self.images, [index])[0]


def test_no_image_is_good(tmp_path):
    write_files(tmp_path, {"1.png": b"bad", "2.png": b""})
    with pytest.raises(BadImageError, match=r"1\.png is bad \(.*\) and so are 100 random images drawn in its place"):
        open_images(str(tmp_path)).crop_or_substitute(0, WHOLE)


# What users get wrong


def test_no_image_column(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "blob": [b"b"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"no column of images; its columns are: text .*string.*blob .*binary.*label .*int"
    ):
        open_images(str(tmp_path / "x.parquet"))


def test_check_images(tmp_path):
    write_files(tmp_path / "good", {f"{i:03d}.png": i for i in range(30)})
    images = open_images(str(tmp_path / "good"))
    for sample in (1, 7, 64):
        check_images(images, min_side=8, sample=sample)
    with pytest.raises(
        ValueError, match=r"30 of 30 .*000\.png, because: 10 x 8 pixels, less than 16 a side.*patch_size"
    ):
        check_images(images, min_side=16)

    write_files(tmp_path / "good", {"029.png": b"bad"})
    Image.new("RGB", (5, 5)).save(tmp_path / "good" / "000.png")
    check_images(images, min_side=8)  # a few bad ones, the small ones among them, are dealt with in training
    write_files(tmp_path / "good", {f"{i:03d}.png": b"bad" for i in range(15, 30)})
    with pytest.raises(ValueError, match=r"good:train: 16 of 30 images sampled cannot be used, the first, .*000\.png"):
        check_images(images, min_side=8)


def test_check_images_reads_no_pixels(tmp_path):
    write_files(tmp_path, {"cut.png": encoded(0)[:60], "bomb.png": encoded(0)[:60]})
    check_images(open_images(str(tmp_path)), min_side=8)


# Columns for evaluations


def opened(root, **columns):
    arrays = {name: pa.array(*of) for name, of in columns.items()}
    write_parquet(root / "set" / "train.parquet", len(next(iter(arrays.values()))), **arrays)
    return open_images(str(root / "set"), cache_dir=str(root / "cache"))


@pytest.mark.parametrize(
    "values, names, expected",
    [
        (([7, None, -3, 7, 100],), ["-3", "7", "100"], [1, -1, 0, 1, 2]),
        (([2**40, 5, 5, None, 2**63], pa.uint64()), ["5", "1099511627776", str(2**63)], [1, 0, 0, -1, 2]),
        ((["b", "a", None, "", "b"],), ["", "a", "b"], [2, 1, -1, 0, 2]),
        ((["b", "a", "b", "b", "ä"], pa.large_string()), ["a", "b", "ä"], [1, 0, 1, 1, 2]),
        (([True, None, False, False, True],), ["False", "True"], [1, -1, 0, 0, 1]),
        (([None] * 5, pa.string()), [], [-1] * 5),
    ],
    ids=["integers", "large", "words", "large words", "booleans", "none"],
)
def test_whole_numbers_and_words_as_classes_in_their_order(tmp_path, values, names, expected):
    found = opened(tmp_path, kind=values).classes("kind")
    assert (found.name, found.names, found.values.tolist()) == ("kind", names, expected)
    assert found.values.dtype == np.int64


def test_class_labels_as_classes_keep_those_that_no_image_has(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "w", "v"])})
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(3)], "kind": [1, None, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    images = open_images(str(tmp_path / "set"))
    found = images.classes("kind")
    assert (found.names, found.values.tolist()) == (["x", "w", "v"], [1, -1, 0])
    assert images.column_types() == {"kind": "int64"}


def test_numbers_and_what_is_none(tmp_path):
    images = opened(
        tmp_path,
        far=([0.5, None, 2.5, float("nan")], pa.float32()),
        size=([3, 4, None, 2**53],),
        word=(["a", "b", "c", "d"],),
        boxes=([[1.0], [], None, [2.0]],),
    )
    for name, expected in (("far", [0.5, np.nan, 2.5, np.nan]), ("size", [3, 4, np.nan, 2**53])):
        values = images.numbers(name)
        assert values.dtype == np.float64 and np.array_equal(values, expected, equal_nan=True)
    with pytest.raises(ValueError, match=r"the column 'word' of .* is of string and holds no numbers"):
        images.numbers("word")
    with pytest.raises(ValueError, match=r"the column 'far' of .* is of float; classes are whole numbers or words"):
        images.classes("far")
    types = images.column_types()
    assert [types[name] for name in ("far", "size", "word")] == ["float32", "int64", "string"]
    for read in (images.classes, images.numbers):
        with pytest.raises(ValueError, match=r"has no column 'image'; it has: far \(float32\), size \(int64\), word"):
            read("image")
    assert "image" not in types and list(types) == ["far", "size", "word", "boxes"]


def test_digests_tell_data_sets_apart_by_their_images(tmp_path):
    """In one place, so that names and numbers are told apart, too."""

    def digest(numbers, split="train", name="{:03}.png"):
        shutil.rmtree(tmp_path / "train" / "a", ignore_errors=True)
        write_files(tmp_path / split / "a", {name.format(place): i for place, i in enumerate(numbers)})
        return open_images(str(tmp_path), split=split).digest

    digests = [
        digest(range(8)),
        digest(range(7)),  # one image fewer
        digest([0, 1, 2, 3, 9, 5, 6, 7]),  # one is another
        digest([1, 0, *range(2, 8)]),  # two in each other's place
        digest(range(8), name="x{:03}.png"),
        digest(range(8), split="test"),
    ]
    assert len(set(digests)) == 6
    assert digest(range(8)) == digests[0]
    (tmp_path / "train/a/003.png").unlink()
    (tmp_path / "train/a/003.png").symlink_to(tmp_path / "nothing")  # what cannot be read is no error
    assert open_images(str(tmp_path)).digest not in digests


def test_a_digest_reads_so_many_images(tmp_path, monkeypatch):
    from ijepa_scale.data import images as module

    write_files(tmp_path / "train" / "a", {f"{i:03}.png": i for i in range(50)})
    images, read = open_images(str(tmp_path)), []
    monkeypatch.setattr(module, "_DIGESTED", 6)
    monkeypatch.setattr(images, "content", lambda index: read.append(index) or b"")
    images.digest  # noqa: B018 - it is computed when it is asked for
    assert read == [0, 10, 20, 29, 39, 49]
