import math
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
from PIL import Image

from ijepa_scale.data.scenes import scenes
from tests.reference.marching import INSIDE, marched, nearest

SCENES = [(0, 0), (0, 9), (4, 1), (4, scenes.VALIDATION_START)]


@pytest.mark.parametrize("seed, index", SCENES)
def test_labels_are_the_visible_objects_and_the_nearest_centre(seed, index):
    scene, layout, depth = scenes.render_scene(seed, index, 16), scenes.scene_layout(seed, index), marched(seed, index)
    visible = np.array([(nearest(depth) == k).sum() for k in range(len(depth))])
    assert scene.count == len(visible)
    assert (visible >= 0.4 * np.isfinite(depth).sum(axis=(1, 2))).all()
    assert (visible >= 10).all()
    assert scene.distance == pytest.approx(min(math.dist(centre, layout.camera) for centre in layout.centres))


def test_objects_stand_on_the_ground_and_apart():
    rng = np.random.default_rng(0)
    for index in range(20):
        layout = scenes.scene_layout(1, index)
        unit = rng.uniform(-1, 1, (20000, 3)).T
        solids = []
        for kind, centre, axes in zip(layout.kinds, layout.centres, layout.axes, strict=True):
            inside = unit[:, INSIDE[kind](*unit)]
            solids.append(centre[:, None] + axes @ inside)
            assert 0 <= solids[-1][2].min() < 0.06
        for k, (kind, centre, axes) in enumerate(zip(layout.kinds, layout.centres, layout.axes, strict=True)):
            others = np.concatenate(solids[:k] + solids[k + 1 :], axis=1)
            assert not INSIDE[kind](*np.linalg.solve(axes, others - centre[:, None])).any()


def test_scene_depends_on_its_arguments_only():
    first = scenes.render_scene(3, 5, 33)
    scenes.render_scene(8, 8, 16)
    again = scenes.render_scene(3, 5, 33)
    assert first.image.shape == (33, 33, 3) and first.image.dtype == np.uint8
    assert (first.image == again.image).all() and (first.count, first.distance) == (again.count, again.distance)
    for other in [(3, 6), (4, 5), (5, 3), (3, 5 + scenes.VALIDATION_START)]:
        assert np.abs(scenes.render_scene(*other, 33).image.astype(float) - first.image).mean() > 5


@pytest.mark.parametrize("size", [9, 33, 50])
def test_other_sizes_show_the_same_scene(size):
    large, small = scenes.render_scene(2, 7, 4 * size), scenes.render_scene(2, 7, size)
    shrunk = np.asarray(Image.fromarray(large.image).resize((size, size), Image.Resampling.BOX))
    assert (small.count, small.distance) == (large.count, large.distance)
    assert np.abs(shrunk.astype(float) - small.image).mean() < 6


def test_all_counts_and_distance_classes_are_about_equally_frequent():
    layouts = [scenes.scene_layout(11, index) for index in range(800)]
    counts = np.bincount([len(layout.kinds) for layout in layouts], minlength=11)
    bins = np.bincount([scenes.distance_bin(layout.distance) for layout in layouts], minlength=6)
    assert counts[:3].sum() == 0 and counts[3:].min() > 70 and counts[3:].max() < 130  # 100 expected, deviation 9
    assert len(bins) == 6 and bins.min() > 95 and bins.max() < 175  # 133 expected, deviation 11


def test_distance_bin_counts_the_edges_at_or_below():
    assert [scenes.distance_bin(edge) for edge in scenes.DISTANCE_BIN_EDGES] == [1, 2, 3, 4, 5]
    assert [scenes.distance_bin(edge - 1e-6) for edge in scenes.DISTANCE_BIN_EDGES] == [0, 1, 2, 3, 4]


def test_mean_colour_does_not_tell_the_count():
    drawn = [scenes.render_scene(12, index, 12) for index in range(500)]
    features = np.array([scene.image.mean(axis=(0, 1)) for scene in drawn])
    counts = np.array([scene.count for scene in drawn], dtype=float)
    inputs = np.c_[features, np.ones(len(features))]
    fit = inputs @ np.linalg.lstsq(inputs, counts, rcond=None)[0]
    assert 1 - ((counts - fit) ** 2).mean() / counts.var() < 0.08


def prepare(folder: Path, workers: int = 1, **changes: int) -> Path:
    arguments = {"num_train": 12, "num_validation": 5, "image_size": 17, "seed": 6} | changes
    return scenes.prepare_scenes(folder, workers=workers, **arguments)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("scenes"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_datasets_loads_images_and_classes(prepared, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(prepared), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 12, "validation": 5}
    for split, start in [("train", 0), ("validation", scenes.VALIDATION_START)]:
        features = loaded[split].features
        assert isinstance(features["image"], datasets.Image)
        assert features["count"].names == [str(count) for count in range(3, 11)]
        assert features["distance"].names == ["<6.8", "6.8-7.5", "7.5-8.15", "8.15-8.8", "8.8-9.5", ">=9.5"]
        assert features["nearest_distance"].dtype == "float32"
        for position, row in enumerate(loaded[split]):
            scene = scenes.render_scene(6, start + position, 17)
            assert (np.asarray(row["image"]) == scene.image).all()
            assert features["count"].int2str(row["count"]) == str(scene.count)
            assert row["nearest_distance"] == np.float32(scene.distance)
            assert row["distance"] == sum(scene.distance >= edge for edge in scenes.DISTANCE_BIN_EDGES)


def test_name_tells_the_parameters_and_no_scene_occurs_twice(prepared):
    import pyarrow.parquet as pq

    assert prepared.name == f"scenes-v{scenes.VERSION}-17px-12+5-seed6"
    images = [row["bytes"] for path in prepared.iterdir() for row in pq.read_table(path)["image"].to_pylist()]
    assert len(set(images)) == len(images) == 17


def test_files_do_not_depend_on_the_number_of_workers(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SCENES_PER_TASK", 4)
    assert contents(prepare(tmp_path, workers=3)) == contents(prepared)


def test_second_call_renders_nothing(prepared, monkeypatch):
    monkeypatch.setattr(scenes, "ProcessPoolExecutor", None)
    before = contents(prepared)
    assert prepare(prepared.parent) == prepared
    assert contents(prepared) == before


def test_second_process_waits_for_the_first(tmp_path, monkeypatch):
    started = []

    def counted(*arguments):
        started.append(arguments)
        return pool(*arguments)

    pool = scenes.ProcessPoolExecutor
    monkeypatch.setattr(scenes, "ProcessPoolExecutor", counted)
    threads = [threading.Thread(target=prepare, args=(tmp_path,)) for _ in range(3)]  # flock tells open files apart
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1
    assert len(contents(prepare(tmp_path))) == 2


KILLED_AFTER_ONE_FILE = """
import multiprocessing, os, signal, sys
from pathlib import Path
from ijepa_scale.data.scenes import scenes

def die(path):
    if "train-00001" not in path.name:
        return
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    scenes.SCENES_PER_SHARD, scenes._sync = 5, die
    scenes.prepare_scenes(Path(sys.argv[1]), num_train=12, num_validation=5, image_size=17, seed=6, workers=2)
"""


def test_a_killed_run_leaves_nothing_that_looks_complete_no_worker_and_whole_files(prepared, tmp_path, monkeypatch):
    script, folder = tmp_path / "killed.py", tmp_path / "scenes"
    script.write_text(KILLED_AFTER_ONE_FILE)
    root = str(Path(scenes.__file__).parents[3])
    killed = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": root},
    )
    workers = killed.stdout.readline().split()
    assert killed.wait(30) == -signal.SIGKILL and len(workers) == 2
    assert sorted(path.name for path in folder.iterdir()) == [f".{prepared.name}.lock", f".{prepared.name}.partial"]
    partial, first = folder / f".{prepared.name}.partial", "train-00000-of-00003.parquet"
    assert sorted(path.name for path in partial.iterdir()) == [".train-00001-of-00003.parquet.partial", first]
    deadline = time.monotonic() + 20
    while any(
        Path(f"/proc/{int(worker)}/cmdline").exists() and Path(f"/proc/{int(worker)}/cmdline").read_bytes()
        for worker in workers
    ):
        assert time.monotonic() < deadline, "workers outlive their killed parent"
        time.sleep(0.05)
    shutil.copytree(partial, tmp_path / "other" / partial.name)
    assert contents(prepare(tmp_path / "other")) == contents(prepared)  # of other shards nothing is left
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [f".{prepared.name}.lock", prepared.name]
    kept = (partial / first).stat().st_ino
    (partial / "train-00002-of-00003.parquet").write_bytes(b"PAR1 cut short")
    monkeypatch.setattr(scenes, "SCENES_PER_SHARD", 5)
    whole = prepare(folder)
    assert (whole / first).stat().st_ino == kept
    assert contents(whole) == contents(prepare(tmp_path / "anew"))


def test_shards_hold_all_rows_in_order(prepared, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr(scenes, "SCENES_PER_SHARD", 5)
    sharded = prepare(tmp_path)
    shards = [f"train-{shard:05d}-of-00003.parquet" for shard in range(3)]
    assert sorted(contents(sharded)) == [*shards, "validation-00000-of-00001.parquet"]
    rows = [row for shard in shards for row in pq.read_table(sharded / shard).to_pylist()]
    assert rows == pq.read_table(prepared / "train-00000-of-00001.parquet").to_pylist()


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_validation": 0}, {"image_size": 4}, {"seed": -1}])
def test_impossible_parameters_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"scenes need .* got .*{next(iter(wrong.values()))}"):
        prepare(tmp_path, **wrong)
    assert not any(tmp_path.iterdir())
