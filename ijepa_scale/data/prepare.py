"""A source -> Parquet shards of its images, resized once, so that training has less to decode.

A shard is whole or does not exist; a second run writes those that are missing.
"""

import hashlib
import io
import json
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ijepa_scale.data.decoding import MAX_PIXELS, USUAL, Limits, decode, reason_of
from ijepa_scale.data.files import remove_leftovers, usable_cores, write_whole, written_whole
from ijepa_scale.data.images import ImageSet, open_images, splits_of
from ijepa_scale.data.sources.inspection import inspect_source

FACTS = "prepared.json"
VERSION = 2  # of what is written for a source: 1 kept numbered labels alone, and had its last shard shorter
FORMATS = {"jpeg": 65500, "webp": 16383}  # -> the longest side that can be written, in pixels
SHARD_IMAGES = 2048  # about 60 MB of 256-pixel JPEG
TASK_IMAGES = 16  # that a process resizes at once
ROW_GROUP = 128
_NOTES = b"prepared"  # of a shard, in its Parquet metadata

_images: dict[str, ImageSet] = {}  # by split; in a worker process


@dataclass(frozen=True, kw_only=True)
class Options:
    """shorter_side: pixels. quality: of JPEG or WebP, 1 to 100."""

    shorter_side: int
    format: str = "jpeg"
    quality: int = 90

    def __post_init__(self) -> None:
        if self.shorter_side < 1:
            raise ValueError(f"--shorter-side must be 1 or more, got {self.shorter_side}")
        if self.format not in FORMATS:
            raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must be from 1 to 100, got {self.quality}")


@dataclass(frozen=True)
class Shard:
    """Images start to stop of a split, in a file."""

    path: Path
    split: str
    start: int
    stop: int


@dataclass
class Notes:
    """What became of images. bad: their names and why. as_is: images small enough, or too long. Bytes: of files."""

    images: int = 0
    as_is: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: "Notes") -> None:
        self.images += other.images
        self.as_is += other.as_is
        self.bytes_before += other.bytes_before
        self.bytes_after += other.bytes_after
        self.bad += other.bad


def prepare(
    source: str,
    out: str,
    options: Options,
    *,
    workers: int,
    cache_dir: str = "",
    column: str = "",
    config: str = "",
    max_bad_fraction: float = 0.01,
    max_pixels: int | None = None,
    shard_images: int = SHARD_IMAGES,
) -> Notes:
    """Write every split of a source to OUT/data/SPLIT-00000-of-00007.parquet, for data.source=OUT.

    Images keep their order, names, labels and other single values (_features). Those whose shorter side is at most
    options.shorter_side keep their bytes. Unreadable ones are left out: ValueError once they are more than
    max_bad_fraction of the source, or where OUT holds anything but an unfinished run with the same source and options.
    workers: 0: one for each core that may be used. max_pixels: None: as usual. The rest: as of `open_images`.
    """
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"--max-bad-fraction must lie in 0..1, got {max_bad_fraction}")
    if workers < 0:
        raise ValueError(f"--workers must be 0 (all cores) or more, got {workers}")
    workers = workers or len(usable_cores())
    folder = Path(out).expanduser().absolute()
    if folder.is_relative_to(Path(source).expanduser().absolute()):
        raise ValueError(f"{folder} lies in the source, which would change by it; give a folder elsewhere")
    opened: dict[str, Any] = {"cache_dir": cache_dir or None, "column": column, "config": config}
    splits, limit = splits_of(source, **opened), MAX_PIXELS if max_pixels is None else max_pixels
    images = {split: open_images(source, split=split, max_pixels=limit, **opened) for split in splits}
    facts = {
        "source": str(Path(source).expanduser().absolute()) if Path(source).expanduser().exists() else source,
        "images": {split: len(part) for split, part in images.items()},
        "files": _digest(source, column),
        "column": column,
        "config": config,
        **options.__dict__,
        "shard_images": shard_images,
        "version": VERSION,
    }
    shards = [shard for split, part in images.items() for shard in _shards(folder, split, len(part), shard_images)]
    _claim(folder, facts, finished=all(shard.path.exists() for shard in shards))
    return _write_missing(shards, images, options, workers=workers, max_bad_fraction=max_bad_fraction)


def _digest(source: str, column: str) -> str:
    """Changes with the files of a local source."""
    path = Path(source).expanduser()
    kind, files = inspect_source(source, column)
    if kind == "hub":
        return ""
    root = path.parent if path.is_file() else path
    names = files or sorted(str(file.relative_to(root)) for file in path.rglob("*.arrow"))
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        try:
            stat = os.stat(root / name)
            facts = name, stat.st_size, stat.st_mtime_ns
        except OSError:  # a link to nowhere, as its image is unreadable
            facts = name, -1, -1
        digest.update(repr(facts).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _claim(folder: Path, facts: dict[str, Any], *, finished: bool) -> None:
    """Note in the folder what is written to it; ValueError where that differs from an earlier run's.

    finished: whether all shards are there, which may be an earlier version's.
    """
    file = folder / FACTS
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty, and no unfinished run of this command; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(facts, indent=1) + "\n")
        return
    try:
        before = {"column": "", "config": "", "version": 1, **json.loads(file.read_bytes())}  # older ones lack these
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}; give another folder, or delete this one") from error
    changed = [key for key in facts if before.get(key) != facts[key]]
    if changed and not any((folder / "data").glob("*.parquet")):  # refused, or stopped, before anything was written
        write_whole(file, json.dumps(facts, indent=1) + "\n")
    elif changed == ["version"]:
        if finished:
            return
        raise ValueError(
            f"{folder} was begun by another version of this command, whose shards do not go with today's; give another "
            "folder, or delete this one"
        )
    elif changed:
        what = "the files of the source" if changed[0] == "files" else changed[0]
        values = "" if changed[0] == "files" else f" from {before.get(changed[0])} to {facts[changed[0]]}"
        raise ValueError(
            f"{folder} was begun with other input: {what} changed{values}; give another folder, or delete this one"
        )


def _shards(folder: Path, split: str, count: int, size: int) -> list[Shard]:
    number = -(-count // size)
    paths = [folder / "data" / f"{split}-{i:05}-of-{number:05}.parquet" for i in range(number)]
    # Even ones: a short last shard may have no image that can be read.
    return [Shard(path, split, i * count // number, (i + 1) * count // number) for i, path in enumerate(paths)]


def _write_missing(
    shards: list[Shard], images: dict[str, ImageSet], options: Options, *, workers: int, max_bad_fraction: float
) -> Notes:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(len(part) for part in images.values())
    features = _features(images)
    all_notes = Notes()
    missing = []
    for shard in shards:
        if shard.path.exists():
            all_notes.add(_read_notes(shard.path))
        else:
            missing.append(shard)
    if len(missing) < len(shards):
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are there already", flush=True)
    shards[0].path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(shards[0].path.parent)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "images", TextColumn("{task.fields[rate]}"))
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(images,))
    # No refresh thread: a process that is forked while it runs would inherit its locks.
    with Progress(*columns, "ETA", TimeRemainingColumn(), auto_refresh=False, disable=not missing) as progress:
        bar = progress.add_task("preparing", total=total, completed=total - _count(missing), rate="")
        try:
            rows: list[tuple[int, bytes]] = []
            notes = Notes()
            for shard, indices, results in _resized(pool, missing, options, ahead=4 * workers):
                rows += _rows_of(images[shard.split], indices, results, notes)
                speed = progress.tasks[0].speed
                progress.update(bar, advance=len(indices), rate=f"{speed:.0f} images/s" if speed else "", refresh=True)
                if len(all_notes.bad) + len(notes.bad) > max_bad_fraction * total:
                    raise ValueError(_too_many(all_notes.bad + notes.bad, total, max_bad_fraction))
                if indices.stop == shard.stop:
                    _write(shard, images[shard.split], rows, features, notes)
                    all_notes.add(notes)
                    rows, notes = [], Notes()
                    if not progress.console.is_terminal:
                        print(f"{shard.path}: {all_notes.images:,} of {total:,} images are done", flush=True)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed, perhaps for lack of memory; use fewer --workers: the same command goes on"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return all_notes


def _count(shards: list[Shard]) -> int:
    return sum(shard.stop - shard.start for shard in shards)


def _features(images: dict[str, ImageSet]) -> Any:
    """The columns of all shards, of splits with fewer too: the image, and single values. Says what is left out."""
    import datasets

    kinds: dict[str, list[Any]] = {}
    for part in images.values():
        for name, kind in part.scalar_features().items():
            known = kinds.setdefault(name, [])
            if kind not in known and kind != datasets.Value("null"):  # nulls are of any type
                known.append(kind)
    kept = {name: known[0] for name, known in kinds.items() if len(known) == 1 and name != "image"}
    types = {name: kind for part in images.values() for name, kind in part.column_types().items() if name not in kept}
    if types:
        left_out = ", ".join(
            f"{name} ({'unlike in splits' if len(kinds.get(name, [])) > 1 else kind})" for name, kind in types.items()
        )
        print(f"columns left out: {left_out}", flush=True)
    return datasets.Features({"image": datasets.Image(), **kept})


def _start_worker(images: dict[str, ImageSet]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _images.update(images)


Resized = tuple[bytes, int, bool] | str  # content, bytes before, whether it is as it was; or why there is none


def _resized(
    pool: ProcessPoolExecutor, shards: list[Shard], options: Options, *, ahead: int
) -> Iterator[tuple[Shard, range, list[Resized]]]:
    """Images of the shards, in order, a few tasks at a time made ahead by the processes of the pool."""
    waiting: deque[tuple[Shard, range, Future[list[Resized]]]] = deque()
    for shard in shards:
        for start in range(shard.start, shard.stop, TASK_IMAGES):
            indices = range(start, min(start + TASK_IMAGES, shard.stop))
            waiting.append((shard, indices, pool.submit(_resize_some, shard.split, indices, options)))
            if len(waiting) > ahead:
                first, its_indices, future = waiting.popleft()
                yield first, its_indices, future.result()
    for first, its_indices, future in waiting:
        yield first, its_indices, future.result()


def _resize_some(split: str, indices: range, options: Options) -> list[Resized]:
    results: list[Resized] = []
    for index in indices:
        try:
            content = _images[split].content(index)
            small = resized(content, options, _images[split].limits)
            results.append((small, len(content), small is content))
        except Exception as error:  # decoders raise whatever the bytes lead them to
            results.append(reason_of(error))
    return results


def resized(content: bytes, options: Options, limits: Limits = USUAL) -> bytes:
    """An encoded image, upright and in RGB, with its shorter side at options.shorter_side.

    As it is if that is not longer, or if the other one would still be too long for the format.
    """
    image = decode(content, limits)
    side = options.shorter_side
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    if scale >= 1 or max(size) > FORMATS[options.format]:
        return content
    file = io.BytesIO()
    # reducing_gap: averages whole blocks of a much larger image first, which looks the same and takes less time.
    small = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    small.save(file, options.format.upper(), quality=options.quality)
    return file.getvalue()


def _rows_of(images: ImageSet, indices: range, results: list[Resized], notes: Notes) -> list[tuple[int, bytes]]:
    """Index and content of those that can be read."""
    rows = []
    for index, result in zip(indices, results, strict=True):
        if isinstance(result, str):
            notes.bad.append((images.sample_id(index), result))
            continue
        content, before, as_is = result
        notes.images += 1
        notes.as_is += as_is
        notes.bytes_before += before
        notes.bytes_after += len(content)
        rows.append((index, content))
    return rows


def _write(shard: Shard, images: ImageSet, rows: list[tuple[int, bytes]], features: Any, notes: Notes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise ValueError(f"none of the images {shard.start} to {shard.stop - 1} of split {shard.split} can be read")
    schema = features.arrow_schema
    files = [{"bytes": content, "path": images.sample_id(index)} for index, content in rows]
    columns = {"image": pa.array(files, schema.field("image").type)}
    if own := [name for name in images.scalar_features() if name in features and name != "image"]:
        values = images.rows([index for index, _ in rows], own)
        columns |= dict(zip(values.column_names, values.columns, strict=True))
    nulls = {name: pa.nulls(len(rows)) for name in features}
    table = pa.table(nulls | columns).cast(schema)
    table = table.replace_schema_metadata({**schema.metadata, _NOTES: json.dumps(notes.__dict__).encode()})
    with written_whole(shard.path) as file:
        pq.write_table(table, file, row_group_size=ROW_GROUP, compression="none")


def _read_notes(path: Path) -> Notes:
    import pyarrow.parquet as pq

    try:
        notes = json.loads((pq.read_schema(path).metadata or {})[_NOTES])
    except (ValueError, KeyError, OSError) as error:  # pyarrow raises the first and the last
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} is no whole shard of this command ({reason}); delete it to have it made anew"
        ) from error
    return Notes(**{**notes, "bad": [(name, reason) for name, reason in notes["bad"]]})


def _too_many(bad: list[tuple[str, str]], total: int, allowed: float) -> str:
    listed = "".join(f"\n  {name}: {reason}" for name, reason in bad[:20])
    return (
        f"{len(bad)} of {total} images cannot be read, more than {100 * allowed:g}%: check that the source is the "
        f"right one and its files are whole{listed}"
    )
