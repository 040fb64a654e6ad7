import itertools
import logging
import os
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ijepa_scale.data.images import open_images
from ijepa_scale.data.sources import contents
from ijepa_scale.data.sources.contents import folder_contents
from ijepa_scale.data.sources.inspection import inspect_source
from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.data.streams.opening import open_shards
from tests.data.small_sources import (
    WHOLE,
    count_images,
    encoded,
    number_of,
    save_to_disk,
    write_images,
    write_parquet,
    write_tar,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def write_arrow(path, numbers):
    save_to_disk(path.parent / "saved", numbers, shards=1)
    (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    for file in (path.parent / "saved").iterdir():
        file.unlink()


def write_kind(kind, folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(count)
    if kind == "images":
        write_images(folder, numbers)
    else:
        {"parquet": write_parquet, "arrow": write_arrow, "tar": write_tar}[kind](folder / f"train.{kind}", numbers)


def metadata(path):
    pq.write_table(pa.table({"url": ["x"] * 500, "sha256": [b"abc"] * 500}), path)


def hub_clone(root):
    write_parquet(root / "data/train-00000-of-00002.parquet", range(120), 100)
    write_parquet(root / "data/train-00001-of-00002.parquet", range(120, 200), 100)
    write_images(root / "assets", range(20))
    (root / "README.md").write_text("# A data set\n")
    return "parquet", 200, "2 Parquet files of 200 images taken; left out: 20 image files of 20 images, such as assets/"


def flat_clone(root):
    write_parquet(root / "0.parquet", range(40))
    write_images(root, range(4))
    return "parquet", 40, "1 Parquet file of 40 images taken; left out: 4 image files of 4 images, such as 0000.png"


def img2dataset(root):
    for i in range(2):
        write_tar(root / f"0000{i}.tar", range(20 * i, 20 * i + 20))
        metadata(root / f"0000{i}.parquet")
    return "tar", 40, "2 tars taken; left out: 2 Parquet files without a column of images, such as 00000.parquet"


def img2dataset_files(root):
    write_images(root / "00000", range(3))
    metadata(root / "00000.parquet")
    return "images", 3, "3 image files taken; left out: 1 Parquet file without a column of images, such as 00000."


def metadata_beside(root):
    write_parquet(root / "train-0.parquet", range(5))
    metadata(root / "metadata.parquet")
    return "parquet", 5, "1 Parquet file taken; left out: 1 Parquet file without a column of images, such as metadata"


def bytes_beside_audio(root):
    pq.write_table(pa.table({"picture": [encoded(i) for i in range(6)]}), root / "x.parquet")
    audio = datasets.Dataset.from_dict({"audio": [{"bytes": b"RIFF", "path": None}] * 90})
    audio.cast_column("audio", datasets.Audio(decode=False)).to_parquet(root / "sounds.parquet")
    return "parquet", 6, "1 Parquet file taken; left out: 1 Parquet file without a column of images, such as sounds."


def half_pulled(root):
    write_parquet(root / "train-0.parquet", range(5))
    (root / "train-1.parquet").write_bytes(POINTER)
    return "parquet", 5, "1 Parquet file taken; left out: 1 Parquet file not pulled yet, being Git-LFS pointers"


def webdataset_clone(root):
    write_tar(root / "data/train-0.tar", range(30))
    write_images(root / "figures", range(3))
    return "tar", 30, "1 tar of 30 images taken; left out: 3 image files of 3 images, such as figures/0000.png"


LAYOUTS = [
    *(hub_clone, flat_clone, img2dataset, img2dataset_files, metadata_beside, bytes_beside_audio, half_pulled),
    webdataset_clone,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_files_that_hold_the_images_are_taken_and_the_others_named(tmp_path, layout, caplog):
    """By index, streamed and counted alike, and said once."""
    kind, count, said = layout(tmp_path)
    source = str(tmp_path)
    assert inspect_source(source)[0] == kind
    assert count_images(source) == count
    images = open_images(source)
    shards = open_shards(source, patience=Patience(0.1, 0.01))
    drawn, bad, _ = Streams(sources=(shards,), seed=0, shuffle_buffer=5).take(0, [WHOLE] * count)
    streamed = sorted(number_of(image) for _, _, image in drawn)
    assert streamed == sorted(number_of(images.read(i)) for i in range(len(images))) and not bad
    assert len(streamed) == count
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum(f"{source}: {said}" in line for line in warned) == 1, warned


@pytest.mark.parametrize("more, less", itertools.permutations(["parquet", "arrow", "tar", "images"], 2))
def test_of_several_kinds_the_one_with_ten_times_the_images_or_none(tmp_path, more, less):
    write_kind(more, tmp_path / "a", 20)
    write_kind(less, tmp_path / "b", 2)
    assert inspect_source(str(tmp_path))[0] == more
    write_kind(less, tmp_path / "b", 3)
    with pytest.raises(ValueError, match="not plain which of them to take") as refusal:
        inspect_source(str(tmp_path))
    text = str(refusal.value)
    assert "20 images in " in text and "3 images in " in text
    sources = [word.rstrip(",").removeprefix("data.source=") for word in text.split() if "data.source=" in word]
    assert sorted(len(open_images(source)) for source in sources) == [3, 20]


def test_kinds_in_one_folder_are_to_be_parted(tmp_path):
    write_images(tmp_path, range(5))
    write_tar(tmp_path / "x.tar", range(5))
    wanted = rf"give a folder of their own, .* for the image files|data\.source={tmp_path}/x\.tar for the tars"
    with pytest.raises(ValueError, match=wanted):
        inspect_source(str(tmp_path))


def test_images_in_tars_are_told_from_a_few(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_COUNTED_IN_TARS", 20)
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", range(100 * i, 100 * i + 100))
    write_images(tmp_path / "b", range(2))
    found = folder_contents(str(tmp_path))
    count = int(found.taken.split("of about ")[1].split()[0])
    assert found.kind == "tar" and 200 < count < 400


@pytest.mark.parametrize("ending", ["png", "parquet", "arrow", "tar"])
def test_pointers_of_git_lfs_are_told(tmp_path, ending):
    for i in range(3):
        (tmp_path / f"{i}.{ending}").write_bytes(POINTER)
    for source in [tmp_path] + [tmp_path / "0.{ending}"] * (ending != "png"):
        for look in (inspect_source, open_images, count_images):
            with pytest.raises(ValueError, match="git lfs pull"):
                look(str(source).format(ending=ending))
    if ending == "tar":
        with pytest.raises(ValueError, match="git lfs pull"):
            open_shards(str(tmp_path / "{0..2}.tar"), patience=Patience(0))
    write_images(tmp_path, range(9))  # one bad image among others says so of itself
    if ending == "png":
        with pytest.raises(ValueError, match="git lfs pull"):
            open_images(str(tmp_path)).read(0)


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def said(folder, *names):
        write_images(tmp_path / folder, range(3))
        for name in names:
            (tmp_path / folder / os.path.dirname(name)).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"\0\0\0\x18ftypheic")
        caplog.clear()
        for _ in range(2):
            inspect_source(str(tmp_path / folder))
        (record,) = caplog.records
        return record.levelname, record.getMessage().partition(f"{folder}: ")[2]

    assert said("plain") == ("INFO", "3 image files taken")
    level, text = said("phone", *(f"{i}.HEIC" for i in range(200)), "a.txt", "b.json", "c.json")
    assert level == "WARNING" and text.startswith(
        "most files left out, and only 3 image files taken; left out: 200 .heic "
    )
    assert "Pillow cannot decode here (convert them" in text and text.endswith("0.HEIC, 3 of .json, .txt")
    level, text = said("bare", *map(str, range(30)))
    assert level == "WARNING" and "left out: 30 without an ending and no image by the content, such as 0" in text
    level, text = said("packed", "more.zip")
    assert level == "WARNING" and text.endswith("left out: 1 .zip file (unpack them), such as more.zip")
    assert said("noted", "a.xml", "b.xml") == ("INFO", "3 image files taken; left out: 2 of .xml")
    level, text = said("nas", "@eaDir/x.png")
    assert (level, text) == (
        "INFO",
        "3 image files taken; left out: 1 folder of a system, a run or a cache, such as @eaDir",
    )
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips/a.zip").touch()
    with pytest.raises(ValueError, match=r"holds no Parquet, .*; it holds 1 \.zip file \(unpack them\)"):
        inspect_source(str(tmp_path / "zips"))


@pytest.mark.parametrize(
    "source, words",
    [
        ("s3://bucket/train", "s3:// is not among what a source may be .* mount it as a folder"),
        ("gs://bucket/{000..003}.tar", "gs:// is not among"),
        ("abfs://c@a/x.parquet", "abfs:// is not among"),
        ("file:///data/x", "file:// is not among .*; give /data/x"),
        ("hf://datasets/me/data", "a whole data set is given by its id alone"),
        ("hf://me/data/0.tar", "names no file on the Hub: that is hf://datasets/OWNER/NAME/FILE"),
    ],
)
def test_sources_elsewhere_that_cannot_be_read_are_told(source, words):
    for look in (inspect_source, open_images, count_images, lambda s: open_shards(s, patience=Patience(0))):
        with pytest.raises(ValueError, match=words):
            look(source)


@pytest.mark.parametrize(
    "folders, told",
    [
        ({"JPEGImages": 20, "SegmentationClass": 6, "SegmentationObject": 3}, "9 of the 29 images .*Class (6)"),
        ({"train/images": 9, "train/masks": 9}, "9 of the 18 images .*train/masks (9)"),
        ({f"class-{i}": 3 for i in range(30)} | {"gas_mask": 3}, ""),
        ({"masks": 9}, ""),
    ],
)
def test_masks_beside_photographs_are_told(tmp_path, caplog, folders, told):
    for folder, count in folders.items():
        write_images(tmp_path / folder, range(count))
    with caplog.at_level(logging.WARNING):
        assert len(folder_contents(str(tmp_path)).files) == sum(folders.values())
    warnings = [record.getMessage() for record in caplog.records if "masks" in record.getMessage()]
    assert bool(warnings) == bool(told)
    assert all(re.search(told.replace("(", r"\(").replace(")", r"\)"), text) for text in warnings)
