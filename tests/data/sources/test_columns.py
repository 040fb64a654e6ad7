import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import open_file, open_images, splits_of
from ijepa_scale.data.sources.columns import preferred
from ijepa_scale.data.sources.folders import say_once
from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.data.streams.opening import open_shards
from ijepa_scale.data.streams.samples import sample_images
from tests.data.small_sources import (
    IMAGE,
    WHOLE,
    count_images,
    encoded,
    number_of,
    write_images,
    write_parquet,
    write_tar,
)

PATIENCE = Patience(0.1, 0.01)
MASKS = ["mask", "seg", "segmentation_map", "conditioning_image", "depthMap", "label", "annotation", "image_mask"]
PHOTOS = ["image", "img", "photo", "Picture", "jpg", "webp", "pixel_values", "left", "original_image"]


def write(path, kind, names):
    """A source with columns of these names; image i of column k is number 10 * k + i."""
    columns = {name: [{"bytes": encoded(10 * k + i), "path": None} for i in range(3)] for k, name in enumerate(names)}
    if kind == "Image":
        features = datasets.Features(dict.fromkeys(names, datasets.Image()))
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(path)
        return str(path)
    if kind == "bytes":
        arrays = {name: pa.array([row["bytes"] for row in rows], pa.binary()) for name, rows in columns.items()}
    elif kind == "bytes in a struct":  # as some writers leave out the path
        struct = pa.struct({"bytes": pa.large_binary()})
        arrays = {name: pa.array([{"bytes": row["bytes"]} for row in rows], struct) for name, rows in columns.items()}
    else:
        arrays = {name: pa.array(rows, IMAGE) for name, rows in columns.items()}
    path = path.with_suffix(".parquet")
    pq.write_table(pa.table({"text": ["a", "b", "c"], **arrays, "label": [2, 0, 1]} | arrays), path)
    return str(path)


def stream(source, **options):
    return open_shards(source, **options, patience=PATIENCE)


def every_way(source, folder, column=""):
    """The numbers of the images by index, as a stream, and in the sample that probes get, which agree."""
    images = open_images(source, column=column)
    found = [number_of(images.read(i)) for i in range(len(images))]
    shards = open_shards(source, column=column, patience=PATIENCE)
    streamed, bad, _ = Streams(sources=(shards,), seed=0, shuffle_buffer=5).take(0, [WHOLE] * len(found))
    assert sorted(number_of(image) for _, _, image in streamed) == sorted(found) and not bad
    kept = open_file(str(sample_images(shards, folder / f"{column}.arrow", count=9, patience=PATIENCE)), name="x:y")
    assert [number_of(kept.read(i)) for i in range(len(kept))] == found
    assert count_images(source, column=column) == len(found) and kept.sample_id(0)
    return found


@pytest.mark.parametrize("kind", ["Image", "bytes", "bytes in a struct", "bytes and path"])
def test_the_photographs_are_taken_and_any_other_column_can_be(tmp_path, kind, caplog):
    pairs = [*zip(MASKS, PHOTOS, strict=False), *zip(PHOTOS[::-1], MASKS, strict=False)]
    for number, (first, second) in enumerate(pairs):
        photo = first if first in PHOTOS else second
        source = write(tmp_path / str(number), kind, [first, second])
        assert preferred([first, second]) == photo
        if number not in (0, 9):
            continue  # the rest is the same for all
        say_once.cache_clear()
        caplog.clear()
        taken = [10 * [first, second].index(photo) + i for i in range(3)]
        assert every_way(source, tmp_path / str(number) / "out") == taken
        assert caplog.text.count(f"several columns of images ({first}, {second}); reading {photo!r}; data.column") == 1
        caplog.clear()
        for k, name in enumerate([first, second]):
            assert every_way(source, tmp_path / str(number) / "chosen", name) == [10 * k + i for i in range(3)]
        assert not caplog.records
        for call in (open_images, count_images, stream):
            with pytest.raises(ValueError, match=rf"no column 'foto' \(data\.column\); its columns are: .*{second} \("):
                call(source, column="foto")
            if kind != "Image":
                with pytest.raises(ValueError, match=r"the column 'text' of .* holds no images; its columns are: t"):
                    call(source, column="text")


def test_names_that_say_nothing_leave_the_first(tmp_path):
    assert [preferred(names) for names in (["a", "b"], ["left", "right"], ["mask", "depth"])] == ["a", "left", "mask"]
    # A column of bytes is looked at, too, where all images proper are made of photographs.
    features = datasets.Features({"mask": datasets.Image(), "jpg": datasets.Value("binary")})
    rows = {"mask": [{"bytes": encoded(1), "path": None}], "jpg": [encoded(2)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    assert every_way(str(tmp_path / "set"), tmp_path / "out") == [2]


def test_bytes_without_a_path_are_bad_where_there_are_none(tmp_path):
    struct = pa.struct({"bytes": pa.binary(), "size": pa.int64()})
    rows = [{"bytes": encoded(0), "size": 1}, {"bytes": None, "size": 1}, None]
    pq.write_table(pa.table({"picture": pa.array(rows, struct)}), tmp_path / "x.parquet")
    images = open_images(str(tmp_path / "x.parquet"))
    assert number_of(images.read(0)) == 0 and images.sample_id(1) == "train[1]"
    for index in (1, 2):
        with pytest.raises(BadImageError, match=rf"train\[{index}\]"):
            images.read(index)
    shards = open_shards(str(tmp_path / "x.parquet"), patience=PATIENCE)
    _, bad, _ = Streams(sources=(shards,), seed=0, shuffle_buffer=5).take(0, [WHOLE] * 3)
    assert {image.index for image in bad} == {1, 2}


CARD = """---
configs:
- config_name: large
  data_files:
  - {split: train, path: large/train*}
  - {split: test, path: large/test*}
- config_name: small
  data_files: small/*.parquet
---
"""


def test_a_configuration_is_chosen_by_name(tmp_path):
    """Of a folder whose card lists several; without a name, or with a wrong one, the error tells which there are."""
    for name, first, count in (("large/train", 0, 4), ("large/test", 10, 2), ("small/x", 20, 3)):
        write_parquet(tmp_path / f"set/{name}.parquet", range(first, first + count))
    (tmp_path / "set/README.md").write_text(CARD)
    source = str(tmp_path / "set")

    for config, splits, first, count in (("large", ["train", "test"], 0, 4), ("small", ["train"], 20, 3)):
        images = open_images(source, config=config)
        assert [number_of(images.read(i)) for i in range(len(images))] == list(range(first, first + count))
        assert stream(source, config=config).num_images == count_images(source, config=config) == count
        assert splits_of(source, config=config) == splits
    for call in (open_images, stream, count_images, splits_of):
        with pytest.raises(ValueError, match=r"has several configurations: large, small; .* data\.config=large"):
            call(source)
        with pytest.raises(ValueError, match=r"has no configuration 'tiny', but large, small; .* data\.config=large"):
            call(source, config="tiny")


@pytest.mark.parametrize("make", [write_images, write_tar, write_parquet])
def test_what_has_no_columns_or_configurations_says_so(tmp_path, make):
    path = tmp_path / {write_images: "x", write_tar: "x.tar", write_parquet: "x.parquet"}[make]
    make(path, range(3))
    for call in (open_images, count_images, stream):
        with pytest.raises(ValueError, match=rf"data\.config is 'a', and '{re.escape(str(path))}' has no conf"):
            call(str(path), config="a")
        if make is write_images:
            with pytest.raises(ValueError, match=r"data\.column is 'a', and .* is a folder of image files.*leave"):
                call(str(path), column="a")
