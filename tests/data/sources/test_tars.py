import io
import random
import tarfile
from pathlib import Path

import pytest

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import open_file, open_images
from ijepa_scale.data.sources import tars
from ijepa_scale.data.sources.folders import say_once
from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.sources.tars import read_member, tar_index
from ijepa_scale.data.streams.opening import open_shards
from ijepa_scale.data.streams.reading import read_shard
from ijepa_scale.data.streams.samples import sample_images
from tests.data.small_sources import encoded, number_of, write_tar


def test_a_folder_of_tars(tmp_path, cache):
    write_tar(tmp_path / "set/train-0.tar", range(5), label=True)
    write_tar(tmp_path / "set/train-1.tar", range(5, 8), label=True)
    write_tar(tmp_path / "set/val/0.tar", range(20, 23))
    images = open_images(str(tmp_path / "set"))
    assert (images.name, len(images)) == ("set:train", 8)
    assert [number_of(images.read(i)) for i in range(8)] == list(range(8))
    assert images.sample_id(4) == "0004.png" and images.sample_id(5).endswith("long/0005.png")
    assert images.label_columns()["label"].values.tolist() == [i % 3 for i in range(8)]
    val = open_images(str(tmp_path / "set"), split="validation")
    assert [number_of(val.read(i)) for i in range(3)] == [20, 21, 22]
    assert val.label_columns() == {}
    one = open_images(str(tmp_path / "set/train-1.tar"))
    assert [number_of(one.read(i)) for i in range(3)] == [5, 6, 7]


def test_the_index_is_made_once_and_anew_for_a_changed_tar(tmp_path, cache):
    write_tar(tmp_path / "x.tar", range(3))
    index = tar_index([str(tmp_path / "x.tar")], cache)
    made = index.stat().st_mtime_ns
    assert tar_index([str(tmp_path / "x.tar")], cache) == index and index.stat().st_mtime_ns == made
    write_tar(tmp_path / "x.tar", range(10, 14))
    images = open_images(str(tmp_path / "x.tar"))
    assert [number_of(images.read(i)) for i in range(4)] == [10, 11, 12, 13]
    assert len(list(index.parent.glob("*.arrow"))) == 2


def test_what_was_indexed_before_a_stop_is_kept(tmp_path, cache, monkeypatch):
    """Rows and notes are those of an index that is made at once; a piece is two tars."""
    monkeypatch.setattr(tars, "_PIECE", 4)
    paths = [str(tmp_path / f"{i}.tar") for i in range(5)]
    for i, path in enumerate(paths):
        write_tar(Path(path), range(3 * i, 3 * i + 3))
    whole = tar_index(paths, tmp_path / "whole")
    index_rows, read = tars._index_rows, []

    def until_stopped(path, *arguments):
        read.append(path)
        if len(read) in (4, 6):
            raise KeyboardInterrupt
        return index_rows(path, *arguments)

    monkeypatch.setattr(tars, "_index_rows", until_stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tar_index(paths, cache)
    index = tar_index(paths, cache)
    assert [paths.index(path) for path in read] == [0, 1, 2, 3, 2, 3, 2, 3, 4]
    assert index.read_bytes() == whole.read_bytes()
    assert index.with_suffix(".json").read_text() == whole.with_suffix(".json").read_text()
    assert not list(index.parent.glob("*.pieces"))


def test_many_rows_and_tars_without_images(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("ijepa_scale.data.sources.tars._PIECE", 2)
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", range(3 * i, 3 * i + 3))
    with tarfile.open(tmp_path / "4.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"), io.BytesIO())
    images = open_images(str(tmp_path))
    assert [number_of(images.read(i)) for i in range(len(images))] == list(range(12))
    with pytest.raises(ValueError, match="no rows"):
        open_images(str(tmp_path / "4.tar"))


def test_what_cannot_be_indexed(tmp_path):
    write_tar(tmp_path / "z/x.tar.gz", range(3), "w:gz")
    with pytest.raises(
        ValueError, match=r"x\.tar\.gz is compressed.* unpack it.* for training, set data.streaming=true"
    ):
        open_images(str(tmp_path / "z"))
    path = write_tar(tmp_path / "d/x.tar", range(3))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"x\.tar is damaged \(.*\); get it anew"):
        open_images(str(tmp_path / "d"))
    assert not list((tmp_path / "d").glob(".*"))


def test_a_tar_that_shrinks_gives_bad_images(tmp_path):
    path = write_tar(tmp_path / "x.tar", range(3))
    images = open_images(str(path))
    content = path.read_bytes()
    path.write_bytes(content[:2500])
    assert number_of(images.read(0)) == 0
    with pytest.raises(BadImageError, match="has changed since it was indexed"):
        images.read(2)
    path.write_bytes(content)
    assert read_member(str(path), content.index(encoded(2)), len(encoded(2))) == encoded(2)


def test_names_need_not_be_utf_8(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo(b"caf\xe9.png".decode("utf-8", "surrogateescape"))
        member.size = len(encoded(3))
        tar.addfile(member, io.BytesIO(encoded(3)))
    images = open_images(str(tmp_path / "x.tar"))
    assert number_of(images.read(0)) == 3 and images.sample_id(0).startswith("caf") and images.sample_id(0).isascii()


PATIENCE = Patience(0.1, 0.01)


def write_members(path, members, mode="w"):
    """members: (name, content), or (name, tarfile's type of link, name of the target)."""
    with tarfile.open(path, mode) as tar:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = content, target[0]
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def every_way(path, column=""):
    """[(name, number of the image, label)] by index, as a stream, and in the sample that probes get, which agree."""
    images = open_images(str(path), column=column)
    labels = images.label_columns()
    labels = labels["label"].values.tolist() if labels else [-1] * len(images)
    indexed = [(images.sample_id(i), number_of(images.read(i)), labels[i]) for i in range(len(images))]
    shards = open_shards(str(path), column=column, patience=PATIENCE)
    rows = list(read_shard(shards.locations[0], column=shards.column, patience=PATIENCE))
    assert [(row.index, row.path, row.content) for _, row in rows] == [
        (i, name, images.content(i)) for i, (name, _, _) in enumerate(indexed)
    ]
    for i, (mark, _) in enumerate(rows):
        again = read_shard(shards.locations[0], column=shards.column, start=mark, patience=PATIENCE)
        assert list(again) == rows[i + 1 :]
    file = path.with_suffix(f".{column}arrow")
    kept = open_file(str(sample_images(shards, file, count=len(images), patience=PATIENCE)), name="x:train")
    found = kept.label_columns()
    assert [kept.sample_id(i) for i in range(len(kept))] == [name for name, _, _ in indexed]
    assert (found["label"].values.tolist() if found else [-1] * len(kept)) == labels
    return indexed


STEMS = {
    "plain": "{:04}",
    "folders": "a.b/c d/{:04}",
    "dates": "IMG_2024.05.{:02}",
    "frames": "left.frame_{:06}",
    "numbers": "1.2.840.{}",
    "time": "Screen Shot 2021-03-04 at 5.14.{:02} PM",
    "copies": "IMG.2024 ({})",
    "tiles": "tile.x{}y7",
    "hashes": "photo.{:08x}af",
    "numbers at the end": "scene.{}.1",
}


@pytest.mark.parametrize("stem", STEMS)
def test_a_sample_is_what_its_names_say(tmp_path, stem):
    """Files of a sample in any order, some missing; names with dots; the photograph among what is made of it."""
    rng = random.Random(stem)
    members, expected = [], []
    for i in range(25):
        name = STEMS[stem].format(i)
        files = {"jpg": encoded(i), "seg.png": encoded(900), "mask_01.png": encoded(901), "left.png": encoded(902)}
        files |= {"cls": str(i % 7).encode(), "json": b"{}", "depth.map.txt": b""}
        kept = ["jpg", *rng.sample(list(files)[1:], rng.randrange(len(files)))]
        rng.shuffle(kept)
        members += [(f"{name}.{ending}", files[ending]) for ending in kept]
        members.insert(len(members) - rng.randrange(2), (rng.choice([".hidden.jpg", "d/README"]), b""))  # of no sample
        expected.append((f"{name}.jpg", i, i % 7 if "cls" in kept else -1))
    assert every_way(write_members(tmp_path / "x.tar", members)) == expected


def test_the_image_of_a_sample(tmp_path):
    """By the endings in it, whatever their order, and by the ending that is asked for."""
    for number, (endings, taken) in enumerate(
        [
            (["seg.png", "jpg"], "jpg"),
            (["depth.png", "normals.png", "rgb.png"], "rgb.png"),
            (["conditioning_image.png", "image.png", "left.png"], "image.png"),
            (["mask.png", "left.png", "right.png"], "left.png"),
            (["image.png", "jpg"], "jpg"),
            (["mask.png", "depth.png"], "mask.png"),
        ]
    ):
        path = tmp_path / f"{number}.tar"
        order = {ending: i for i, ending in enumerate(endings)}
        write_members(path, [(f"{k}.{ending}", encoded(order[ending])) for k in range(3) for ending in endings])
        assert [n for _, n, _ in every_way(path)] == [order[taken]] * 3
        for ending in endings:
            assert [n for _, n, _ in every_way(path, ending)] == [order[ending]] * 3
            assert len(open_images(str(path), column=f".{ending.upper()}")) == 3
        for open_it in (open_images, lambda *_, **options: open_shards(*_, patience=PATIENCE, **options)):
            with pytest.raises(ValueError, match=rf"{number}\.tar has the ending 'x\.png' .*{sorted(endings)[0]}, "):
                open_it(str(path), column="x.png")


def test_a_label_before_numbered_images_is_the_first_one_s(tmp_path):
    members = [(f"{k}.{ending}", content) for k in range(3) for ending, content in
               (("cls", b"5"), ("0.jpg", encoded(k)), ("1.jpg", encoded(9)))]  # fmt: skip
    assert [row[1:] for row in every_way(write_members(tmp_path / "x.tar", members))] == [
        row for k in range(3) for row in ((k, 5), (9, -1))
    ]


def test_a_mark_of_an_older_checkpoint_is_at_the_image_that_was_read(tmp_path):
    path = write_members(
        tmp_path / "x.tar", [(f"{k}.{e}", encoded(k)) for k in range(9) for e in ("cls", "depth.png", "jpg", "seg.png")]
    )
    rows = list(read_shard(str(path), column="", patience=PATIENCE))
    with tarfile.open(path) as tar:
        offsets = {member.name: member.offset for member in tar}
    for k in range(9):
        for ending in ("depth.png", "jpg"):
            start = (k + 1, offsets[f"{k}.{ending}"])
            assert list(read_shard(str(path), column="", start=start, patience=PATIENCE)) == rows[k + 1 :]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_read_where_they_lead(tmp_path, kind, caplog):
    """In a local tar; what cannot be gone back to in a stream is left out and said, as are links to elsewhere."""
    target = "d/0.png" if kind == tarfile.LNKTYPE else "0.png"
    members = [("./d/0.png", encoded(3)), ("d/1.png", kind, target), ("d/2.png", encoded(4)), ("d/2.cls", b"6")]
    members += [("d/3.png", kind, target), ("d/3.cls", b"1"), ("d/4.png", kind, "../../etc/x.png"), ("d/5.png", b"")]
    members[-1] = ("d/5.png", kind, "d/1.png" if kind == tarfile.LNKTYPE else "1.png")
    path = write_members(tmp_path / "x.tar", members)
    rows = [("./d/0.png", 3, -1), ("d/1.png", 3, -1), ("d/2.png", 4, 6), ("d/3.png", 3, 1), ("d/5.png", 3, -1)]
    assert every_way(path) == rows
    assert "links to files that are not in the tar" in caplog.text and ": 1, the first d/4.png" in caplog.text
    caplog.clear()
    path = write_members(tmp_path / "x.tgz", members, "w:gz")
    shards = open_shards(str(path), patience=PATIENCE)
    assert [row.path for _, row in read_shard(str(path), column="", patience=PATIENCE)] == ["./d/0.png", "d/2.png"]
    assert ": 4, the first d/1.png" in caplog.text and shards.column == ""


def test_what_is_left_out_is_said_each_time(tmp_path, caplog):
    few = [(f"{i}.{ending}", encoded(i)) for i in range(5) for ending in ("jpg", "seg.png")]
    few += [("README", b""), ("notes.txt", b""), ("more.txt", b"")]
    most = [(f"holiday.{name}.jpg", encoded(0)) for name in ("paris", "rome", "oslo", "bonn")]
    for name, members, expected in (
        ("few.tar", few, "left out: 5 further images of samples (5 seg.png; read: 5 jpg): files whose"),
        ("most.tar", most, "left out: most images, 3 further images of samples (1 rome.jpg, 1 oslo.jpg, 1 bonn.jpg;"),
        ("none.tar", [(f"{i}.jpg", encoded(i)) for i in range(5)], ""),
    ):
        path = str(write_members(tmp_path / name, members))
        for open_it in (open_images, open_images, lambda path: open_shards(path, patience=PATIENCE)):
            caplog.clear()
            say_once.cache_clear()
            open_it(path)
            assert expected in caplog.text and bool(caplog.records) == bool(expected)
            others = ["samples without such an image: 2, the first notes", "names have no ending: 1, the first README"]
            assert all((text in caplog.text) == (name == "few.tar") for text in others)
        if name != "none.tar":
            caplog.clear()
            open_images(path, column="jpg" if name == "few.tar" else "rome.jpg")
            assert "further images" not in caplog.text
