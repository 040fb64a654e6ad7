import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ijepa_scale.data.images import open_file, open_images
from ijepa_scale.data.sources.inspection import expand_braces
from ijepa_scale.data.sources.remote import Patience, StreamError
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.data.streams.opening import open_shards, shard_locations
from ijepa_scale.data.streams.samples import sample_images
from ijepa_scale.data.streams.shard_stream import Shards
from tests.data.server import HUB_COMMIT, serving
from tests.data.small_sources import WHOLE, number_of, save_to_disk, write_images, write_jsonl, write_parquet, write_tar

PATIENCE = Patience(0.1, 0.01)


def make(kind, root):
    """A source of images 0..19 and how many shards it has."""
    if kind == "parquet":
        write_parquet(root / "s/train-0.parquet", range(12), label=[i % 2 for i in range(12)])
        write_parquet(root / "s/train-1.parquet", range(12, 20), label=[i % 2 for i in range(12, 20)])
        return root / "s", 2
    if kind == "tars":
        for i in range(2):
            write_tar(root / f"s/train-{i}.tar", range(10 * i, 10 * i + 10), label=True)
        return root / "s", 2
    if kind == "saved":
        return save_to_disk(root / "s", range(20)), 3
    write_images(root / "s", range(20))
    if kind == "table":
        rows = [{"path": f"s/{i:04}.png", "label": i % 2} for i in range(20)]
        return write_jsonl(root / "list.jsonl", rows), 20
    return root / "s", 20


@pytest.mark.parametrize("kind", ["parquet", "tars", "saved", "images", "table"])
def test_every_kind_of_source_is_streamed_and_none_is_copied(tmp_path, cache, kind):
    source, count = make(kind, tmp_path)
    shards = open_shards(str(source), patience=PATIENCE)
    assert shards.name == f"{source.name}:train" and len(shards.locations) == count
    assert shards.num_images == (0 if kind == "tars" else 20)
    images, bad, _ = Streams(sources=(shards,), seed=0, shuffle_buffer=5).take(0, [WHOLE] * 20)
    assert sorted(number_of(image) for _, _, image in images) == list(range(20)) and not bad
    assert not list(cache.glob("*/**/*.arrow"))
    with pytest.raises(ValueError, match="has no split 'test'; it has: train"):
        open_shards(str(source), split="test", patience=PATIENCE)


def test_splits_of_what_is_streamed(tmp_path):
    for split, first in (("train", 0), ("val", 10)):
        write_tar(tmp_path / "t" / f"{split}-0.tar", range(first, first + 3))
        save_to_disk(tmp_path / "saved" / split, range(first, first + 3), shards=1)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "val"]}')
    assert sorted(shard_locations(str(tmp_path / "t"))) == ["train", "validation"]
    assert sorted(shard_locations(str(tmp_path / "saved"))) == ["train", "val"]
    assert shard_locations("https://host/{train,test}-{0..1}.tar") == {
        "train": ["https://host/train-0.tar", "https://host/train-1.tar"],
        "test": ["https://host/test-0.tar", "https://host/test-1.tar"],
    }


def test_braces():
    assert expand_braces("a") == ["a"]
    assert expand_braces("x-{008..011}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar", "x-011.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    for wrong in ("x-{5..3}.tar", "x-{}.tar", "{a}"):
        with pytest.raises(ValueError, match="braces hold a range"):
            expand_braces(wrong)


def test_braces_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shard_locations("~/x-{0..1}.tar") == {"train": [str(tmp_path / f"x-{i}.tar") for i in range(2)]}


def test_a_gap_in_a_list_of_local_shards_is_found_at_once(tmp_path):
    """Far beyond the few shards that are sampled; of URLs only those are looked at."""
    for i in (*range(33), *range(35, 40)):
        write_tar(tmp_path / f"x-{i:02}.tar", range(1))
    with pytest.raises(ValueError, match=r"x-33\.tar is missing, one of 2 missing among the 40 files of '.*x-\{00"):
        open_shards(str(tmp_path / "x-{00..39}.tar"), patience=PATIENCE)
    assert len(open_shards(str(tmp_path), patience=PATIENCE).locations) == 38
    with serving(tmp_path) as server:
        shards = open_shards(f"{server.url}/x-{{00..39}}.tar", patience=PATIENCE)
        assert server.requests == []
        with pytest.raises(ValueError, match=r"x-33\.tar cannot be read: .* 404.*; check the URL, or take it out of"):
            sample_images(replace(shards, locations=shards.locations[33:]), tmp_path / "x", count=9, patience=PATIENCE)


def test_what_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match=r"notes\.zip is no \.parquet, \.arrow, \.tar or image file; give such files"):
        open_shards("https://host/notes.zip", patience=PATIENCE)
    with pytest.raises(
        ValueError, match=r"streamed only: for training set data\.streaming=true; for anything else give a f"
    ):
        open_images("https://host/x.tar")


@pytest.mark.parametrize("kind", ["parquet", "tars", "links"])
def test_a_few_images_are_kept_in_a_file_with_their_labels(tmp_path, kind):
    with serving(tmp_path) as server:
        if kind == "links":
            make("images", tmp_path)
            rows = [{"path": f"{server.url}/s/{i:04}.png"} for i in range(20)]
            source = write_jsonl(tmp_path / "links.jsonl", rows)
        else:
            source, _ = make(kind, tmp_path)
        shards = open_shards(str(source), patience=PATIENCE)
        path = sample_images(shards, tmp_path / "out/train-1.arrow", count=6, patience=PATIENCE)
        images = open_file(str(path), name=shards.name)
    numbers = [number_of(images.read(i)) for i in range(len(images))]
    assert images.name == shards.name and images.split == "train"
    if kind == "links":
        assert numbers == [0, 3, 6, 9, 12, 15] and images.label_columns() == {}
    else:
        assert numbers == {"parquet": [0, 1, 2, 12, 13, 14], "tars": [0, 1, 2, 10, 11, 12]}[kind]
        labels = images.label_columns()["label"].values.tolist()
        assert labels == [n % (2 if kind == "parquet" else 3) for n in numbers]
    changed = path.stat().st_mtime_ns
    assert sample_images(shards, path, count=6, patience=PATIENCE).stat().st_mtime_ns == changed
    assert [file.name for file in path.parent.iterdir()] == ["train-1.arrow"]


def test_dead_links_among_those_that_are_kept(tmp_path):
    make("images", tmp_path)
    with serving(tmp_path) as server:
        links = [f"{server.url}/{name}.png" for name in ("gone", "s/0003", "gone-too", "s/0005")]
        links[2] = "http://127.0.0.1:9/x.png"
        shards = open_shards(str(write_jsonl(tmp_path / "x.jsonl", [{"path": x} for x in links])), patience=PATIENCE)
        images = open_file(str(sample_images(shards, tmp_path / "x.arrow", count=4, patience=PATIENCE)), name="x:train")
        assert [number_of(images.read(i)) for i in range(len(images))] == [3, 5]
        server.faults = [404] * 9
        with pytest.raises(ValueError, match="hold no images"):
            sample_images(shards, tmp_path / "y.arrow", count=4, patience=PATIENCE)


def test_no_secret_is_kept_with_images_of_links(tmp_path):
    make("images", tmp_path)
    with serving(tmp_path) as server:
        host = server.url.replace("http://", "http://me:p4ss@w0rd@")
        links = [f"{host}/s/0003.png?id={i}&signature=s1gn" for i in range(8)]
        shards = open_shards(str(write_jsonl(tmp_path / "x.jsonl", [{"path": x} for x in links])), patience=PATIENCE)
        path = sample_images(shards, tmp_path / "x.arrow", count=4, patience=PATIENCE)
    assert not [secret for secret in (b"p4ss", b"w0rd", b"s1gn") if secret in path.read_bytes()]
    images = open_file(str(path), name="x:train")
    shown = server.url.replace("http://", "http://[hidden]@")
    assert [images.sample_id(i) for i in range(4)] == [f"{shown}/s/0003.png?[hidden]#{2 * i}" for i in range(4)]


def test_what_was_saved_before_in_the_same_folder_is_not_read(tmp_path):
    def saved(*splits):
        parts = {split: datasets.load_from_disk(save_to_disk(tmp_path / split, range(6))) for split in splits}
        return datasets.DatasetDict(parts)

    for where, shards in (("one", 3), ("one", 2)):
        save_to_disk(tmp_path / where, range(6), shards=shards)
    assert len(list((tmp_path / "one").glob("*.arrow"))) == 5
    assert [Path(file).name for file in shard_locations(str(tmp_path / "one"))["train"]] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    saved("train", "test").save_to_disk(tmp_path / "several")
    saved("train").save_to_disk(tmp_path / "several")
    assert list(shard_locations(str(tmp_path / "several"))) == ["train"]


def damage(path, where):
    """512 bytes that mean nothing from a part of the file on, and nothing after them."""
    content = bytearray(path.read_bytes())
    start = int(len(content) * where) // 512 * 512
    content[start : start + 512] = b"\xff" * 512
    path.write_bytes(content[: start + 512])


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_damage_costs_no_more_of_the_images_that_are_kept_than_in_training(tmp_path, kind):
    """A shard damaged in its middle or from its start, among whole ones; and a source of which nothing is left."""
    source, _ = make(kind, tmp_path)
    shards = open_shards(str(source), patience=PATIENCE)
    first, last = (Path(location) for location in shards.locations)

    def kept(name):
        images = open_file(str(sample_images(shards, tmp_path / name, count=20, patience=PATIENCE)), name="s:train")
        return [number_of(images.read(i)) for i in range(len(images))]

    whole = kept("whole.arrow")
    damage(last, 0.6)
    some = kept("some.arrow")
    assert some == whole[: len(some)] and len(some) >= 10
    assert kind == "parquet" or 10 < len(some) < 20
    damage(last, 0)
    assert kept("none.arrow") == [n for n in whole if n < (12 if kind == "parquet" else 10)]
    damage(first, 0)
    with pytest.raises(ValueError, match=rf"s:train: {first} cannot be read \(.*\); get it anew, or take it out"):
        kept("nothing.arrow")
    if kind == "parquet":
        for name in (first.name, last.name):
            with pytest.raises(ValueError, match=rf"{name} cannot be read \(ArrowInvalid: .*\); get it anew"):
                open_shards(str(source), patience=PATIENCE)
            write_parquet(first, range(2))


# The Hub's address is read at import, which takes seconds: each code runs in a fork of a process that has done so.
FORKS = """
import json, os, sys
import ijepa_scale.data.images, ijepa_scale.data.streams.opening, tests.data.small_sources
for line in sys.stdin:
    if not os.fork():
        exec(json.loads(line), {})
        sys.stdout.flush()
        os._exit(0)
    print("ended", os.wait()[1], flush=True)
"""


@pytest.fixture(scope="module")
def hub_and_forks(tmp_path_factory):
    """A server, and what a code prints for which it is the Hub: each in a process and a home folder of its own."""
    root = tmp_path_factory.mktemp("hub")
    with serving(root) as server:
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(root / "home"),
            "HF_TOKEN": "hf_mine",
            "PYTHONPATH": ":".join(sys.path),
            "PATH": "",
        }
        command = [sys.executable, "-c", FORKS]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, cwd=root, **pipes) as forks:

            def lines_of(code):
                shutil.rmtree(root / "home", ignore_errors=True)
                print(json.dumps(code), file=forks.stdin, flush=True)
                lines = []
                while not (line := forks.stdout.readline()).startswith("ended "):
                    assert line, "the process has ended: stderr says why"
                    lines.append(line.rstrip("\n"))
                assert line == "ended 0\n"
                return lines

            yield server, lines_of


@pytest.fixture
def hub(hub_and_forks, tmp_path):
    """The same with no files and no faults; its files go to tmp_path."""
    server, lines_of = hub_and_forks
    server.folder, server.faults, server.headers, server.requests = tmp_path, [], {}, []
    return server, lines_of


READ = """
from ijepa_scale.data.images import open_images
from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.streams.opening import open_shards
from ijepa_scale.data.streams.dealing import Streams
from tests.data.small_sources import WHOLE, number_of
shards = open_shards("me/data", patience=Patience(0))
streams = Streams(sources=[shards], seed=0, shuffle_buffer=1, patience=Patience(0))
print(len(shards.locations), *sorted(number_of(image) for _, _, image in streams.take(0, [WHOLE] * 8)[0]))
print("then")
images = open_images("me/data", split="val")
print(*(number_of(images.read(i)) for i in range(len(images))))
"""


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_data_set_of_the_hub(hub, tmp_path, kind):
    """Streamed where it is with this user's token, and copied to the cache to be read by index."""
    write = write_parquet if kind == "parquet" else write_tar
    for name, numbers in (("train-0", range(5)), ("train-1", range(5, 8)), ("validation-0", range(8, 11))):
        write(tmp_path / "data" / f"{name}.{kind}", numbers)
    server, lines_of = hub
    server.headers = {"X-Error-Code": "EntryNotFound"}
    assert lines_of(READ) == ["2 0 1 2 3 4 5 6 7", "then", "8 9 10"]
    files = [(path, token) for path, wanted, token in server.requests if "/resolve/" in path and kind in path]
    assert {token for _, token in files} == {"Bearer hf_mine"}
    assert {path.partition(HUB_COMMIT)[2][:13] for path, _ in files} == {
        "/data/train-0",
        "/data/train-1",
        "/data/validat",
    }


OPEN = """
from ijepa_scale.data.images import open_images
from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.streams.opening import open_shards
for call in (lambda: open_images("me/data"), lambda: open_shards("me/data", patience=Patience(0))):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("status, code", [(403, "GatedRepo"), (401, "GatedRepo"), (401, "RepoNotFound")])
def test_a_hub_that_refuses_is_explained(hub, status, code):
    server, lines_of = hub
    server.faults, server.headers = [status] * 100, {"X-Error-Code": code}
    lines = lines_of(OPEN)
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("cannot open 'me/data' on the Hub, and there is no folder")
        assert "terms at https://huggingface.co/datasets/me/data" in line
        assert "`hf auth login`" in line and "HF_TOKEN" in line


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_shard_of_another_data_set_is_named_at_once(tmp_path, ending):
    write_parquet(tmp_path / "s/train-0.parquet", range(3))
    other = pa.table({"photo": pq.read_table(tmp_path / "s/train-0.parquet")["image"], "id": [1, 2, 3]})
    pq.write_table(other, tmp_path / "s/train-1.parquet")
    if ending == "arrow":
        for file in list((tmp_path / "s").iterdir()):
            with pa.ipc.new_stream(file.with_suffix(".arrow"), (table := pq.read_table(file)).schema) as writer:
                writer.write_table(table)
            file.unlink()
    words = rf"train-1\.{ending} has no column 'image', as other files of the source have; it has: photo, id\. Give"
    with pytest.raises(ValueError, match=words):
        open_shards(str(tmp_path / "s"), patience=PATIENCE)
    shards = Shards(
        "s:train", sorted(map(str, (tmp_path / "s").iterdir())), "image"
    )  # as remote ones are not looked at
    with pytest.raises(StreamError, match=words):
        Streams(sources=(shards,), seed=0, shuffle_buffer=5).take(0, [WHOLE] * 20)


def test_labels_that_some_shards_alone_have(tmp_path):
    write_parquet(tmp_path / "s/train-0.parquet", range(3), label=[0, 1, 0])
    write_parquet(tmp_path / "s/train-1.parquet", range(3, 6))
    shards = open_shards(str(tmp_path / "s"), patience=PATIENCE)
    path = sample_images(shards, tmp_path / "train-1.arrow", count=6, patience=PATIENCE)
    images = open_file(str(path), name=shards.name)
    assert images.label_columns()["label"].values.tolist() == [0, 1, 0, -1, -1, -1]
