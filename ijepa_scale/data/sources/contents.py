"""What a folder is: of several kinds of files the one that holds the images; and what is left out, in words."""

import collections
import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ijepa_scale.data.decoding import open_encoded
from ijepa_scale.data.lfs import LFS_ADVICE, is_pointer_file
from ijepa_scale.data.sources.columns import are_masks
from ijepa_scale.data.sources.folders import list_files, printable, say_once, warn_once
from ijepa_scale.data.sources.remote import Patience, StreamError
from ijepa_scale.data.sources.shards import DAMAGED, arrow_batches, first_rows
from ijepa_scale.data.sources.tars import open_tar, tar_samples

_WORDS = {"parquet": "Parquet file", "arrow": "Arrow file", "tar": "tar", "images": "image file"}
_MOST = 10  # times the images of another kind of files, for the one kind to be plainly what was meant
_FEW_MASKS = 0.05  # of all images: a class of a data set may be called mask
_COUNTED_IN_TARS = 1000  # images that are counted; how many the rest holds is told from its bytes
_SAMPLED_IMAGES = 64
_UNDECODED = (
    *(".heic", ".heif", ".hif", ".jxl", ".svg", ".exr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
_PACKED = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
_NO_DATA = (  # beside images without a meaning for training: nobody misses them
    *(".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".cls", ".mat", ".lock", ".log"),
    *(".md", ".rst", ".html", ".pdf", ".py", ".sh", ".ini", ".db", ".cff", ".bib"),
)
_ENDINGS_NAMED = 6


@dataclass(frozen=True)
class Contents:
    """kind: of the files that are read, "" where there are none. left_out: in words. loud: whether it may be missed."""

    kind: str
    files: list[str]
    taken: str
    left_out: list[str]
    loud: bool

    def say(self, root: str) -> None:
        """Tell the user, in one line and once."""
        text = f"{printable(root)}: {self.taken} taken"
        if self.left_out:
            text += f"; left out: {', '.join(self.left_out)}"
        say_once(logging.WARNING if self.loud else logging.INFO, text)


def folder_contents(root: str) -> Contents:
    """The files below root to be read, all of one kind.

    Parquet and Arrow files without images are none; of several kinds it is the one with ten times as many images as any
    other. ValueError where there is no such, and where all files are Git-LFS pointers.
    """
    listing = list_files(root)
    parts = {kind: files for kind, files in listing.kinds.items() if files}
    left_out: list[str] = []
    loud = False
    for kind, files in list(parts.items()):
        parts[kind] = _without_pointers(root, kind, files)
        if pointers := len(files) - len(parts[kind]):
            left_out.append(f"{_several(pointers, kind)} not pulled yet, being {LFS_ADVICE}")
            loud = True
    if loud and not any(parts.values()):
        raise ValueError(f"{printable(root)} holds nothing to read but {', '.join(left_out)}")
    for kind in [kind for kind in ("parquet", "arrow") if parts.get(kind)]:
        with_images = _with_images(root, parts[kind])
        bare = sorted(set(parts[kind]) - set(with_images))
        if bare and (with_images or any(files for other, files in parts.items() if other != kind)):
            left_out.append(f"{_several(len(bare), kind)} without a column of images, such as {printable(bare[0])}")
            loud, parts[kind] = True, with_images
    parts = {kind: files for kind, files in parts.items() if files}
    kind = next(iter(parts), "")
    taken = _several(len(parts.get(kind, [])), kind)
    if len(parts) > 1:
        kind, counts = _chosen(root, parts)
        taken = f"{_several(len(parts[kind]), kind)} of {counts[kind]} images"
        left_out += [
            f"{_several(len(files), other)} of {counts[other]} images, such as {printable(files[0])}"
            for other, files in parts.items()
            if other != kind
        ]
        loud = True
    words, missed = _others_in_words(listing.others, listing.system)
    loud |= kind in ("images", "") and missed * _MOST > len(parts.get(kind, []))
    if kind == "images" and missed > len(parts[kind]):
        taken = f"most files left out, and only {taken}"
    if kind == "images":
        _warn_of_masks(root, parts[kind])
    return Contents(kind, parts.get(kind, []), taken, left_out + words, loud)


def _warn_of_masks(root: str, files: list[str]) -> None:
    """Of masks in folders of their own beside photographs; one class of many may be called so."""
    counts = collections.Counter(os.path.dirname(file) for file in files)
    masks = {folder: count for folder, count in counts.items() if are_masks(folder)}
    share = sum(masks.values()) / len(files)
    if _FEW_MASKS < share < 1:
        folder, count = max(masks.items(), key=lambda item: item[1])
        warn_once(
            f"{printable(root)}: {sum(masks.values()):,} of the {len(files):,} images lie in folders called as masks "
            f"are, such as {printable(folder)} ({count:,}): they are trained on, too; if they are masks, give the "
            "folder of the photographs alone"
        )


def _several(count: int, kind: str) -> str:
    return f"{count:,} {_WORDS.get(kind, 'file')}{'s' * (count != 1)}"


def _without_pointers(root: str, kind: str, files: list[str]) -> list[str]:
    """Of many images a few tell of all; a single one among others is a bad image like any."""
    if kind != "images":
        return [file for file in files if not is_pointer_file(os.path.join(root, file))]
    sampled = files[:: max(1, len(files) // _SAMPLED_IMAGES)]
    pointers = sum(is_pointer_file(os.path.join(root, file)) for file in sampled)
    return [] if 2 * pointers > len(sampled) else files


def _with_images(root: str, files: list[str]) -> list[str]:
    """Those of Parquet or Arrow files that hold images. Files whose names differ only in numbers are alike."""
    verdicts: dict[str, bool] = {}
    kept = []
    for file in files:
        alike = re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "#", file)
        if alike not in verdicts:
            verdicts[alike] = _holds_images(*_facts(root, [file])[0])
        if verdicts[alike]:
            kept.append(file)
    return kept


def _facts(root: str, files: list[str]) -> tuple[tuple[str, int, int], ...]:
    """(path, size, time of the last change), by which what was found of files is kept."""
    paths = [os.path.join(root, file) for file in files]
    stats = [os.stat(path) for path in paths]
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True))


@functools.lru_cache(maxsize=256)
def _holds_images(path: str, size: int, changed: int) -> bool:
    """Whether a Parquet or Arrow file has a column of images. A damaged one may have: reading it tells."""
    try:
        rows = first_rows(path, 16, Patience(0))
    except (*DAMAGED, StreamError):
        return True
    told = json.loads((rows.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    for field in rows.schema:
        feature = told.get(field.name)
        feature_type = feature.get("_type") if isinstance(feature, dict) else None
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            if feature_type in (None, "Image"):  # and not Audio, which is stored alike
                return True
        elif pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            contents = rows.column(field.name).to_pylist()
            if not contents or any(map(_is_image, contents)):
                return True
    return False


def _is_image(content: bytes | None) -> bool:
    try:
        with open_encoded(content or b""):
            return True
    except Exception:  # decoders raise whatever the bytes lead them to
        return False


def _chosen(root: str, parts: dict[str, list[str]]) -> tuple[str, dict[str, str]]:
    """The kind of files that holds the images, and how many every kind holds, in words. ValueError in doubt."""
    counts, words = {}, {}
    for kind, files in parts.items():
        counts[kind], exact = (len(files), True) if kind == "images" else _count(kind, _facts(root, files))
        words[kind] = f"{'' if exact else 'about '}{counts[kind]:,}"
    kind = max(counts, key=lambda kind: counts[kind])
    if any(_MOST * counts[other] > counts[kind] for other in counts if other != kind):
        held = " and ".join(f"{words[kind]} images in {_several(len(files), kind)}" for kind, files in parts.items())
        ways = [f"{_alone(root, kind, parts)} for the {_WORDS[kind]}s" for kind in parts]
        raise ValueError(
            f"{printable(root)} holds {held}, so it is not plain which of them to take: give {', '.join(ways)}"
        )
    return kind, words


@functools.lru_cache(maxsize=16)
def _count(kind: str, facts: tuple[tuple[str, int, int], ...]) -> tuple[int, bool]:
    """(images in Parquet files, Arrow files or tars, whether that is exact)."""
    if kind == "tar":
        return _images_in_tars(facts)
    with ThreadPoolExecutor(16) as pool:  # a footer is one short read, which may be a slow one
        return sum(pool.map(_rows_in, (path for path, _, _ in facts))), True


def count_rows(paths: list[str]) -> int:
    """The rows of Parquet files, by their footers; none of damaged ones."""
    return _count("parquet", _facts("", paths))[0]


def _rows_in(path: str) -> int:
    try:
        if path.lower().endswith(".arrow"):
            return sum(batch.num_rows for batch in arrow_batches(pa.memory_map(path)))
        return pq.read_metadata(path).num_rows
    except DAMAGED:
        return 0


def _images_in_tars(facts: tuple[tuple[str, int, int], ...]) -> tuple[int, bool]:
    """By the headers of the first samples, and the bytes that the others take."""
    images = read = 0
    for path, size, _ in facts:
        with open(path, "rb") as file:
            try:
                for _ in tar_samples(open_tar(file, path), path, contents=lambda number: False):
                    images += 1
                    if images == _COUNTED_IN_TARS:
                        return round(images * sum(size for _, size, _ in facts) / (read + file.tell())), False
            except DAMAGED:  # in the middle of what is to be trained on: reading it tells
                pass
        read += size
    return images, True


def _alone(root: str, kind: str, parts: dict[str, list[str]]) -> str:
    """The source that holds the files of one kind and no others; where there is none, how to make it."""
    files = parts[kind]
    if len(files) == 1 and kind != "images":
        return f"data.source={printable(os.path.join(root, files[0]))}"
    folder = os.path.commonpath([os.path.dirname(file) for file in files])
    others = (file for other, theirs in parts.items() if other != kind for file in theirs)
    if folder and not any(file.startswith(f"{folder}/") for file in others):
        return f"data.source={printable(os.path.join(root, folder))}"
    return "a folder of their own, to which you move them,"


def _others_in_words(others: list[str], system: list[str]) -> tuple[list[str], int]:
    """What files there are that are no data, and how many of them may be missed."""
    by_ending: dict[str, list[str]] = collections.defaultdict(list)
    for file in others:
        by_ending[os.path.splitext(file)[1].lower()].append(file)
    plain = {ending: by_ending.pop(ending) for ending in sorted(by_ending) if ending in _NO_DATA}
    words = list(_endings_in_words(by_ending))
    if plain:
        words.append(f"{sum(map(len, plain.values())):,} of {', '.join(plain)}")
    if system:
        kind = "folder of a system, a run or a cache" if len(system) == 1 else "folders of systems, runs or caches"
        words.append(f"{len(system)} {kind}, such as {printable(system[0])}")
    return words, sum(map(len, by_ending.values()))


def _endings_in_words(by_ending: dict[str, list[str]]) -> Iterator[str]:
    ordered = sorted(by_ending.items(), key=lambda item: -len(item[1]))
    for ending, files in ordered[:_ENDINGS_NAMED]:
        why = f"{ending} file{'s' * (len(files) != 1)}" if ending else "without an ending and no image by the content"
        if ending in _UNDECODED:
            why += " that Pillow cannot decode here (convert them, for example to JPEG)"
        elif ending in _PACKED:
            why += " (unpack them)"
        yield f"{len(files):,} {printable(why)}, such as {printable(files[0])}"
    if rest := ordered[_ENDINGS_NAMED:]:
        yield f"{sum(len(files) for _, files in rest):,} of {len(rest)} other endings"
