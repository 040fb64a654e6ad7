import os
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ijepa_scale.data.files import make_cache
from ijepa_scale.data.images import open_images
from ijepa_scale.data.sources.folders import FolderSplit, image_splits, list_files, printable, shard_splits
from tests.data.small_sources import write_images, write_parquet


def write_tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def splits(*files):
    """What the tree of image files tells: split -> (its files, the class of each, if they have any)."""
    return {
        name: (
            split.files,
            [split.classes[i] if i is not None else "" for i in split.labels()] if split.classes else None,
        )
        for name, split in image_splits("/set", sorted(files)).items()
    }


ENDS = ["png", "JPEG", "webp", "parquet", "arrow", "tar", "tgz", "tar.gz", "gz", "txt"]
KINDS = {"images": ENDS[:3], "parquet": ENDS[3:4], "arrow": ENDS[4:5], "tar": ENDS[5:8]}


def test_files_are_listed_by_kind_and_in_order(tmp_path):
    names = [f"{i % 7}/{i}.{end}" for i, end in enumerate(ENDS * 10)]
    for root in ("one", "two"):  # in two orders of creation
        write_tree(tmp_path / root, *(names if root == "one" else np.random.default_rng(0).permutation(names)))
    listed = list_files(str(tmp_path / "one"))
    assert listed == list_files(str(tmp_path / "two"))
    for kind, ends in KINDS.items():
        wanted = sorted(name for name in names if name.endswith(tuple(f".{end}" for end in ends)))
        assert listed.kinds.pop(kind) == wanted
        names = [name for name in names if name not in wanted]
    assert (listed.kinds, listed.others, listed.system) == ({}, sorted(names), [])


def test_what_is_no_data_is_not_listed(tmp_path):
    write_tree(tmp_path, ".hidden.png", ".git/x.png", "a/.cache/x.parquet", "__MACOSX/x.png", "png", "x.png.txt")
    write_tree(tmp_path, "cache-12ab.arrow", "a/cache-12ab.arrow", "cache-1.png")
    system = ["#recycle", "$RECYCLE.BIN", "System Volume Information", "a/@eaDir"]
    write_tree(tmp_path, ".Trash/1.png", "a/Thumbs.db", *(f"{folder}/x.png/thumb.jpg" for folder in system))
    listed = list_files(str(tmp_path))
    assert listed.kinds == {"parquet": [], "arrow": [], "tar": [], "images": ["cache-1.png"]}
    assert listed.system == [*system[:3], "__MACOSX", "a/@eaDir"]
    assert listed.others == ["a/Thumbs.db", "png", "x.png.txt"]


def test_runs_and_caches_below_a_source_are_no_data(tmp_path):
    write_tree(tmp_path, "1.png", "runs/a/metrics.jsonl", "runs/a/config.yaml", "runs/a/masks.png", "runs/a/p/x.png")
    write_tree(tmp_path, "photos/config.yaml", "photos/2.png")
    make_cache(tmp_path / "cache" / "tar-index")
    write_tree(tmp_path, "cache/tar-index/x.arrow")
    listed = list_files(str(tmp_path))
    assert listed.kinds["images"] == ["1.png", "photos/2.png"] and not listed.kinds["arrow"]
    assert listed.system == ["cache/tar-index", "runs/a"]
    assert list_files(str(tmp_path / "cache" / "tar-index")).kinds["arrow"] == ["x.arrow"]  # where it is the source


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_tree(tmp_path, "elsewhere/1.png", "elsewhere/more/2.png", "set/3.png")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/twice").symlink_to(tmp_path / "elsewhere/more")  # no circle: listed at both places
    (tmp_path / "set/z.png").symlink_to(tmp_path / "elsewhere/1.png")
    (tmp_path / "set/broken.png").symlink_to(tmp_path / "nowhere")  # listed, so that reading it tells
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set")
    (tmp_path / "set/self").symlink_to(tmp_path / "set")
    expected = ["3.png", "broken.png", "linked/1.png", "linked/more/2.png", "twice/2.png", "z.png"]
    assert list_files(str(tmp_path / "set")).kinds["images"] == expected


def test_images_without_an_ending_are_known_by_their_content(tmp_path):
    formats = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]
    for name in formats:
        Image.new("RGB", (4, 4)).save(tmp_path / name.lower(), name)
    (tmp_path / "LICENSE").write_text("P3, BM and others")
    (tmp_path / "half").write_bytes((tmp_path / "png").read_bytes()[:12])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    listed = list_files(str(tmp_path))
    assert listed.kinds["images"] == sorted(map(str.lower, formats))
    assert listed.others == ["LICENSE", "half", "link"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without permission for a while")
def test_a_folder_without_permission_is_left_out_and_named(monkeypatch, caplog):
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's are closed to others
        root = Path(name)
        sources = [write_images(root / "images", range(3)), write_parquet(root / "parquet/x.parquet", range(4)).parent]
        for source in sources:
            open_images(str(source))  # what is imported by this need not be readable below
            write_images(source / "lost+found", range(5)).chmod(0o000)
        (root / "cache").mkdir()
        for folder in (root, root / "cache"):
            folder.chmod(0o777)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        os.seteuid(65534)
        try:
            assert [len(open_images(str(source))) for source in sources] == [3, 4]
            with pytest.raises(ValueError, match=r"no permission to read '.*images/lost"):
                open_images(str(sources[0] / "lost+found"))
        finally:
            os.seteuid(0)
    for source in sources:
        assert caplog.text.count(f"{source}/lost+found: no permission to read this folder, so what lies in it") == 1


def test_class_folders_are_labels():
    assert splits("cat/1.png", "dog/2.png", "ant/3.png", "cat/4.png") == {
        "train": (["ant/3.png", "cat/1.png", "cat/4.png", "dog/2.png"], ["ant", "cat", "cat", "dog"])
    }
    assert image_splits("/set", ["b/1.png", "a/2.png"]) == {"train": FolderSplit(["b/1.png", "a/2.png"], ["a", "b"])}


@pytest.mark.parametrize(
    "files",
    [
        ["1.png", "2.png"],
        ["images/1.png", "images/2.png"],  # one folder tells nothing
        ["cat/1.png", "dog/2.png", "loose-1.png", "loose-2.png"],
        ["cat/1.png", "dog/deeper/2.png"],
        ["a/cat/1.png", "b/dog/2.png", "b/3.png"],
        ["cats/small/1.png", "cats/2.png"],
        ["val.png", "images/1.png"],
    ],
)
def test_other_trees_have_no_labels(files):
    assert splits(*files) == {"train": (sorted(files), None)}


@pytest.mark.parametrize("above", ["", "images/", "ILSVRC/Data/", "train/", "a/training/"])
@pytest.mark.parametrize("stray", ["", "readme.png", "{above}cover.png"])
def test_stray_images_above_class_folders_have_no_label(above, stray, caplog):
    stray = stray.format(above=above)
    classes = [f"{above}{name}/{i}.png" for i in range(3) for name in ("cat", "dog")]
    files = sorted({*classes, stray} - {""})
    assert splits(*files) == {"train": (files, ["" if f == stray else f.split("/")[-2] for f in files])}
    assert caplog.text.count(f"1 of the images, such as {stray}, lie outside of the folders") == bool(stray)


def test_folders_that_hold_all_images_tell_nothing(caplog):
    """As ImageNet unpacks: ILSVRC/Data/CLS-LOC/{train,val,test}."""
    within = "ILSVRC/Data/CLS-LOC"
    files = [
        f"{within}/train/n01/1.JPEG",
        f"{within}/train/n02/2.JPEG",
        f"{within}/val/3.JPEG",
        f"{within}/test/4.JPEG",
    ]
    assert splits(*files) == {
        "train": (files[:2], ["n01", "n02"]),
        "validation": ([files[2]], None),
        "test": ([files[3]], None),
    }
    assert splits("a/cat/1.png", "a/dog/2.png") == {"train": (["a/cat/1.png", "a/dog/2.png"], ["cat", "dog"])}
    assert splits("a/val/cat/1.png", "a/val/dog/2.png") == {  # but the name of a split does
        "validation": (["a/val/cat/1.png", "a/val/dog/2.png"], ["cat", "dog"])
    }
    assert splits("val/1.png") == {"validation": (["val/1.png"], None)}
    assert not caplog.records


def test_splits_too_deep_to_be_taken_are_told(caplog):
    files = ["images/train/1.png", "images/val/2.png", "masks/train/1.png", "masks/val/2.png"]
    for _ in range(2):
        assert splits(*files) == {"train": (files, None)}
    assert caplog.text.count("in folders named train, val, which lie too deep") == 1


def test_split_folders_number_classes_alike(caplog):
    files = ["Training/cat/1.png", "Training/dog/2.png", "val/dog/3.png", "test/4.png"]
    found = image_splits("/set", files)
    assert list(found) == ["test", "train", "validation"]
    assert found["train"] == FolderSplit(files[:2], ["cat", "dog"])
    assert (found["validation"].classes, found["validation"].labels()) == (["cat", "dog"], [1])
    assert found["test"] == FolderSplit(["test/4.png"], [])
    assert not caplog.records


def test_what_is_in_no_split_is_left_out_and_told(caplog):
    odd = os.fsdecode(b"caf\xe9")  # a name that is not UTF-8
    assert splits("train/1.png", "val/2.png", "extra/3.png", "4.png", f"{odd}/5.png") == {
        "train": (["train/1.png"], None),
        "validation": (["val/2.png"], None),
    }
    assert r"/set: in no split, so left out: caf\udce9, extra, images at the top" in caplog.text


def test_folders_of_one_name_for_a_split_are_classes_unless_all_are():
    assert splits("train/1.png", "boat/2.png") == {"train": (["boat/2.png", "train/1.png"], ["boat", "train"])}
    assert splits("val/1.png", "valid/2.png") == {"validation": (["val/1.png", "valid/2.png"], None)}
    assert splits("train.png", "val.png") == {"train": (["train.png", "val.png"], None)}  # files, not folders


def test_arrow_files_tell_their_split_by_name_or_folder():
    files = ["data-00000-of-00001.arrow", "set-train-00000-of-00002.arrow", "val/a.arrow", "x_TEST.arrow"]
    assert shard_splits(files) == {
        "train": ["data-00000-of-00001.arrow", "set-train-00000-of-00002.arrow"],
        "validation": ["val/a.arrow"],
        "test": ["x_TEST.arrow"],
    }
    assert shard_splits(["contest.arrow"]) == {"train": ["contest.arrow"]}


def test_printable_names_can_be_encoded():
    assert printable("é/猫.png") == "é/猫.png"
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\udce9.png"
