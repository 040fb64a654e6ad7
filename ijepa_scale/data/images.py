"""Images of any source (sources/), by index. They stay encoded until they are read or cropped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ijepa_scale.data.decoding import (
    MAX_PIXELS,
    USUAL,
    BadImageError,
    Limits,
    decode,
    reason_of,
    stored_size,
)
from ijepa_scale.data.order import generator_for, image_at
from ijepa_scale.data.sources.columns import preferred, say_chosen, standing
from ijepa_scale.data.sources.folders import printable
from ijepa_scale.data.sources.inspection import find_split
from ijepa_scale.data.sources.splits import map_splits
from ijepa_scale.data.sources.tars import read_member
from ijepa_scale.data.transforms import RandomCrop

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)

SUBSTITUTE_SEED = 20230119  # fixed: the substitute of an image is a property of the data set, not of the run
MAX_SUBSTITUTES = 100
_DIGESTED = 256  # images by whose contents data sets are told apart
_MAX_CLASSES = 10_000  # an integer column with larger values holds ids, not classes


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

    def __init__(
        self,
        dataset: datasets.Dataset,
        column: str,
        *,
        name: str,
        split: str,
        limits: Limits = USUAL,
        num_images: int = 0,
    ) -> None:
        """num_images: that the rows stand for, each for those of the indices next to its own; 0: they are all."""
        self.name, self.split, self.num_images = name, split, num_images or len(dataset)
        self.limits = limits
        self._dataset = dataset
        self._rows = dataset.select_columns([column]).with_format("arrow")  # a row is a slice: nothing is decoded

    def __len__(self) -> int:
        return self.num_images

    def image_at(self, seed: int, step: int, position: int, *, global_batch_size: int) -> int:
        """Index of the image at a position of the global batch of a step."""
        return image_at(seed, step, position, num_images=self.num_images, global_batch_size=global_batch_size)

    def read(self, index: int) -> Image.Image:
        """The image in RGB, upright. BadImageError if it cannot be decoded to the end or is smaller than min_side."""
        with self._naming(index):
            return decode(self._file(index), self.limits)

    def crop(self, index: int, crop: RandomCrop) -> np.ndarray:
        """A crop of the image, (3, size, size) uint8. BadImageError as of read(), of what the crop needs of it."""
        with self._naming(index):
            return crop.of(self._file(index), self.limits)

    def crop_or_substitute(self, index: int, crop: RandomCrop) -> tuple[np.ndarray, tuple[BadImage, ...]]:
        """The crop of the image at `index`, or of another in its place if that is bad, and every bad one met.

        Which one is a function of the data set and the index alone, so all ranks, workers and restarts agree.
        """
        rng = generator_for(SUBSTITUTE_SEED, index)
        bad: dict[int, BadImage] = {}
        candidate = index
        for _ in range(1 + MAX_SUBSTITUTES):
            if candidate not in bad:
                try:
                    return self.crop(candidate, crop), tuple(bad.values())
                except BadImageError as error:
                    bad[candidate] = BadImage(candidate, self.sample_id(candidate), error.reason)
            candidate = int(rng.random() * self.num_images)
        raise BadImageError(
            f"{self.name}: {bad[index].sample_id} is bad ({bad[index].reason}) and so are {MAX_SUBSTITUTES} random "
            f"images drawn in its place; check that the data set holds readable images"
        )

    def content(self, index: int) -> bytes:
        """The image's file as it is stored."""
        with self._naming(index):
            file = self._file(index)
            return file if isinstance(file, bytes) else Path(file).read_bytes()

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) as stored, from the header alone."""
        with self._naming(index):
            return stored_size(self._file(index), self.limits)

    def sample_id(self, index: int) -> str:
        """The path of the image where it is known, else e.g. "train[17]"."""
        value = self._value(index)
        path = os.fsdecode(value.get("path") or "") if isinstance(value, dict) else ""
        return printable(path) if path else f"{self.split}[{index}]"

    def label_columns(self) -> dict[str, LabelColumn]:
        """Columns of class labels by name, without decoding an image.

        These are the ClassLabel columns, and integer ones called label, labels or class if all values are below 10,000:
        the values number the classes, so that splits agree. A column without a single label is left out.
        """
        import datasets
        import pyarrow.compute as pc

        columns = {}
        for name, feature in self._dataset.features.items():
            if is_label(name, feature):
                column = self._dataset.select_columns([name]).with_format("arrow")[:].column(0)
                largest = pc.max(column).as_py()  # of any integers: not all fit into int64
                known = (feature.names or []) if isinstance(feature, datasets.ClassLabel) else range(_MAX_CLASSES)
                if largest is not None and 0 <= largest < len(known):
                    names = known if isinstance(known, list) else [str(i) for i in range(largest + 1)]
                    values = np.maximum(column.cast("int64").fill_null(-1).to_numpy(), -1)
                    columns[name] = LabelColumn(name, list(names), values)
        return columns

    def column_types(self) -> dict[str, str]:
        """The columns beside the images, and their types in words."""
        kinds = self._dataset.features.items()
        images = self._rows.column_names
        return {name: getattr(kind, "dtype", type(kind).__name__) for name, kind in kinds if name not in images}

    def classes(self, name: str) -> LabelColumn:
        """Any column of classes, whole numbers or words as classes of their own. ValueError for one of another type."""
        import datasets
        import pyarrow as pa
        import pyarrow.compute as pc

        if name in (known := self.label_columns()) and isinstance(self._dataset.features[name], datasets.ClassLabel):
            return known[name]
        values = self._column(name)
        kind = values.type
        if not any(
            fits(kind)
            for fits in (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
        ):
            raise ValueError(f"the column {name!r} of {self.name} is of {kind}; classes are whole numbers or words")
        if is_label(name, self._dataset.features[name]):
            values = pc.if_else(pc.less(values, 0), None, values)  # -1: no label
        encoded = values.dictionary_encode().combine_chunks()
        found = encoded.dictionary.to_pylist()
        order = sorted(range(len(found)), key=found.__getitem__)
        places = np.full(len(found) + 1, -1)
        places[order] = np.arange(len(found))  # and of -1, where an image has no value, still -1
        rows = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return LabelColumn(name, [str(found[place]) for place in order], places[rows].astype(np.int64))

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, (num_images,) float64, NaN where an image has none. ValueError for one of others."""
        import pyarrow as pa

        values = self._column(name)
        if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
            raise ValueError(f"the column {name!r} of {self.name} is of {values.type} and holds no numbers")
        return values.cast("float64").fill_null(np.nan).to_numpy()

    def scalar_features(self) -> dict[str, Any]:
        """The columns of single numbers, words and classes beside the images, as `datasets` describes them."""
        import datasets
        import pyarrow as pa

        def scalar(kind: Any) -> bool:
            binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
            return isinstance(kind, datasets.ClassLabel | datasets.Value) and not any(of(kind.pa_type) for of in binary)

        features = self._dataset.features
        return {name: features[name] for name in self.column_types() if scalar(features[name])}

    def rows(self, indices: list[int], columns: list[str]) -> Any:
        """A table of these columns of some images. It decodes nothing."""
        return self._dataset.select_columns(columns).with_format("arrow")[indices]

    def _column(self, name: str) -> Any:
        if name not in (types := self.column_types()):
            known = ", ".join(f"{column} ({kind})" for column, kind in types.items()) or "none beside the images"
            raise ValueError(f"{self.name} has no column {name!r}; it has: {known}")
        return self._dataset.select_columns([name]).with_format("arrow")[:].column(0)

    @functools.cached_property
    def digest(self) -> str:
        """Tells data sets apart: by how many images there are, and by names and contents of 256, evenly spaced.

        An image that is replaced in its place among many more may go unnoticed.
        """
        digest = hashlib.sha256(f"{self.split} {self.num_images}".encode())
        for index in np.unique(np.linspace(0, self.num_images - 1, _DIGESTED).round().astype(int)).tolist():
            digest.update(self.sample_id(index).encode(errors="surrogateescape"))
            with contextlib.suppress(BadImageError):  # what cannot be read has no content
                digest.update(self.content(index))
        return digest.hexdigest()

    def _value(self, index: int) -> Any:
        row = int(index) * len(self._rows) // self.num_images
        return self._rows[row].column(0)[0].as_py()

    def _file(self, index: int) -> bytes | str:
        """The content or the path of an image as it is stored."""
        value = self._value(index)
        if not isinstance(value, dict):
            return value
        if "tar" in value:
            return read_member(value["tar"], value["offset"], value["size"])
        return os.fsdecode(value.get("path") or "") if value["bytes"] is None else value["bytes"]

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Whatever goes wrong within becomes a BadImageError that names the image."""
        try:
            yield
        except Exception as error:  # decoders raise whatever the bytes lead them to
            reason = reason_of(error)
            raise BadImageError(f"{self.name}: cannot read {self.sample_id(index)}: {reason}", reason) from error


def open_images(
    source: str,
    *,
    split: str = "train",
    cache_dir: str | None = None,
    min_side: int = 1,
    max_pixels: int = MAX_PIXELS,
    column: str = "",
    config: str = "",
) -> ImageSet:
    """The images of one split of a source (sources/ says of which kinds). Labels are not needed.

    Parquet and Hub data are first copied to cache_dir (None or "": that of `datasets`), to be memory-mapped from there;
    let one process a node open them before the others do. min_side, max_pixels: as of Limits. column: of the images, or
    their ending in tars; "": the likeliest. config: of the data set, where it has several.
    """
    kind, splits = map_splits(source, cache_dir, column=column, config=config)
    found = find_split(list(splits), split, source)
    dataset = splits[found]()
    if len(dataset) == 0:
        raise ValueError(f"split {found!r} of {source!r} has no rows; it must hold at least one image")
    name = f"{os.path.basename(os.path.abspath(source))}:{found}"
    if kind in ("tar", "table"):
        column = ""  # the rows are those of the column by now
    limits = Limits(min_side, max_pixels)
    return ImageSet(dataset, image_column(dataset, source, column), name=name, split=found, limits=limits)


def open_file(path: str, *, name: str, max_pixels: int = MAX_PIXELS, num_images: int = 0) -> ImageSet:
    """The images of one Arrow file. name: of what they are a part of, as "source:split". num_images: as of ImageSet."""
    import datasets

    dataset = datasets.Dataset.from_file(path)
    column, split, limits = image_column(dataset, path), name.rpartition(":")[2], Limits(max_pixels=max_pixels)
    return ImageSet(dataset, column, name=name, split=split, limits=limits, num_images=num_images)


def splits_of(source: str, cache_dir: str | None = None, *, column: str = "", config: str = "") -> list[str]:
    """Names of the splits of a source, as `open_images` takes them. Copies and decodes nothing."""
    return list(map_splits(source, cache_dir, column=column, config=config)[1])


def check_images(images: ImageSet, *, min_side: int, sample: int = 64) -> None:
    """ValueError if most of `sample` evenly spaced images cannot be opened or have a side under min_side pixels.

    Reads headers only. min_side: usually the patch size.
    """
    indices = np.unique(np.linspace(0, len(images) - 1, min(sample, len(images))).round().astype(int)).tolist()
    errors, limits = [], Limits(min_side)
    for index in indices:
        try:
            limits.check_side(images.size(index))
        except BadImageError as error:
            errors.append((index, error))
    if 2 * len(errors) > len(indices):
        index, first = errors[0]
        raise ValueError(
            f"{images.name}: {len(errors)} of {len(indices)} images sampled cannot be used, the first, "
            f"{images.sample_id(index)}, because: {first.reason}; check that it is the right source and its files are "
            "whole; if they are small, use a smaller model.patch_size"
        ) from first


def is_label(name: str, feature: Any) -> bool:
    """Whether a column holds class labels, or numbers that may be."""
    import datasets
    import pyarrow as pa

    number = isinstance(feature, datasets.Value) and pa.types.is_integer(feature.pa_type)
    return isinstance(feature, datasets.ClassLabel) or (number and name.lower() in ("label", "labels", "class"))


def image_column(dataset: datasets.Dataset, source: str, column: str = "") -> str:
    """The column of images, by its type: `Image`, else bytes. Of several the one that is likeliest by its name.

    column: that the user gave. ValueError where it is not there or cannot hold images.
    """
    import datasets

    features = dataset.features
    kinds = {
        name: feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        for name, feature in features.items()
    }
    types = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())  # not the names of a hundred classes
    if column:
        feature = features.get(column)
        if feature is None:
            raise ValueError(f"{source!r} has no column {column!r} (data.column); its columns are: {types}")
        if not isinstance(feature, datasets.Image) and not _stores_bytes(feature):
            raise ValueError(f"the column {column!r} of {source!r} holds no images; its columns are: {types}")
        return column
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns or standing(preferred(columns)) > standing("x"):  # all are masks by their names
        columns += [name for name in features if name not in columns and _holds_images(dataset, name)]
    if not columns:
        raise ValueError(f"{source!r} has no column of images; its columns are: {types}")
    chosen = preferred(columns)
    if len(columns) > 1:
        say_chosen(source, columns, chosen)
    return chosen


def _stores_bytes(feature: Any) -> bool:
    stored = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(stored, "dtype", None) in ("binary", "large_binary")


def _holds_images(dataset: datasets.Dataset, column: str) -> bool:
    feature = dataset.features[column]
    if isinstance(feature, dict) and {"bytes", "path"} <= feature.keys():
        return True  # how `Image` is stored: what is in it may be bad here and there
    if not _stores_bytes(feature):
        return False
    images = ImageSet(dataset, column, name="", split="")
    for index in range(0, len(images), -(-len(images) // 16)):
        with contextlib.suppress(BadImageError):  # the next may be an image
            return bool(images.size(index))
    return False
