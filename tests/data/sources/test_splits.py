import json
import logging
import os

import datasets
import pytest

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import open_images, splits_of
from ijepa_scale.data.sources import copies
from ijepa_scale.data.sources.copies import copy_need, parts_of
from ijepa_scale.data.sources.splits import source_builder
from ijepa_scale.data.streams.opening import shard_locations
from tests.data.small_sources import count_images
from tests.data.test_images import contents, encoded, write_files, write_parquet


def hf_dataset(first, count, label=True):
    columns = {"image": [{"bytes": encoded(first + i), "path": None} for i in range(count)]}
    features = {"image": datasets.Image()}
    if label:
        columns["label"] = [i % 2 for i in range(count)]
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_folder_of_parquet(tmp_path, cache):
    write_parquet(tmp_path / "set/data/train-00000-of-00002.parquet", 4, 0)
    write_parquet(tmp_path / "set/data/train-00001-of-00002.parquet", 3, 4)
    write_parquet(tmp_path / "set/data/validation-00000-of-00001.parquet", 2, 10)
    source = str(tmp_path / "set")
    assert splits_of(source) == ["train", "validation"]
    images = open_images(source)
    assert (images.name, images.num_images, len(images)) == ("set:train", 7, 7)
    assert contents(images) == list(range(7))
    assert images.sample_id(5) == "5.png"
    assert images.label_columns() == {}
    for split in ("validation", "val"):
        assert contents(open_images(source, split=split)) == [10, 11]
    assert any(cache.iterdir())


def test_one_parquet_file_and_its_cache(tmp_path):
    write_parquet(tmp_path / "x.parquet", 3)
    source, cache_dir = str(tmp_path / "x.parquet"), str(tmp_path / "a/cache")
    needed, free, _ = copy_need(parts_of(source_builder(source, cache_dir), "train"), "train", cache_dir)
    assert needed == os.path.getsize(source) and free > 0
    assert splits_of(source, cache_dir) == ["train"]
    assert contents(open_images(source, cache_dir=cache_dir)) == [0, 1, 2]
    assert copy_need(parts_of(source_builder(source, cache_dir), "train"), "train", cache_dir)[0] == 0
    (tmp_path / "x.parquet").unlink()
    write_parquet(tmp_path / "x.parquet", 2, 20)  # a changed file is not taken from the cache
    assert contents(open_images(source, cache_dir=cache_dir)) == [20, 21]


def test_saved_dataset(tmp_path):
    hf_dataset(0, 6).select([4, 0, 1]).save_to_disk(tmp_path / "one")
    assert splits_of(str(tmp_path / "one")) == ["train"]
    images = open_images(str(tmp_path / "one"))
    assert contents(images) == [4, 0, 1]
    assert images.sample_id(2) == "train[2]"
    assert images.label_columns()["label"].values.tolist() == [0, 0, 1]

    datasets.DatasetDict(train=hf_dataset(0, 2), val=hf_dataset(7, 3)).save_to_disk(tmp_path / "two")
    assert splits_of(str(tmp_path / "two")) == ["train", "val"]
    assert contents(open_images(str(tmp_path / "two"), split="val")) == [7, 8, 9]
    assert contents(open_images(str(tmp_path / "two"), split="validation")) == [7, 8, 9]
    assert contents(open_images(str(tmp_path / "two"))) == [0, 1]


def test_a_saved_part_of_a_split_is_that_split(tmp_path):
    part = hf_dataset(0, 3)
    part._split = datasets.Split("train[:10%]+test")  # as load_dataset(..., split="train[:10%]+test") has it
    part.save_to_disk(tmp_path / "part")
    assert json.loads((tmp_path / "part" / "state.json").read_text())["_split"] == "train[:10%]+test"
    assert splits_of(str(tmp_path / "part")) == ["train"] and contents(open_images(str(tmp_path / "part"))) == [0, 1, 2]
    assert list(shard_locations(str(tmp_path / "part"))) == ["train"]


def test_a_state_of_another_program_makes_no_saved_dataset(tmp_path):
    write_files(tmp_path / "set", {"3.png": 3})
    (tmp_path / "set" / "state.json").write_text('{"window": [0, 0]}')
    assert contents(open_images(str(tmp_path / "set"))) == [3]


def test_arrow_files(tmp_path, cache):
    for name, first, count in [("x-train-00000-of-00002", 0, 2), ("x-train-00001-of-00002", 2, 3), ("x-test", 9, 1)]:
        hf_dataset(first, count).save_to_disk(tmp_path / "saved" / name)
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "saved" / name / "data-00000-of-00001.arrow").rename(tmp_path / f"set/{name}.arrow")
    (tmp_path / "set/cache-1234.arrow").write_bytes(b"left by a map")
    assert sorted(splits_of(str(tmp_path / "set"))) == ["test", "train"]
    images = open_images(str(tmp_path / "set"))
    assert contents(images) == [0, 1, 2, 3, 4]
    assert images.label_columns()["label"].names == ["cat", "dog"]
    assert contents(open_images(str(tmp_path / "set"), split="test")) == [9]
    assert contents(open_images(str(tmp_path / "set/x-test.arrow"), split="test")) == [9]
    assert not any(cache.iterdir()), "Arrow files are mapped where they are"


def test_folder_of_images_in_any_tree(tmp_path, cache):
    odd = os.fsdecode(b"caf\xe9.png")  # a name that is not UTF-8
    files = {
        "b/deep/er/3.PNG": 3,
        "a.png": 1,
        "b/2.jpg.png": 2,
        "c d/é.webp": encoded(5, "WEBP", lossless=True),
        odd: 6,
    }
    write_files(tmp_path / "set", files)
    write_files(
        tmp_path / "set", {".hidden.png": 9, ".git/x.png": 9, "__MACOSX/x.png": 9, "notes.txt": b"", "x": b"no"}
    )
    images = open_images(str(tmp_path / "set"))
    assert splits_of(str(tmp_path / "set")) == ["train"]
    paths = sorted(["a.png", "b/2.jpg.png", "b/deep/er/3.PNG", "c d/é.webp", odd])
    assert contents(images) == [
        {"a.png": 1, "b/2.jpg.png": 2, "b/deep/er/3.PNG": 3, "c d/é.webp": 5, odd: 6}[path] for path in paths
    ]
    assert images.sample_id(0) == str(tmp_path / "set/a.png")
    for i in range(len(images)):
        images.sample_id(i).encode()
    assert images.label_columns() == {}
    assert not any(cache.iterdir())


def test_linked_images_are_read_and_broken_links_are_bad(tmp_path):
    write_files(tmp_path / "elsewhere", {"1.png": 1, "more/2.png": 2})
    write_files(tmp_path / "set", {"3.png": 3})
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/z.png").symlink_to(tmp_path / "elsewhere/1.png")
    assert contents(open_images(str(tmp_path / "set"))) == [3, 1, 2, 1]
    (tmp_path / "set/broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set/loop.png").symlink_to(tmp_path / "set/loop.png")
    images = open_images(str(tmp_path / "set"))
    assert len(images) == 6
    for i, path in enumerate(["3.png", "broken.png", "linked/1.png", "linked/more/2.png", "loop.png", "z.png"]):
        assert images.sample_id(i) == str(tmp_path / "set" / path)
        if path in ("broken.png", "loop.png"):
            with pytest.raises(BadImageError, match=path):
                images.read(i)


def test_split_folders(tmp_path, caplog):
    files = {"train/cat/1.png": 1, "train/dog/2.png": 2, "val/dog/3.png": 3, "test/4.png": 4}
    write_files(tmp_path, files)
    source = str(tmp_path)
    assert splits_of(source) == ["test", "train", "validation"]
    train, validation, test = (open_images(source, split=split) for split in ("train", "val", "test"))
    assert [contents(images) for images in (train, validation, test)] == [[1, 2], [3], [4]]
    assert train.label_columns()["label"].values.tolist() == [0, 1]
    label = validation.label_columns()["label"]
    assert (label.names, label.values.tolist()) == (["cat", "dog"], [1])  # numbered as in train
    assert test.label_columns() == {}
    assert not caplog.records

    write_files(tmp_path, {"train/cat/7.png": 7, "train/8.png": 8})
    stray = open_images(source)
    assert contents(stray) == [8, 1, 7, 2] and stray.label_columns()["label"].values.tolist() == [-1, 0, 0, 1]
    (tmp_path / "train/8.png").unlink()
    (tmp_path / "train/cat/7.png").unlink()

    write_files(tmp_path, {"extra/5.png": 5, "6.png": 6})
    assert contents(open_images(source)) == [1, 2]
    assert "left out: extra, images at the top" in caplog.text


def test_missing_folders(tmp_path, monkeypatch):
    missing = str(tmp_path / "nowhere")
    for function in (open_images, splits_of):
        with pytest.raises(ValueError, match=f"there is no folder '{missing}'"):
            function(missing)
    monkeypatch.chdir(tmp_path)
    for source in ("./data", "../a/b", "data/imagenet/train", "my data"):
        with pytest.raises(ValueError, match=f"there is no folder '{tmp_path}"):
            open_images(source)


def test_hub_ids_are_looked_up_and_a_failure_names_both(tmp_path, monkeypatch):
    asked = []

    def offline(path, **options):
        asked.append(path)
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    monkeypatch.chdir(tmp_path)
    for source in ("someone/pictures", "cifar10"):
        message = (
            f"cannot open '{source}' on the Hub, and there is no folder '{tmp_path}/{source}' either: ConnectionError"
        )
        with pytest.raises(ValueError, match=message):
            open_images(source)
    assert asked == ["someone/pictures", "cifar10"]
    (tmp_path / "cifar10").mkdir()
    write_files(tmp_path / "cifar10", {"1.png": 1})
    assert contents(open_images("cifar10")) == [1]  # a folder of that name comes first
    assert len(asked) == 2


def test_unknown_split(tmp_path):
    write_files(tmp_path / "files", {"train/1.png": 1, "val/2.png": 2})
    write_parquet(tmp_path / "parquet/train.parquet")
    hf_dataset(0, 1).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="files' has no split 'test'; it has: train, validation"):
        open_images(str(tmp_path / "files"), split="test")
    for name in ("parquet", "saved"):
        with pytest.raises(ValueError, match=f"{name}' has no split 'test'; it has: train"):
            open_images(str(tmp_path / name), split="test")


def test_folders_and_files_without_images(tmp_path):
    (tmp_path / "empty/sub").mkdir(parents=True)
    (tmp_path / "empty/readme.txt").write_text("")
    with pytest.raises(ValueError, match=f"the folder '{tmp_path}/empty' holds no Parquet, Arrow, tar or image files"):
        open_images(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"readme\.txt' is a single file; wants a folder, or a \.parquet, "):
        open_images(str(tmp_path / "empty/readme.txt"))


def test_no_rows(tmp_path):
    write_parquet(tmp_path / "x.parquet", 0)
    with pytest.raises(ValueError, match="no rows"):
        open_images(str(tmp_path / "x.parquet"))
    datasets.Dataset.from_dict({"image": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no rows"):
        open_images(str(tmp_path / "saved"))


def test_damaged_parquet(tmp_path):
    write_parquet(tmp_path / "set/train-0.parquet")
    content = (tmp_path / "set/train-0.parquet").read_bytes()
    for damaged in (b"", content[:-10], b"PAR1 and so on"):
        (tmp_path / "set/train-1.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"set': ArrowInvalid: .*[Pp]arquet"):
            open_images(str(tmp_path / "set"))


@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_damaged_arrow(tmp_path, keep):
    hf_dataset(0, 3).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved/data-00000-of-00001.arrow"
    content = file.read_bytes()
    file.write_bytes(content[: keep if keep >= 1 else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"cannot read .*saved'"):
        open_images(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"cannot read the \.arrow files of .*saved'"):
        open_images(str(file))


def test_names_of_sets(tmp_path, monkeypatch):
    write_files(tmp_path / "pets", {"1.png": 1})
    monkeypatch.chdir(tmp_path / "pets")
    names = [open_images(source).name for source in (".", str(tmp_path / "pets"), str(tmp_path / "pets/"), "../pets")]
    assert names == ["pets:train"] * 4


def test_full_disk(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    write_parquet(tmp_path / "x.parquet")
    source, cache_dir = str(tmp_path / "x.parquet"), str(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
        assert copy_need(parts_of(source_builder(source, cache_dir), "train"), "train", cache_dir)[:2] == (
            os.path.getsize(source),
            100,
        )
        with pytest.raises(
            ValueError, match=f"needs about .* GB in the cache {cache_dir}, .* GB free; .*data.cache_dir"
        ):
            open_images(source, cache_dir=cache_dir)
        assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.arrow"))
    monkeypatch.setattr(copies, "TOLD_BYTES", 1)
    open_images(source, cache_dir=cache_dir)
    assert f"in the cache {cache_dir}, which has" in caplog.text and "copying" in caplog.text
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    assert len(open_images(source, cache_dir=cache_dir)) == 5  # nothing left to copy


def test_images_are_counted_without_a_copy(tmp_path):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, count in (("train", 7), ("validation", 3)):
        rows = {"image": [{"bytes": b"unread", "path": None}] * count}
        table = Dataset.from_dict(rows).cast_column("image", ImageFeature(decode=False))
        table.to_parquet(str(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"))
    cache = tmp_path / "cache"
    assert count_images(str(tmp_path / "set"), cache_dir=str(cache)) == 7
    assert count_images(str(tmp_path / "set"), split="val", cache_dir=str(cache)) == 3
    assert not list(cache.rglob("*.arrow"))
    with pytest.raises(ValueError, match="no split 'x'"):
        count_images(str(tmp_path / "set"), split="x", cache_dir=str(cache))


def test_local_files_are_opened_without_a_word_to_a_server(tmp_path, monkeypatch):
    """`datasets` would ask for a name that no machine without a network can look up, for seconds."""
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)  # as it is by itself
    asked = []
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append("session"))
    write_parquet(tmp_path / "set/train.parquet", 3, 0)
    for source in (tmp_path / "set", tmp_path / "set/train.parquet"):
        assert len(open_images(str(source), split="train", cache_dir=str(tmp_path / "cache"))) == 3
    assert not asked
