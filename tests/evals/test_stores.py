"""An extraction that was stopped goes on: to the same bits, with nothing done twice, and with no other one's rows."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.evals import stores
from ijepa_scale.evals.extract import extract
from ijepa_scale.evals.stores import JOURNAL, forget_half, read_journal
from tests.evals.test_extract import Patches, Pictures, on_ranks

FACTS = {"encoder": "x", "size": (8, 8)}
OPTIONS = {"image_size": 8, "batch_size": 3, "patches": True}


class Read(Pictures):
    """Remembers which images were read."""

    def __init__(self, *of, **options):
        super().__init__(*of, **options)
        self.indices = []

    def read(self, index):
        self.indices.append(index)
        return super().read(index)


def run(folder, images=None, facts=FACTS, **options):
    """(extracted, images read, what was said)"""
    images, said = images or Read(20, bad={1, 8}), []
    found = extract({"a": Patches()}, images, folder=folder, facts=facts, say=said.append, **{**OPTIONS, **options})
    return found, images.indices, said


def stopped_after(batches, kind=KeyboardInterrupt):
    def watch(loader):
        for number, batch in enumerate(loader):
            if number == batches:
                raise kind
            yield batch

    return watch


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    found, _, said = run(folder)
    assert said == [] and found.features.keys() == {"a", "a.patches"}
    assert sorted(contents(folder)) == [JOURNAL, "a.npy", "a.patches.npy"]
    return folder


def assert_whole(folder, whole, found):
    forget_half(folder)
    expected = contents(whole)
    del expected[JOURNAL]
    assert contents(folder) == expected
    assert found.indices.tolist() == [i for i in range(20) if i not in (1, 8)]
    assert found.unreadable == dict.fromkeys((1, 8), "it is bad")


@pytest.mark.parametrize("stops", [(0,), (2,), (3, 1), (1, 0, 2), (6,)], ids=str)
def test_what_was_interrupted_goes_on_where_it_was(tmp_path, whole, stops):
    done = 0
    for batches in stops:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, watch=stopped_after(batches))
        done = min(20, done + 3 * batches)
        assert sorted(contents(tmp_path)) == [".a.npy.half", ".a.patches.npy.half", JOURNAL]
    found, read, said = run(tmp_path)
    assert read == list(range(done, 20))
    assert said == ([f"going on after {done} of 20 images: this was stopped before"] if done else [])
    assert_whole(tmp_path, whole, found)


@pytest.mark.parametrize("at", range(1, 7))
def test_what_was_killed_goes_on_from_its_last_entry(tmp_path, whole, monkeypatch, at):
    """At any batch: rows that are past the entry are cut off, a half row too."""
    monkeypatch.setattr(stores, "SAVE_SECONDS", 0.0)

    def watch(loader):
        for number, batch in enumerate(loader):
            if number == at:
                shutil.copytree(tmp_path / "run", tmp_path / "killed")
            yield batch

    run(tmp_path / "run", watch=watch)
    for half in (tmp_path / "killed").glob(".*.half"):
        with open(half, "ab") as file:
            file.write(b"half a row" * 9)
    found, read, _ = run(tmp_path / "killed")
    assert read == list(range(3 * at, 20))
    assert_whole(tmp_path / "killed", whole, found)


def test_what_was_killed_between_its_end_and_its_caller_s_is_not_done_again(tmp_path, whole):
    for name in (JOURNAL, "a.npy", "a.patches.npy"):
        shutil.copy(whole / name, tmp_path)
    (tmp_path / "a.npy").rename(tmp_path / ".a.npy.half")  # one of the two has its name
    found, read, _ = run(tmp_path)
    assert read == []
    assert_whole(tmp_path, whole, found)


@pytest.mark.parametrize(
    "change",
    [
        {"facts": {**FACTS, "size": (8, 9)}},
        {"batch_size": 4},
        {"patches": False},
        {"images": Read(21, bad={1, 8})},
        {"indices": list(range(20))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_half_of_another_call_is_none_of_this_one(tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", watch=stopped_after(4))
    found, read, said = run(tmp_path / "a", **change)
    assert read == list(range(len(found.indices) + 2))
    assert said == [f"what another command had left half done in {tmp_path / 'a'} is deleted"]
    alone, _, _ = run(tmp_path / "b", **change)
    for name, features in alone.features.items():
        assert np.array_equal(found.features[name], features)
    forget_half(tmp_path / "a")
    forget_half(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_half_that_lacks_rows_is_begun_anew(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, watch=stopped_after(4))
    (tmp_path / ".a.patches.npy.half").unlink()
    found, read, _ = run(tmp_path)
    assert read == list(range(20))
    assert_whole(tmp_path, whole, found)


def test_a_full_disk_keeps_what_was_there(tmp_path, whole):
    with pytest.raises(OSError, match="full"):
        run(tmp_path, watch=stopped_after(4, OSError("full")))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, watch=stopped_after(1))
    assert run(tmp_path)[1] == list(range(3, 20))


@pytest.mark.parametrize("ranks", [(2, 2), (3, 1), (1, 2)])
def test_ranks_go_on_where_any_number_of_them_was(tmp_path, whole, ranks):
    def call(own, watch=iter):
        return run(tmp_path, ranks=own, watch=watch)

    def stop(own):
        with pytest.raises(KeyboardInterrupt):
            call(own, stopped_after(1))

    on_ranks(ranks[0], stop)
    results = on_ranks(ranks[1], call)
    assert sorted(index for _, read, _ in results for index in read) == list(range(3 * ranks[0], 20))
    assert len({tuple(found.indices) for found, _, _ in results}) == 1
    assert_whole(tmp_path, whole, results[0][0])


def test_nothing_that_can_be_read_so_far_and_nothing_at_all(tmp_path):
    bad = Read(20, bad=set(range(15)))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, images=bad, watch=stopped_after(2))
    assert read_journal(tmp_path)["rows"] == 0
    found, read, _ = run(tmp_path, images=Read(20, bad=set(range(15))))
    assert read == list(range(6, 20)) and found.indices.tolist() == [15, 16, 17, 18, 19]
    with pytest.raises(BadImageError):
        run(tmp_path / "none", images=Read(5, bad=set(range(5))))
    assert contents(tmp_path / "none") == {}


def test_another_process_has_the_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, watch=stopped_after(4))
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    words = [sys.executable, "-c", code, str(tmp_path / ".a.npy.half")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="is being written by another process; wait for it, or choose another"):
            run(tmp_path)
        assert contents(tmp_path) == before
        other.communicate(b"\n")
    assert run(tmp_path)[1] == list(range(12, 20))


def test_the_journal_says_what_it_is_of(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, watch=stopped_after(4))
    entry = json.loads((tmp_path / JOURNAL).read_text())
    assert (entry["done"], entry["rows"], entry["shapes"]) == (12, 10, {"a": [2], "a.patches": [4, 2]})
    assert entry["facts"]["of"] == {"encoder": "x", "size": [8, 8]}
