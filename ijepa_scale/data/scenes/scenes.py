"""Rendered scenes with exact labels: the data of configs/tiny.yaml, and a test bed whose answers are known.

Three to ten spheres, boxes, cylinders and cones on a ground plane, in the spirit of CLEVR (arXiv:1612.06890), ray-cast
by raycast.py. In this order: what a scene is; drawing one; the Parquet files.
"""

import colorsys
import contextlib
import fcntl
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ijepa_scale.data.cache import make_cache
from ijepa_scale.data.scenes.raycast import HALF_VIEW, Layout, Look, pixel_rays, render, trace

COUNTS = range(3, 11)
DISTANCE_BIN_EDGES: tuple[float, ...] = (6.8, 7.5, 8.15, 8.8, 9.5)  # the sixths of 20,000 scenes, rounded
KINDS = ("sphere", "box", "cylinder", "cone")
TEXTURES = ("gradient", "stripes", "checker", "tiles", "noise", "blotches")
MIN_VISIBLE_SHARE = 0.45  # of an object's own outline inside the frame
MIN_VISIBLE_AREA = 0.003  # of the image: 12 pixels at 64 x 64
VALIDATION_START = 1 << 40  # index of the first validation scene: the same scenes for any num_train
VERSION = 1  # part of the folder's name: raise it whenever a rendered pixel or a label changes
VISIBILITY_SIZE = 64  # layouts are judged at one resolution, so that a scene is the same scene at any image size
SCENES_PER_SHARD, SCENES_PER_TASK = 1000, 10


Row = tuple[bytes, int, float]  # PNG, count, distance


@dataclass(frozen=True)
class Scene:
    """A picture and the exact answers to two questions about it."""

    image: np.ndarray  # (size, size, 3) uint8 RGB
    count: int  # of objects, all of them visible
    distance: float  # from the camera to the nearest centre of an object, in scene units (objects are 0.5 to 1.6 wide)


def render_scene(seed: int, index: int, size: int) -> Scene:
    """Scene `index` of series `seed` (both 0 <= x < 2^64) at size x size pixels: a pure function of its arguments.

    Layout and labels do not depend on the size.
    """
    rng = _generator(seed, index)
    layout = _draw_layout(rng)
    image = render(layout, _draw_look(rng, len(layout.kinds)), size)
    return Scene(image, len(layout.kinds), layout.distance)


def scene_layout(seed: int, index: int) -> Layout:
    """The geometry that `render_scene(seed, index, size)` shows."""
    return _draw_layout(_generator(seed, index))


def distance_bin(distance: float) -> int:
    """Class 0 to 5 of a distance: the number of edges at or below it."""
    return sum(edge <= distance for edge in DISTANCE_BIN_EDGES)


def _generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def _draw_layout(rng: np.random.Generator) -> Layout:
    """Draws until every object can be seen. The count is drawn once, so that all counts are equally frequent."""
    count = int(rng.integers(COUNTS.start, COUNTS.stop))
    while True:
        layout = _draw_objects(rng, count, *_draw_camera(rng))
        if layout is not None and _all_visible(layout):
            return layout


def _draw_camera(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    elevation, azimuth = math.radians(rng.uniform(17, 50)), rng.uniform(0, 2 * math.pi)
    outward = np.array([math.cos(azimuth), math.sin(azimuth), math.tan(elevation)]) * math.cos(elevation)
    right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    up = np.cross(outward, right)
    roll = rng.normal(0, math.radians(2))
    right, up = right * math.cos(roll) + up * math.sin(roll), up * math.cos(roll) - right * math.sin(roll)
    target = np.array([*rng.uniform(-0.4, 0.4, 2), rng.uniform(0.0, 0.8)])
    return target + outward * rng.uniform(8.0, 12.0), np.stack([-outward, right, up])


def _draw_objects(rng: np.random.Generator, count: int, camera: np.ndarray, view: np.ndarray) -> Layout | None:
    """Random shapes, apart on the ground and not quite behind one another; None if random places leave no room."""
    kinds = tuple(KINDS[k] for k in rng.integers(0, len(KINDS), count))
    radii = rng.uniform(0.4, 0.8, count)
    axes_K33 = np.stack([_draw_axes(rng, kind, radius) for kind, radius in zip(kinds, radii, strict=True)])
    rest_K = np.abs(axes_K33[:, 2]).max(
        axis=1
    )  # the length of the one vertical axis: on the ground, the centre's height
    angle, reach = rng.uniform(0, 2 * math.pi, 120), 3.6 * np.sqrt(rng.random(120))
    places = np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1)
    depth, x, y = view @ (np.c_[places, np.full(120, 0.5)] - camera).T
    screen = np.stack([x, y], axis=1) / depth[:, None]
    room = np.abs(screen).max(axis=1) < 0.82 * HALF_VIEW
    room_K = np.tile(room, (count, 1))
    centres_K3 = np.empty((count, 3))
    for k in range(count):
        if not room_K[k].any():
            return None
        place = int(room_K[k].argmax())
        centres_K3[k] = *places[place], rest_K[k]
        apart, seen = np.hypot(*(places - places[place]).T), np.hypot(*(screen - screen[place]).T)
        sums = radii[:, None] + radii[k]
        room_K &= apart > 1.12 * sums + 0.05
        room_K &= seen > 0.6 * (radii[:, None] / depth + radii[k] / depth[place])
    return Layout(kinds, centres_K3, axes_K33, camera, view)


def _draw_axes(rng: np.random.Generator, kind: str, radius: float) -> np.ndarray:
    """(3, 3) matrix of one unit shape: width and height of the kind, turned about the vertical; a cylinder may lie."""
    yaw = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(yaw), -math.sin(yaw), 0.0], [math.sin(yaw), math.cos(yaw), 0.0], [0.0, 0.0, 1.0]])
    if kind == "cylinder" and rng.random() < 0.4:
        turn = turn[:, [1, 2, 0]]
    width = {"sphere": 1.0, "box": 0.78, "cylinder": 0.72, "cone": 0.95}[kind]
    height = 1.0 if kind == "sphere" else rng.uniform(0.6, 0.92)
    return turn * radius * np.array([width, width, height])


def _all_visible(layout: Layout) -> bool:
    _, owner, outlines = trace(layout, pixel_rays(VISIBILITY_SIZE, 1))
    seen = np.bincount(owner[owner >= 0], minlength=len(outlines))
    return bool((seen >= np.maximum(MIN_VISIBLE_SHARE * outlines, MIN_VISIBLE_AREA * owner.size)).all())


def _draw_look(rng: np.random.Generator, count: int) -> Look:
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    sky = [_draw_colour(rng, saturation=(0.0, 0.6), value=(0.5, 1.0)) for _ in range(2)]
    ground = [_draw_colour(rng, saturation=(0.0, 0.7), value=(0.3, 0.95)) for _ in range(2)]
    ground[1] = ground[0] + (ground[1] - ground[0]) * rng.uniform(0.25, 0.9)  # some textures faint
    pairs = [[_draw_colour(rng, saturation=(0.2, 1.0), value=(0.3, 1.0)) for _ in range(2)] for _ in range(count)]
    albedo = np.array([pair if rng.random() < 0.2 else [pair[0], pair[0]] for pair in pairs])
    stripes = np.concatenate([rng.normal(0, 4.0, (count, 3)), rng.uniform(0, 6.3, (count, 1))], axis=1)
    shiny, metal = rng.random(count) < 0.6, rng.random(count) < 0.25
    mirror = np.where(metal, rng.uniform(0.5, 0.8, count), np.where(shiny, 0.05, 0.0))
    polish = np.where(shiny | metal, rng.uniform(25, 120, count), 4.0)
    warmth = rng.uniform(-0.1, 0.1)
    parts = {
        "lights": _draw_lights(rng), "sun": rng.uniform(0.9, 1.5) * np.array([1 + warmth, 1, 1 - warmth]),
        "zenith": sky[0], "horizon": sky[1], "ground": ground, "waves": _draw_waves(rng, texture),
        "albedo": albedo, "stripes": stripes, "mirror": mirror, "polish": polish,
    }  # fmt: skip
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in parts.items()}
    return Look(texture=texture, fog=float(rng.uniform(0.0, 0.05)), **arrays)


def _draw_colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """Linear RGB of any hue; the square undoes the display's gamma of about 2."""
    return np.square(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))


def _draw_lights(rng: np.random.Generator) -> np.ndarray:
    elevation, azimuth, spread = math.radians(rng.uniform(32, 70)), rng.uniform(0, 2 * math.pi), rng.uniform(0.01, 0.05)
    sun = np.array([math.cos(azimuth), math.sin(azimuth), math.tan(elevation)]) * math.cos(elevation)
    across = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    offsets = np.outer([-1, -1, 1, 1], across) + np.outer([-1, 1, -1, 1], np.cross(sun, across))
    lights = sun + spread * offsets
    return (lights / np.linalg.norm(lights, axis=1, keepdims=True)).T


def _draw_waves(rng: np.random.Generator, texture: str) -> np.ndarray:
    """Four plane waves over the ground, in radians a scene unit; the first two are perpendicular and of one length."""
    low, high = {"gradient": (0.1, 0.4), "noise": (0.7, 3.0), "blotches": (0.7, 3.0)}.get(texture, (1.5, 4.0))
    angle = rng.uniform(0, 2 * math.pi) + np.array([0, math.pi / 2, *rng.uniform(0, 2 * math.pi, 2)])
    length = np.repeat(rng.uniform(low, high, 3), [2, 1, 1])
    return np.stack([length * np.cos(angle), length * np.sin(angle), rng.uniform(0, 2 * math.pi, 4)], axis=1)


def prepare_scenes(
    folder: Path, *, num_train: int, num_validation: int, image_size: int, seed: int, workers: int | None = None
) -> Path:
    """Renders scenes into a folder of Parquet files that `datasets.load_dataset` reads; at once if it is there already.

    Columns: image (PNG), count (classes "3" to "10"), distance (6 classes) and nearest_distance (float32, scene units).
    Splits: train, scenes 0 to num_train - 1 of the seed, and validation, from VALIDATION_START on.
    Returns folder/<name with all parameters>. That folder is complete or absent: it is renamed into place, and a second
    process waits for the first. Stopped, the next call keeps the files that are whole. They do not depend on `workers`
    (None: one for each core).
    """
    if num_train < 1 or num_validation < 1 or image_size < 8 or seed < 0:
        got = f"{num_train}, {num_validation}, {image_size} and {seed}"
        raise ValueError(f"scenes need num_train >= 1, num_validation >= 1, image_size >= 8 and seed >= 0, got {got}")
    name = f"scenes-v{VERSION}-{image_size}px-{num_train}+{num_validation}-seed{seed}"
    complete, partial = Path(folder) / name, Path(folder) / f".{name}.partial"
    if complete.is_dir():
        return complete
    make_cache(complete.parent)
    with open(complete.parent / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when its holder dies
        if complete.is_dir():
            return complete
        partial.mkdir(exist_ok=True)
        shards = _shards("train", 0, num_train) | _shards("validation", VALIDATION_START, num_validation)
        missing = {name: indices for name, indices in shards.items() if not _is_whole(partial / name, len(indices))}
        for stray in {file.name for file in partial.iterdir()} - (shards.keys() - missing.keys()):
            (partial / stray).unlink()
        with closing(_rendered_rows(list(missing.values()), seed, image_size, workers or os.cpu_count() or 1)) as rows:
            for name, indices in missing.items():
                _write_shard(partial / name, rows, len(indices))
        _sync(partial)
        os.rename(partial, complete)
        _sync(complete.parent)
    return complete


def _shards(split: str, first: int, num_rows: int) -> dict[str, range]:
    """The files of a split, as HuggingFace names them, and their scenes."""
    number = -(-num_rows // SCENES_PER_SHARD)
    scenes = range(first, first + num_rows)
    return {
        f"{split}-{i:05d}-of-{number:05d}.parquet": scenes[i * SCENES_PER_SHARD : (i + 1) * SCENES_PER_SHARD]
        for i in range(number)
    }


def _is_whole(path: Path, num_rows: int) -> bool:
    """Whether an earlier call wrote this file to its end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows == num_rows
    except (FileNotFoundError, pa.ArrowInvalid):
        return False


def _rendered_rows(parts: list[range], seed: int, size: int, workers: int) -> Generator[Row, None, None]:
    """The rows of all parts in order, rendered by `workers` processes, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    tasks = [part[start : start + SCENES_PER_TASK] for part in parts for start in range(0, len(part), SCENES_PER_TASK)]
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as progress:
            bar = progress.add_task("rendering scenes", total=sum(map(len, parts)))
            with _blocking_ctrl_c():
                results = executor.map(functools.partial(_render_rows, seed, size), tasks)
            for rows in results:
                progress.advance(bar, len(rows))
                yield from rows
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _blocking_ctrl_c() -> Iterator[None]:
    """What is started within it is deaf to Ctrl-C, which reaches all processes and would break off their start."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    parent.join()
    os._exit(1)


def _render_rows(seed: int, size: int, indices: range) -> list[Row]:
    rows: list[Row] = []
    for index in indices:
        scene, png = render_scene(seed, index, size), io.BytesIO()
        Image.fromarray(scene.image).save(png, format="PNG", compress_level=3)  # 6 takes twice as long for 4% less
        rows.append((png.getvalue(), scene.count, scene.distance))
    return rows


def _write_shard(path: Path, rows: Iterator[Row], num_rows: int) -> None:
    """Writes the next num_rows rows; under this name the file is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    edges = [f"{edge:g}" for edge in DISTANCE_BIN_EDGES]
    distance_names = ["<" + edges[0], *("-".join(pair) for pair in itertools.pairwise(edges)), ">=" + edges[-1]]
    features = {
        "image": {"_type": "Image"},
        "count": {"names": [str(count) for count in COUNTS], "_type": "ClassLabel"},
        "distance": {"names": distance_names, "_type": "ClassLabel"},
        "nearest_distance": {"dtype": "float32", "_type": "Value"},
    }
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    types = {"image": image_type, "count": pa.int64(), "distance": pa.int64(), "nearest_distance": pa.float32()}
    schema = pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    images, counts, distances = zip(*itertools.islice(rows, num_rows), strict=True)
    columns = [
        [{"bytes": image, "path": None} for image in images],
        [count - COUNTS.start for count in counts],
        [distance_bin(distance) for distance in distances],
        distances,
    ]
    arrays = [pa.array(column, type=kind) for column, kind in zip(columns, types.values(), strict=True)]
    unfinished = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table(arrays, schema=schema), unfinished, row_group_size=100, compression="none")
    _sync(unfinished)
    os.rename(unfinished, path)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
