"""Rendered scenes -> a folder of Parquet files with exact labels, made once and kept in the cache."""

import contextlib
import fcntl
import functools
import io
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path

from PIL import Image

from ijepa_scale.data.files import make_cache, sync, usable_cores, written_whole
from ijepa_scale.data.scenes.layout import COUNTS, DISTANCE_BIN_EDGES, VERSION, distance_bin, render_scene

VALIDATION_START = 1 << 40  # index of the first validation scene: the same scenes for any num_train
SCENES_PER_SHARD, SCENES_PER_TASK = 1000, 10

Row = tuple[bytes, int, float]  # PNG, count, distance


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
        with closing(_rendered_rows(list(missing.values()), seed, image_size, workers or len(usable_cores()))) as rows:
            for name, indices in missing.items():
                _write_shard(partial / name, rows, len(indices))
        sync(partial)
        os.rename(partial, complete)
        sync(complete.parent)
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
    with written_whole(path) as file:
        pq.write_table(pa.table(arrays, schema=schema), file, row_group_size=100, compression="none")
