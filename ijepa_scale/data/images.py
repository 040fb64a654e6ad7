"""Images of any map-style source, by index. The only module that knows of HuggingFace `datasets`.

A source is a folder of Parquet files or one such file, a folder written by `save_to_disk` or holding .arrow files, a
folder of images in any tree, or the id of a data set on the HuggingFace Hub. Images stay encoded until `read`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ijepa_scale.data.folders import SPLIT_NAMES, FolderSplit, arrow_splits, image_splits, list_files, printable
from ijepa_scale.data.order import generator_for
from ijepa_scale.data.transforms import open_encoded, to_rgb

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)

SUBSTITUTE_SEED = 20230119  # fixed: the substitute of an image is a property of the data set, not of the run
MAX_SUBSTITUTES = 100
_MAX_CLASSES = 10_000  # an integer column with larger values holds ids, not classes


class BadImageError(ValueError):
    """An image cannot be read. The message names the sample and the reason."""

    def __init__(self, message: str, reason: str = "") -> None:  # DataLoader re-raises it with the message alone
        super().__init__(message)
        self.reason = reason or message


@dataclass(frozen=True)
class BadImage:
    index: int
    sample_id: str
    reason: str


@dataclass(frozen=True)
class LabelColumn:
    """names: of the classes. values: (num_images,) int64, indices into names, -1 where an image has no label."""

    name: str
    names: list[str]
    values: np.ndarray


class ImageSet:
    """Images of one split of any map-style source, by index. Can be pickled and used in forked workers."""

    def __init__(self, dataset: datasets.Dataset, column: str, *, name: str, split: str, min_side: int = 1) -> None:
        self.name, self.split, self.num_images = name, split, len(dataset)
        self._min_side = min_side
        self._dataset = dataset
        self._rows = dataset.select_columns([column]).with_format("arrow")  # a row is a slice: nothing is decoded

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int) -> Image.Image:
        """The image in RGB, upright. BadImageError if it cannot be decoded to the end or is smaller than min_side."""
        image = self._with_image(index, to_rgb)
        if min(image.size) < self._min_side:
            reason = f"{image.width} x {image.height} pixels, less than {self._min_side} a side"
            raise BadImageError(f"{self.name}: cannot use {self.sample_id(index)}: {reason}", reason)
        return image

    def read_or_substitute(self, index: int) -> tuple[Image.Image, tuple[BadImage, ...]]:
        """The image at `index`, or another in its place if that is bad, and every bad one met.

        Which one is a function of the data set and the index alone, so all ranks, workers and restarts agree.
        """
        rng = generator_for(SUBSTITUTE_SEED, index)
        bad: dict[int, BadImage] = {}
        candidate = index
        for _ in range(1 + MAX_SUBSTITUTES):
            if candidate not in bad:
                try:
                    return self.read(candidate), tuple(bad.values())
                except BadImageError as error:
                    bad[candidate] = BadImage(candidate, self.sample_id(candidate), error.reason)
            candidate = int(rng.random() * self.num_images)
        raise BadImageError(
            f"{self.name}: {bad[index].sample_id} is bad ({bad[index].reason}) and so are {MAX_SUBSTITUTES} random "
            f"images drawn in its place; check that the data set holds readable images"
        )

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) as stored, from the header alone."""
        return self._with_image(index, lambda image: image.size)

    def sample_id(self, index: int) -> str:
        """The path of the image where it is known, else e.g. "train[17]"."""
        path = self._encoded(index)[1]
        return printable(path) if path else f"{self.split}[{index}]"

    def label_columns(self) -> dict[str, LabelColumn]:
        """Columns of class labels by name, without decoding an image.

        These are the ClassLabel columns, and integer ones called label, labels or class if all values are below 10,000:
        the values number the classes, so that splits agree. A column without a single label is left out.
        """
        import datasets

        columns = {}
        for name, feature in self._dataset.features.items():
            is_class = isinstance(feature, datasets.ClassLabel)
            if is_class or (name in ("label", "labels", "class") and "int" in getattr(feature, "dtype", "")):
                column = self._dataset.select_columns([name]).with_format("arrow")[:].column(0)
                values = np.maximum(column.cast("int64").fill_null(-1).to_numpy(), -1)
                names = feature.names if is_class else [str(i) for i in range(min(values.max() + 1, _MAX_CLASSES))]
                if 0 <= values.max() < len(names):
                    columns[name] = LabelColumn(name, list(names), values)
        return columns

    def _encoded(self, index: int) -> tuple[bytes | None, str]:
        """(content of the file, its path): one of the two may be missing."""
        value = self._rows[int(index)].column(0)[0].as_py()
        return (value["bytes"], os.fsdecode(value["path"] or "")) if isinstance(value, dict) else (value, "")

    def _with_image(self, index: int, use: Callable[[Image.Image], Any]) -> Any:
        data, path = self._encoded(index)
        try:
            with open_encoded(path if data is None else data) as image:
                return use(image)
        except Exception as error:  # decoders raise whatever the bytes lead them to
            reason = f"{type(error).__name__}: {error}"
            raise BadImageError(f"{self.name}: cannot read {self.sample_id(index)}: {reason}", reason) from error


def open_images(source: str, *, split: str = "train", cache_dir: str | None = None, min_side: int = 1) -> ImageSet:
    """The images of one split of a source (see the top of this file). Labels are not needed.

    Parquet and Hub data are first copied to cache_dir (None or "": that of `datasets`), to be memory-mapped from there;
    let one process a node open them before the others do. min_side: pixels; images with a shorter side are bad.
    """
    splits = _splits(source, cache_dir)
    found = _find_split(list(splits), split, source)
    dataset = splits[found]()
    if len(dataset) == 0:
        raise ValueError(f"split {found!r} of {source!r} has no rows; it must hold at least one image")
    name = f"{os.path.basename(os.path.abspath(source))}:{found}"
    return ImageSet(dataset, _image_column(dataset, source), name=name, split=found, min_side=min_side)


def _find_split(splits: list[str], split: str, source: str) -> str:
    names = [name for name in splits if name == split]
    names += [name for name in splits if SPLIT_NAMES.get(name, name) == SPLIT_NAMES.get(split, split)]
    if not names:
        raise ValueError(f"{source!r} has no split {split!r}; it has: {', '.join(splits)}")
    return names[0]


def count_images(source: str, *, split: str = "train", cache_dir: str | None = None) -> int:
    """How many images a split of a folder has. Copies nothing: of Parquet files the footers tell."""
    import pyarrow.parquet

    if _inspect(source)[0] != "parquet":
        return len(open_images(source, split=split, cache_dir=cache_dir))
    files = _builder(source, cache_dir).config.data_files
    found = _find_split(list(files), split, source)
    return sum(pyarrow.parquet.read_metadata(str(file)).num_rows for file in files[found])


def splits_of(source: str, cache_dir: str | None = None) -> list[str]:
    """Names of the splits of a source, as `open_images` takes them. Copies and decodes nothing."""
    return list(_splits(source, cache_dir))


def bytes_needed(source: str, cache_dir: str | None = None) -> tuple[int, int]:
    """(bytes that opening the source will copy to the cache, bytes free there), the first estimated from file sizes.

    All splits are copied, whichever is asked for. 0 if they are cached already or can be memory-mapped in place.
    """
    copied = _inspect(source)[0] in ("parquet", "hub")
    return _cache_need(_builder(source, cache_dir) if copied else None, cache_dir)[:2]


def check_images(images: ImageSet, *, min_side: int, sample: int = 64) -> None:
    """ValueError if most of `sample` evenly spaced images cannot be opened, or one has a side under min_side pixels.

    Reads headers only. min_side: usually the patch size.
    """
    indices = np.unique(np.linspace(0, len(images) - 1, min(sample, len(images))).round().astype(int)).tolist()
    errors = []
    for index in indices:
        try:
            width, height = images.size(index)
        except BadImageError as error:
            errors.append(error)
            continue
        if min(width, height) < min_side:
            raise ValueError(
                f"{images.name}: {images.sample_id(index)} is {width} x {height} pixels, less than the patch size of "
                f"{min_side} a side; take such images out of the data, or use a smaller model.patch_size"
            )
    if 2 * len(errors) > len(indices):
        raise ValueError(
            f"{len(errors)} of {len(indices)} images sampled cannot be read, the first because: {errors[0]}; "
            f"check that data.source is the right one and its files are whole"
        ) from errors[0]


def _inspect(source: str) -> tuple[str, list[str]]:
    """The kind of a source (saved, parquet, arrow, images, hub), and its files, relative to its folder."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix in (".parquet", ".arrow"):
            return path.suffix[1:], [path.name]
        raise ValueError(f"{str(path.absolute())!r} is a single file; wants a .parquet or .arrow file, or a folder")
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "saved", []
        kind, files = max(list_files(str(path)).items(), key=lambda item: len(item[1]))
        if not files:
            raise ValueError(f"the folder {str(path.absolute())!r} holds no Parquet, Arrow or image files at any depth")
        return kind, files
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):  # nor has it the form of a Hub id
        raise ValueError(f"there is no folder {str(path.absolute())!r}; data.source must name an existing one")
    return "hub", []


def _splits(source: str, cache_dir: str | None) -> dict[str, Callable[[], datasets.Dataset]]:
    """The splits of a source, and how to load each."""
    import datasets

    kind, files = _inspect(source)
    path = Path(source).expanduser().absolute()
    if kind == "saved":
        if not any(path.rglob("*.arrow")):
            raise ValueError(f"{source!r} has no rows; it must hold at least one image")
        with _explained(f"cannot read {source!r}"):
            saved = datasets.load_from_disk(str(path))
        saved = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        return {str(name): functools.partial(saved.__getitem__, name) for name in saved}
    if kind == "arrow":
        root = str(path.parent if path.is_file() else path)
        return {split: functools.partial(_arrow_files, root, part) for split, part in arrow_splits(files).items()}
    if kind == "images":
        parts = image_splits(str(path), files)
        return {split: functools.partial(_image_files, str(path), part) for split, part in parts.items()}
    builder = _builder(source, cache_dir)
    names = builder.config.data_files or builder.info.splits or {}
    return {str(name): functools.partial(_prepare, builder, str(name), source, cache_dir) for name in names}


def _arrow_files(root: str, files: list[str]) -> datasets.Dataset:
    import datasets

    with _explained(f"cannot read the .arrow files of {root!r}"):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(os.path.join(root, file)) for file in files])


def _image_files(root: str, split: FolderSplit) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    paths = [os.fsencode(os.path.join(root, file)) for file in split.files]  # bytes: a name need not be UTF-8
    arrays = [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.large_binary())]
    columns = {"image": pa.StructArray.from_arrays(arrays, ["bytes", "path"])}
    features: dict[str, Any] = {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("large_binary")}}
    if split.classes:
        columns["label"] = pa.array(split.labels(), type=pa.int64())
        features["label"] = datasets.ClassLabel(names=[printable(name) for name in split.classes])
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(pa.table(columns), info=info, fingerprint="folder")  # else it hashes all of the paths


def _builder(source: str, cache_dir: str | None) -> Any:
    """The `datasets` builder of Parquet or Hub data."""
    import datasets

    path = Path(source).expanduser().absolute()
    missing = "" if path.exists() else f" on the Hub, and there is no folder {str(path)!r} either"
    with _explained(f"cannot open {source!r}{missing}"):
        if path.is_file():
            return datasets.load_dataset_builder("parquet", data_files=str(path), cache_dir=cache_dir or None)
        return datasets.load_dataset_builder(str(path) if path.is_dir() else source, cache_dir=cache_dir or None)


def _prepare(builder: Any, split: str, source: str, cache_dir: str | None) -> datasets.Dataset:
    """Copies the data to the cache unless it is there, and maps one split."""
    import pyarrow.parquet

    needed, free, folder = _cache_need(builder, cache_dir)
    sizes = f"{source!r} needs about {needed / 1e9:.3f} GB in the cache {folder}, which has {free / 1e9:.3f} GB free"
    if needed > free:
        raise ValueError(f"{sizes}; make room there, or set data.cache_dir to a folder on a larger disk")
    if needed:
        _log.info("%s; copying", sizes)
    with _explained(f"cannot read {source!r}"):
        for file in _local_files(builder) if needed else []:
            if pyarrow.parquet.read_metadata(file).num_rows == 0:  # `datasets` fails on it, and does not say why
                raise ValueError(f"{file} has no rows; remove it")
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def _local_files(builder: Any) -> list[str]:
    files = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    return [file for file in files if os.path.isfile(file)]


def _cache_need(builder: Any, cache_dir: str | None) -> tuple[int, int, str]:
    """(bytes that builder, if any, has yet to copy to the cache, bytes free there, the cache folder)."""
    import datasets

    folder = Path(cache_dir or str(datasets.config.HF_DATASETS_CACHE)).expanduser().absolute()
    free = shutil.disk_usage(next(part for part in (folder, *folder.parents) if part.exists())).free
    if builder is None or os.path.isdir(builder.cache_dir):
        return 0, free, str(folder)
    local = sum(os.path.getsize(file) for file in _local_files(builder))
    return local or (builder.info.download_size or 0) + (builder.info.dataset_size or 0), free, str(folder)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns any error into a ValueError that says what failed, and why: `datasets` hides that at the end of a chain."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"{what}: {type(cause).__name__}: {cause}") from error


def _image_column(dataset: datasets.Dataset, source: str) -> str:
    """The column of images, by its type: `Image`, else bytes. Of several, "image" or the first."""
    import datasets

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    columns = columns or [name for name, feature in dataset.features.items() if _holds_images(dataset, name, feature)]
    if not columns:
        types = ", ".join(f"{name} ({feature})" for name, feature in dataset.features.items())
        raise ValueError(f"{source!r} has no column of images; its columns are: {types}")
    chosen = "image" if "image" in columns else columns[0]
    if len(columns) > 1:
        _log.warning("%s has several columns of images (%s); reading %r", source, ", ".join(columns), chosen)
    return chosen


def _holds_images(dataset: datasets.Dataset, column: str, feature: Any) -> bool:
    if isinstance(feature, dict):  # how `Image` is stored: what is in it may be bad here and there
        return {"bytes", "path"} <= feature.keys()
    if getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        return False
    images = ImageSet(dataset, column, name="", split="")
    for index in range(0, len(images), -(-len(images) // 16)):
        with contextlib.suppress(BadImageError):  # the next may be an image
            return bool(images.size(index))
    return False
