import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.data import scenes

SIZE, STEP = 64, 0.02
SCENES = [(0, 0), (0, 9), (4, 1), (4, scenes.VALIDATION_START)]
INSIDE = {
    "sphere": lambda x, y, z: x * x + y * y + z * z <= 1,
    "box": lambda x, y, z: (abs(x) <= 1) & (abs(y) <= 1) & (abs(z) <= 1),
    "cylinder": lambda x, y, z: (x * x + y * y <= 1) & (abs(z) <= 1),
    "cone": lambda x, y, z: (np.hypot(x, y) <= (1 - z) / 2) & (abs(z) <= 1),
}


@functools.cache
def marched(seed: int, index: int) -> np.ndarray:
    """Depth (K, SIZE, SIZE) of each object alone, inf where it is missed, by small steps along each pixel's ray."""
    layout = scenes.scene_layout(seed, index)
    depth = np.full((len(layout.kinds), SIZE, SIZE), np.inf)
    edge = math.tan(math.radians(21))
    for row, column in np.ndindex(SIZE, SIZE):
        u, v = ((column + 0.5) / SIZE * 2 - 1) * edge, (1 - (row + 0.5) / SIZE * 2) * edge
        ray = layout.view[0] + u * layout.view[1] + v * layout.view[2]
        closest = (layout.centres - layout.camera) @ ray / (ray @ ray)
        missed_by = np.linalg.norm(layout.camera + closest[:, None] * ray - layout.centres, axis=1)
        for k in np.flatnonzero(missed_by < 1.4):  # no shape reaches as far from its centre
            steps = closest[k] + np.arange(-1.4, 1.4, STEP)
            points = layout.camera + steps[:, None] * ray - layout.centres[k]
            inside = INSIDE[layout.kinds[k]](*np.linalg.solve(layout.axes[k], points.T))
            if inside.any():
                depth[k, row, column] = steps[inside.argmax()]
    return depth


def nearest(depth: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(depth).any(axis=0), depth.argmin(axis=0), -1)


def without_sun(look: scenes.Look) -> scenes.Look:
    """Black objects, and everything else lit from all sides."""
    grey = np.full_like(look.ground, 0.8)
    return dataclasses.replace(look, sun=0 * look.sun, albedo=0 * look.albedo, mirror=0 * look.mirror, ground=grey)


@pytest.mark.parametrize("seed, index", SCENES)
def test_rays_hit_what_small_steps_along_them_hit(seed, index):
    expected = marched(seed, index)
    depth, owner, outlines = scenes._trace(scenes.scene_layout(seed, index), scenes._pixel_rays(SIZE, 1))
    agrees = owner[0] == nearest(expected)
    assert agrees.mean() > 0.99  # a step may jump over a grazed edge
    shown = agrees & (owner[0] >= 0)
    assert np.abs(depth[0][shown] - expected.min(axis=0)[shown]).max() < 1.5 * STEP
    np.testing.assert_allclose(outlines, np.isfinite(expected).sum(axis=(1, 2)), rtol=0.05, atol=4)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_crossing_is_the_part_of_a_ray_inside_the_shape(kind):
    rng = np.random.default_rng(1)
    starts, targets = rng.normal(size=(3, 600)), rng.uniform(-1.2, 1.2, (3, 600))
    starts *= 4 / np.linalg.norm(starts, axis=0)  # all around, so that cones are also seen from above and below
    times = np.linspace(0, 2.5, 2501)
    t_in, t_out = scenes._crossing(kind, starts, targets - starts)
    for ray, (start, target) in enumerate(zip(starts.T, targets.T, strict=True)):
        inside = times[INSIDE[kind](*(start + times[:, None] * (target - start)).T)]
        if len(inside) > 1:
            assert (t_in[ray], t_out[ray]) == pytest.approx((inside[0], inside[-1]), abs=0.0011)
        else:
            assert not t_out[ray] - t_in[ray] > 0.0021


def test_looking_only_where_an_object_or_its_shadow_can_be_changes_nothing(monkeypatch):
    layouts = [scenes.scene_layout(4, index) for index in range(12)]
    looks = [scenes._draw_look(np.random.default_rng(index), len(layout.kinds)) for index, layout in enumerate(layouts)]
    images = [scenes._render(*scene, SIZE) for scene in zip(layouts, looks, strict=True)]
    everywhere = (slice(None), slice(None), slice(None))
    monkeypatch.setattr(scenes, "_windows", lambda layout, points, size: [everywhere] * len(layout.kinds))
    for image, layout, look in zip(images, layouts, looks, strict=True):
        difference = np.abs(image.astype(int) - scenes._render(layout, look, SIZE))
        assert (difference > 3).sum() <= 3  # a sample on an edge may fall to either side: products are summed otherwise


@pytest.mark.parametrize("seed, index", SCENES)
def test_picture_shows_the_objects_of_the_layout_where_they_are(seed, index):
    layout = scenes.scene_layout(seed, index)
    look = without_sun(scenes._draw_look(np.random.default_rng(0), len(layout.kinds)))
    black = scenes._render(layout, look, SIZE).max(axis=-1) == 0
    expected = nearest(marched(seed, index)) >= 0
    inner = expected.copy()  # pixels whose neighbours agree: the others are part object, part ground
    outer = expected.copy()
    for shift in [(0, 1), (0, -1), (1, 0), (-1, 0)]:
        inner &= np.roll(expected, shift, axis=(0, 1))
        outer |= np.roll(expected, shift, axis=(0, 1))
    assert black[inner].mean() > 0.99
    assert not black[~outer].any()
    assert inner.sum() > 50


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


def test_shadow_falls_away_from_the_sun():
    centre = np.array([[0.0, 0.0, 1.5]])  # a ball in the air, seen from above: its shadow is beside it
    view = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    layout = scenes.Layout(("sphere",), centre, 0.5 * np.eye(3)[None], np.array([0.0, 0.0, 10.0]), view)
    look = scenes._draw_look(np.random.default_rng(0), 1)
    grey, sun = np.full_like(look.ground, 0.5), np.array([0.6, 0.0, 0.8], dtype=np.float32)
    look = dataclasses.replace(look, ground=grey, fog=0.0, lights=np.stack([sun] * 4, axis=1))
    image = scenes._render(layout, look, 65).astype(float).mean(axis=-1)

    def pixel(x: float, y: float) -> float:
        return image[round(32 - y / 10 / scenes.HALF_VIEW * 32.5), round(32 + x / 10 / scenes.HALF_VIEW * 32.5)]

    shadow = -1.5 * 0.6 / 0.8  # x of the shadow's centre; it reaches 0.5 in y
    assert pixel(shadow - 0.2, 0) < 0.75 * pixel(-shadow + 0.2, 0)
    assert pixel(shadow - 0.2, 0.3) < 0.75 * pixel(-shadow + 0.2, 0)
    assert pixel(shadow - 0.2, 0.8) == pytest.approx(pixel(-shadow + 0.2, 0.8), abs=1)


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
from ijepa_scale.data import scenes

def die(path):
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    scenes.SCENES_PER_SHARD, scenes._sync = 5, die
    scenes.prepare_scenes(Path(sys.argv[1]), num_train=12, num_validation=5, image_size=17, seed=6, workers=2)
"""


def test_a_killed_run_leaves_nothing_that_looks_complete_and_no_worker(prepared, tmp_path):
    script, folder = tmp_path / "killed.py", tmp_path / "scenes"
    script.write_text(KILLED_AFTER_ONE_FILE)
    root = str(Path(scenes.__file__).parents[2])
    killed = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": root},
    )
    workers = killed.stdout.readline().split()
    assert killed.wait(30) == -signal.SIGKILL and len(workers) == 2
    assert sorted(path.name for path in folder.iterdir()) == [f".{prepared.name}.lock", f".{prepared.name}.partial"]
    assert [path.name for path in (folder / f".{prepared.name}.partial").iterdir()] == ["train-00000-of-00003.parquet"]
    deadline = time.monotonic() + 20
    while any(
        Path(f"/proc/{int(worker)}/cmdline").exists() and Path(f"/proc/{int(worker)}/cmdline").read_bytes()
        for worker in workers
    ):
        assert time.monotonic() < deadline, "workers outlive their killed parent"
        time.sleep(0.05)
    assert contents(prepare(folder)) == contents(prepared)
    assert sorted(path.name for path in folder.iterdir()) == [f".{prepared.name}.lock", prepared.name]


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
