"""Preparing a source: what is kept, what is resized, going on, and refusals."""

import io
import json
import os
import signal
import sys
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ijepa_scale.build import build_images
from ijepa_scale.config import load_config
from ijepa_scale.data.images import open_images, splits_of
from ijepa_scale.data.prepare import FACTS, FORMATS, Options, prepare, resized
from tests.data.small_sources import IMAGE, encoded, number_of, photo, write_images, write_parquet
from tests.processes import ROOT, run_ranks, start_ranks

SMALL = Options(shorter_side=32)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def write_source(folder, count=9):
    """train with two classes, validation with one of them: sizes above and below 32, portrait and landscape."""
    for i in range(count):
        width, height = [(80, 50), (50, 80), (40, 31), (32, 90)][i % 4]
        path = folder / ("train/cat", "train/dog", "val/dog")[i % 3] / f"{i:03}.{'jpg' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(width, height, seed=i).save(path)
    return folder


def contents(folder):
    return {split: [part.content(i) for i in range(len(part))] for split, part in opened(folder).items()}


def opened(source):
    return {split: open_images(str(source), split=split) for split in splits_of(str(source))}


def test_labels_splits_names_and_order_stay_and_large_images_shrink(tmp_path):
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    notes = prepare(str(source), str(out), SMALL, workers=2, shard_images=4)
    before, after = opened(source), opened(out)
    assert list(after) == list(before) == ["train", "validation"]
    assert sorted(path.name for path in (out / "data").iterdir()) == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "validation-00000-of-00001.parquet",
    ]
    assert (notes.images, notes.bad) == (9, [])
    as_is = 0
    for split in before:
        old, new = before[split], after[split]
        assert [new.sample_id(i) for i in range(len(new))] == [old.sample_id(i) for i in range(len(old))]
        labels = old.label_columns()["label"], new.label_columns()["label"]
        assert labels[0].names == labels[1].names == ["cat", "dog"]
        np.testing.assert_array_equal(labels[0].values, labels[1].values)
        for i in range(len(old)):
            width, height = old.read(i).size
            if min(width, height) <= 32:
                as_is += 1
                assert new.content(i) == old.content(i)
            else:
                assert new.read(i).size == ((51, 32) if width > height else (32, 51))
                assert new.read(i).size == open_encoded_size(new.content(i))
                whole = old.read(i).resize(new.read(i).size, Image.Resampling.BICUBIC)
                difference = np.asarray(whole.convert("L")).astype(float) - np.asarray(new.read(i).convert("L"))
                assert np.abs(difference).mean() < 4  # JPEG at quality 90; its colours are coarser
    assert as_is == notes.as_is == 4
    total = sum(len(content) for parts in contents(out).values() for content in parts)
    assert notes.bytes_after == total


def open_encoded_size(content):
    image = Image.open(io.BytesIO(content))
    assert image.format == "JPEG"
    return image.size


def test_numbers_as_labels_and_a_split_without_labels(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_parquet(source / "train.parquet", range(5), label=[3, None, 0, 7, 3])
    write_parquet(source / "test.parquet", range(5, 8), label=[None, None, None])
    prepare(str(source), str(out), Options(shorter_side=8), workers=1)
    assert contents(out) == contents(source)  # 10 x 8 pixels: as they are
    train, test = opened(out)["train"], opened(out)["test"]
    assert train.label_columns()["label"].values.tolist() == [3, -1, 0, 7, 3] and test.label_columns() == {}
    assert [train.sample_id(i) for i in range(5)] == [f"{i}.png" for i in range(5)]


def test_columns_of_single_values_are_kept_and_others_named(tmp_path, capsys):
    """Also beside an image that is left out, in a split without some of them, and where "image" is taken."""
    source, out = tmp_path / "source", tmp_path / "out"
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "image": datasets.Value("string"),
            "label": datasets.Value("string"),
            "count": datasets.Value("int8"),
            "near": datasets.Value("float64"),
            "good": datasets.Value("bool"),
            "breed": datasets.ClassLabel(names=["x", "y"]),
            "boxes": datasets.Sequence(datasets.Value("int64")),
            "unlike": datasets.Value("int64"),
        }
    )
    rows = [
        {
            "photo": {"bytes": b"bad" if i == 1 else encoded(i), "path": f"{i}.png"},
            "image": "a",
            "label": [None, "cat", "dog"][i % 3],
            "count": i - 1,
            "near": i / 2,
            "good": i > 2,
            "breed": -1 if i == 3 else i % 2,
            "boxes": [i],
            "unlike": i,
        }
        for i in range(5)
    ]
    train = datasets.Dataset.from_list(rows, features=features)
    test = train.select([2, 4]).remove_columns(["near"]).cast_column("unlike", datasets.Value("string"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(source)
    prepare(str(source), str(out), SMALL, workers=1, column="photo", shard_images=3, max_bad_fraction=0.5)
    kept = ["label", "count", "near", "good", "breed"]
    read = {split: part.rows(list(range(len(part))), kept).to_pylist() for split, part in opened(out).items()}
    expected = [{name: row[name] for name in kept} for row in rows if row["boxes"] != [1]]
    assert read == {"train": expected, "test": [{**expected[i], "near": None} for i in (1, 3)]}
    part = opened(out)["train"]
    assert part.scalar_features() == {name: features[name] for name in kept}
    assert [number_of(part.read(i)) for i in range(4)] == [0, 2, 3, 4]
    said = capsys.readouterr().out
    assert "columns left out: image (string), boxes (" in said and "unlike (unlike in splits)" in said


def test_a_short_last_shard_may_not_be_of_bad_images_alone(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_images(source, range(9))
    (source / "0008.png").write_bytes(b"bad")
    for _ in range(2):
        notes = prepare(str(source), str(out), SMALL, workers=1, shard_images=4, max_bad_fraction=0.2)
        assert (notes.images, len(notes.bad)) == (8, 1)
    assert [len(pq.read_table(path)) for path in sorted((out / "data").iterdir())] == [3, 3, 2]


def test_what_another_version_began_is_not_mixed_with_todays(tmp_path):
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    first = prepare(str(source), str(out), SMALL, workers=1, shard_images=4)
    facts = json.loads((out / FACTS).read_text())
    del facts["version"]
    (out / FACTS).write_text(json.dumps(facts))
    assert prepare(str(source), str(out), SMALL, workers=1, shard_images=4).__dict__ == first.__dict__  # it is whole
    shards = sorted((out / "data").iterdir())
    shards[0].unlink()
    with pytest.raises(ValueError, match=r"was begun by another version of this command, .*; give another folder"):
        prepare(str(source), str(out), SMALL, workers=1, shard_images=4)
    for shard in shards[1:]:
        shard.unlink()
    assert prepare(str(source), str(out), SMALL, workers=1, shard_images=4).images == 9


def test_what_was_prepared_can_be_trained_on(tmp_path):
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    prepare(str(source), str(out), SMALL, workers=1)
    config = load_config(
        ROOT / "configs" / "tiny.yaml", [f"data.source={out}", "optimization.global_batch_size=4", "data.num_images=0"]
    )
    assert len(build_images(config)) == 6


def test_webp_and_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo(90, 60).save(file, "JPEG", exif=exif)
    small = Image.open(io.BytesIO(resized(file.getvalue(), Options(shorter_side=30, format="webp"))))
    assert small.format == "WEBP" and small.size == (30, 45) and not small.getexif()
    low, high = (len(resized(file.getvalue(), Options(shorter_side=30, quality=q))) for q in (20, 95))
    assert low < high


def test_an_image_too_long_for_the_format_keeps_its_bytes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    Image.new("RGB", (16384, 33)).save(source / "long.png")
    Image.new("RGB", (64, 64)).save(source / "other.png")
    notes = prepare(str(source), str(tmp_path / "fits"), Options(shorter_side=32, format="webp"), workers=1)
    assert (notes.images, notes.as_is) == (2, 0)  # 15,888 pixels long
    Image.new("RGB", (17000, 33)).save(source / "long.png")
    notes = prepare(str(source), str(tmp_path / "out"), Options(shorter_side=32, format="webp"), workers=1)
    assert (notes.images, notes.as_is, notes.bad) == (2, 1, [])
    assert open_images(str(tmp_path / "out")).content(0) == (source / "long.png").read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_the_longest_sides_are_those_that_can_be_written(format):
    def written(side):
        Image.new("RGB", (side, 1)).save(io.BytesIO(), format.upper())

    written(FORMATS[format])
    with pytest.raises((OSError, ValueError)):
        written(FORMATS[format] + 1)


def test_a_second_run_writes_what_is_missing_and_nothing_else(tmp_path):
    source, out = write_source(tmp_path / "source", 20), tmp_path / "out"
    first = prepare(str(source), str(out), SMALL, workers=1, shard_images=3)
    whole, shards = contents(out), sorted((out / "data").iterdir())
    gone = shards[1]
    gone.unlink()
    (out / "data" / f".{gone.name}.partial").write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in shards if path != gone}
    again = prepare(str(source), str(out), SMALL, workers=1, shard_images=3)
    assert again.__dict__ == first.__dict__
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert sorted((out / "data").iterdir()) == shards and contents(out) == whole
    assert prepare(str(source), str(out), SMALL, workers=1, shard_images=3).__dict__ == first.__dict__


def prepare_slowly(source, out):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    prepare(source, out, SMALL, workers=1, shard_images=8)


def test_stopped_it_goes_on(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    photo(600, 500).save(source / "000.png", compress_level=1)
    for i in range(1, 240):  # 30 shards take seconds: the signal comes well before the last
        os.link(source / "000.png", source / f"{i:03}.png")
    started = start_ranks(prepare_slowly, 1, tmp_path / "log", str(source), str(out))
    deadline = time.monotonic() + 60
    while not list((out / "data").glob("*.parquet") if out.exists() else []) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(started.pid(0), signal.SIGINT)
    (end,) = started.wait()
    assert end.code != 0
    done = sorted(path.name for path in (out / "data").iterdir())
    assert 1 <= len(done) < 30 and all(name.startswith("train-") for name in done)
    notes = prepare(str(source), str(out), SMALL, workers=1, shard_images=8)
    assert notes.images == 240 and len(open_images(str(out))) == 240


def test_unreadable_images_are_left_out_and_named(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for i in range(120):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(source / f"{i:03}.png")
    (source / "007.png").write_bytes(b"no image")
    notes = prepare(str(source), str(out), SMALL, workers=1, shard_images=50)
    assert notes.images == 119 and [name for name, _ in notes.bad] == [str(source / "007.png")]
    assert "no image of a known format" in notes.bad[0][1]
    left = open_images(str(out))
    assert [left.sample_id(i)[-7:] for i in range(6, 8)] == ["006.png", "008.png"] and len(left) == 119
    assert prepare(str(source), str(out), SMALL, workers=1, shard_images=50).bad == notes.bad

    (source / "008.png").unlink()
    (source / "008.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"2 of 120 images cannot be read, more than 1%(.|\n)*007\.png(.|\n)*008\.png"):
        prepare(str(source), str(tmp_path / "other"), SMALL, workers=1)
    allowed = {"max_bad_fraction": 0.02, "workers": 1}
    assert prepare(str(source), str(tmp_path / "allowed"), SMALL, **allowed).images == 118
    with pytest.raises(ValueError, match="more than 2%"):
        prepare(str(source), str(tmp_path / "small"), SMALL, max_pixels=1000, **allowed)


def test_after_a_refusal_the_source_can_be_mended(tmp_path):
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    (source / "train" / "cat" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 10 images cannot be read"):
        prepare(str(source), str(out), SMALL, workers=1)
    (source / "train" / "cat" / "bad.png").unlink()
    assert prepare(str(source), str(out), SMALL, workers=1).images == 9
    assert prepare(str(source), str(out), SMALL, workers=1).images == 9  # which the folder is now noted to be of


@pytest.mark.parametrize("content", [b"", b"no Parquet file at all", None])
def test_damage_to_what_was_written_is_named(tmp_path, content):
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    prepare(str(source), str(out), SMALL, workers=1)
    shard = next((out / "data").glob("train-*.parquet"))
    if content is None:
        shard.unlink()
        write_parquet(shard, range(3))  # another's
    else:
        shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard} is no whole shard of this command .*delete it"):
        prepare(str(source), str(out), SMALL, workers=1)
    shard.unlink()
    assert prepare(str(source), str(out), SMALL, workers=1).images == 9
    (out / FACTS).write_bytes(b"5" if content else b"")
    with pytest.raises(ValueError, match=rf"{out / FACTS} is damaged: "):
        prepare(str(source), str(out), SMALL, workers=1)


def test_other_input_is_refused(tmp_path):
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    prepare(str(source), str(out), SMALL, workers=1)
    with pytest.raises(ValueError, match="shorter_side changed from 32 to 33; give another folder, or delete"):
        prepare(str(source), str(out), Options(shorter_side=33), workers=1)
    with pytest.raises(ValueError, match="quality changed from 90 to 80"):
        prepare(str(source), str(out), Options(shorter_side=32, quality=80), workers=1)
    path = source / "train" / "cat" / "000.png"
    photo(80, 50, seed=50).save(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="the files of the source changed"):
        prepare(str(source), str(out), SMALL, workers=1)
    path.unlink()
    with pytest.raises(ValueError, match="images changed from"):
        prepare(str(source), str(out), SMALL, workers=1)
    with pytest.raises(ValueError, match="lies in the source"):
        prepare(str(source), str(source / "small"), SMALL, workers=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        prepare(str(source), str(tmp_path / "full"), SMALL, workers=1)
    assert not (tmp_path / "full" / FACTS).exists()


@pytest.mark.parametrize(
    "options, words",
    [({"shorter_side": 0}, "--shorter-side"), ({"format": "png"}, "jpeg, webp"), ({"quality": 101}, "--quality")],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Options(**{"shorter_side": 32, **options})


def verb(*arguments):
    import runpy

    sys.argv = ["prepare.py", *arguments]
    runpy.run_path(str(ROOT / "launch" / "prepare.py"), run_name="__main__")


def test_another_column_is_prepared_and_going_on_with_it_takes_it_again(tmp_path):
    """Also what an older version began, whose facts say nothing of columns."""
    masks = [{"bytes": encoded(100 + i), "path": f"{i}.png"} for i in range(3)]
    source = str(write_parquet(tmp_path / "x.parquet", range(3), mask=pa.array(masks, IMAGE)))
    for column, more in (("mask", 100), ("", 0)):
        out = tmp_path / f"out{column}"
        for _ in range(2):
            assert prepare(source, str(out), SMALL, workers=1, column=column).images == 3
        (images,) = opened(out).values()
        assert [number_of(images.read(i)) for i in range(3)] == [more, more + 1, more + 2]
        with pytest.raises(ValueError, match="column changed from"):
            prepare(source, str(out), SMALL, workers=1, column="image")
    facts = json.loads((out / FACTS).read_text())
    del facts["column"], facts["config"]
    (out / FACTS).write_text(json.dumps(facts))
    assert prepare(source, str(out), SMALL, workers=1).images == 3


def test_the_verb(tmp_path):
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    arguments = [str(source), str(out), "--shorter-side", "32", "--workers", "1", "--format", "webp"]
    (end,) = run_ranks(verb, 1, tmp_path, *arguments)
    assert end.code == 0, end.output
    assert "9 images (4 kept as they were, 0 unreadable)" in end.output
    assert f"use data.source={out}" in end.output
    assert json.loads((out / FACTS).read_text())["format"] == "webp"
    (end,) = run_ranks(verb, 1, tmp_path, str(tmp_path / "none"), str(out), "--shorter-side", "32")
    assert end.code == 2 and "error: there is no folder" in end.output
