import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ijepa_scale.data.files import CACHE_TAG
from ijepa_scale.data.scenes import layout, prepare


def prepared_in(folder: Path, workers: int = 1, **changes: int) -> Path:
    arguments = {"num_train": 12, "num_validation": 5, "image_size": 17, "seed": 6} | changes
    return prepare.prepare_scenes(folder, workers=workers, **arguments)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepared_in(tmp_path_factory.mktemp("scenes"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_datasets_loads_images_and_classes(prepared, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(prepared), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 12, "validation": 5}
    for split, start in [("train", 0), ("validation", prepare.VALIDATION_START)]:
        features = loaded[split].features
        assert isinstance(features["image"], datasets.Image)
        assert features["count"].names == [str(count) for count in range(3, 11)]
        assert features["distance"].names == ["<6.8", "6.8-7.5", "7.5-8.15", "8.15-8.8", "8.8-9.5", ">=9.5"]
        assert features["nearest_distance"].dtype == "float32"
        for position, row in enumerate(loaded[split]):
            scene = layout.render_scene(6, start + position, 17)
            assert (np.asarray(row["image"]) == scene.image).all()
            assert features["count"].int2str(row["count"]) == str(scene.count)
            assert row["nearest_distance"] == np.float32(scene.distance)
            assert row["distance"] == sum(scene.distance >= edge for edge in layout.DISTANCE_BIN_EDGES)


def test_name_tells_the_parameters_and_no_scene_occurs_twice(prepared):
    import pyarrow.parquet as pq

    assert prepared.name == f"scenes-v{layout.VERSION}-17px-12+5-seed6"
    images = [row["bytes"] for path in prepared.iterdir() for row in pq.read_table(path)["image"].to_pylist()]
    assert len(set(images)) == len(images) == 17


def test_files_do_not_depend_on_the_number_of_workers(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SCENES_PER_TASK", 4)
    assert contents(prepared_in(tmp_path, workers=3)) == contents(prepared)


def test_second_call_renders_nothing(prepared, monkeypatch):
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", None)
    before = contents(prepared)
    assert prepared_in(prepared.parent) == prepared
    assert contents(prepared) == before


def test_second_process_waits_for_the_first(tmp_path, monkeypatch):
    started = []

    def counted(*arguments):
        started.append(arguments)
        return pool(*arguments)

    pool = prepare.ProcessPoolExecutor
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", counted)
    threads = [threading.Thread(target=prepared_in, args=(tmp_path,)) for _ in range(3)]  # flock tells open files apart
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1
    assert len(contents(prepared_in(tmp_path))) == 2


KILLED_AFTER_ONE_FILE = """
import multiprocessing, os, signal, sys
from pathlib import Path
from ijepa_scale.data.scenes import prepare

def die(partial, path):
    if "train-00001" not in path.name:
        return rename(partial, path)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    prepare.SCENES_PER_SHARD, rename, os.replace = 5, os.replace, die
    prepare.prepare_scenes(Path(sys.argv[1]), num_train=12, num_validation=5, image_size=17, seed=6, workers=2)
"""


def test_a_killed_run_leaves_nothing_that_looks_complete_no_worker_and_whole_files(prepared, tmp_path, monkeypatch):
    script, folder = tmp_path / "killed.py", tmp_path / "scenes"
    script.write_text(KILLED_AFTER_ONE_FILE)
    root = str(Path(prepare.__file__).parents[3])
    killed = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": root},
    )
    workers = killed.stdout.readline().split()
    assert killed.wait(30) == -signal.SIGKILL and len(workers) == 2
    left = [f".{prepared.name}.lock", f".{prepared.name}.partial", CACHE_TAG]
    assert sorted(path.name for path in folder.iterdir()) == left
    partial, first = folder / f".{prepared.name}.partial", "train-00000-of-00003.parquet"
    half, whole = sorted(path.name for path in partial.iterdir())
    assert half.startswith(".train-00001-of-00003.parquet.") and whole == first
    deadline = time.monotonic() + 20
    while any(
        Path(f"/proc/{int(worker)}/cmdline").exists() and Path(f"/proc/{int(worker)}/cmdline").read_bytes()
        for worker in workers
    ):
        assert time.monotonic() < deadline, "workers outlive their killed parent"
        time.sleep(0.05)
    shutil.copytree(partial, tmp_path / "other" / partial.name)
    assert contents(prepared_in(tmp_path / "other")) == contents(prepared)  # of other shards nothing is left
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [f".{prepared.name}.lock", prepared.name]
    kept = (partial / first).stat().st_ino
    (partial / "train-00002-of-00003.parquet").write_bytes(b"PAR1 cut short")
    monkeypatch.setattr(prepare, "SCENES_PER_SHARD", 5)
    whole = prepared_in(folder)
    assert (whole / first).stat().st_ino == kept
    assert contents(whole) == contents(prepared_in(tmp_path / "anew"))


def test_shards_hold_all_rows_in_order(prepared, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr(prepare, "SCENES_PER_SHARD", 5)
    sharded = prepared_in(tmp_path)
    shards = [f"train-{shard:05d}-of-00003.parquet" for shard in range(3)]
    assert sorted(contents(sharded)) == [*shards, "validation-00000-of-00001.parquet"]
    rows = [row for shard in shards for row in pq.read_table(sharded / shard).to_pylist()]
    assert rows == pq.read_table(prepared / "train-00000-of-00001.parquet").to_pylist()


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_validation": 0}, {"image_size": 4}, {"seed": -1}])
def test_impossible_parameters_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"scenes need .* got .*{next(iter(wrong.values()))}"):
        prepared_in(tmp_path, **wrong)
    assert not any(tmp_path.iterdir())
