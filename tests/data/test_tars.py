import io
import tarfile

import pytest

from ijepa_scale.data.images import BadImageError, open_images
from ijepa_scale.data.tars import read_member, tar_index
from tests.data.sources import encoded, number_of, write_tar


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


def test_many_rows_and_tars_without_images(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("ijepa_scale.data.tars._PIECE", 2)
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
