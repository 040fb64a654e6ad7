"""Features of an image set in a folder, which image each is of, and the nearest neighbours among them."""

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ijepa_scale.data.decoding import decode, reason_of
from ijepa_scale.data.files import read_array, write_whole
from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.sources.folders import printable
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.evals.extract import extract, pooled
from ijepa_scale.evals.stores import forget_half
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.vit import VisionTransformer

EMBEDDINGS, IMAGES, FACTS = "embeddings.npy", "images.csv", "embeddings.json"
PATCHES = "embeddings.patches.npy"
NAMES = 1000  # of images, by which a half of another list of images is told
OWN_QUERIES = 6  # shown where none is asked for


def embed(
    encoder: VisionTransformer,
    images: ImageSet,
    folder: Path,
    facts: dict[str, Any],
    *,
    image_size: int,
    batch_size: int,
    workers: int,
    layers: Sequence[int] = (),
    patches: bool = False,
    say: Callable[[str], None] = lambda text: None,
    watch: Callable[[Iterable], Iterable] = iter,
) -> tuple[int, dict[str, str]]:
    """Average-pooled features of every readable image, to a folder; how many there are, and why others are left out.

    embeddings.npy: (images, width) float32; with layers those blocks' outputs side by side, (images, layers * width),
    as pooled() has them. patches: also embeddings.patches.npy, (images, patches, the same width), row by row of the
    patch grid. images.csv: for each row the image's index in the source, its path or name, and its label where there is
    one. embeddings.json: facts, image_size, layers, the patch grid, and the images that could not be read.
    What was stopped is gone on with where the folder has the half of a call of the same facts. The rest is as of
    extract(). Raises BadImageError, and leaves no file, where none can be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)  # written last: a folder that has it is whole
    said = {**facts, "image_size": image_size, "layers": list(layers)}
    if patches:
        said["patches"] = dict(zip(("rows", "columns"), _grid(encoder, image_size).shape, strict=True))
    else:
        (folder / PATCHES).unlink(missing_ok=True)  # of an earlier call, whose rows are others
    extracted = extract(
        {Path(EMBEDDINGS).stem: encoder},
        images,
        image_size=image_size,
        batch_size=batch_size,
        workers=workers,
        blocks=layers,
        patches=patches,
        folder=folder,
        facts={**said, "device": str(encoder.norm.weight.device), "names": _some_names(images)},
        say=say,
        watch=watch,
    )
    unreadable = {images.sample_id(index): reason for index, reason in extracted.unreadable.items()}
    _write_images(folder / IMAGES, images, extracted.indices)
    write_whole(folder / FACTS, json.dumps({**said, "unreadable": unreadable}, indent=2) + "\n")
    forget_half(folder)
    return len(extracted.indices), unreadable


def check_layers(encoder: VisionTransformer, layers: Sequence[int]) -> None:
    """Raise ValueError for a block that an encoder does not have."""
    depth = encoder.size.depth
    if wrong := [layer for layer in layers if not -depth <= layer < depth]:
        raise ValueError(
            f"--layers {' '.join(map(str, wrong))}: the encoder has {depth} blocks; give numbers of 0..{depth - 1}, or "
            f"from the end of -{depth}..-1"
        )


def patch_bytes(encoder: VisionTransformer, images: int, image_size: int, layers: Sequence[int]) -> int:
    """What embeddings.patches.npy takes on the disk."""
    return 4 * images * _grid(encoder, image_size).num_patches * encoder.size.width * max(1, len(layers))


def _grid(encoder: VisionTransformer, image_size: int) -> PatchGrid:
    return PatchGrid.of_image(image_size, image_size, encoder.patch_embed.patch_size)


def _some_names(images: ImageSet) -> list[str]:
    """Of images all over a source: another list of images, though of as many, has others there."""
    chosen = np.unique(np.linspace(0, max(0, len(images) - 1), NAMES).round().astype(int)).tolist()
    return [images.sample_id(index) for index in chosen[: len(images)]]


def _write_images(path: Path, images: ImageSet, kept: np.ndarray) -> None:
    labels = images.label_columns()
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "image", *labels])
        for index in map(int, kept):
            named = [c.names[c.values[index]] if c.values[index] >= 0 else "" for c in labels.values()]
            writer.writerow([index, images.sample_id(index), *named])


@dataclass(frozen=True)
class Query:
    """An image to look up: its pixels, (3, S, S) uint8, and its features, (D,). row: among the embeddings, or -1."""

    name: str
    pixels: np.ndarray
    features: np.ndarray
    row: int
    file: tuple[int, int] | None  # the one that it is in


@dataclass(frozen=True)
class Embeddings:
    """A folder that embed() wrote. features: (n, D) float32. table: the rows of images.csv, by column."""

    features: np.ndarray
    table: list[dict[str, str]]
    facts: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Embeddings":
        """ValueError where there are none, and where they are damaged."""
        if not (folder / FACTS).is_file():
            raise ValueError(f"{folder} holds no embeddings ({FACTS} is missing); make them with ijepa-scale embed")
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            with open(folder / IMAGES, encoding="utf-8", newline="") as file:
                table = list(csv.DictReader(file))
            features = np.array(read_array(folder / EMBEDDINGS), np.float32)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{folder}: {error}; make them anew with ijepa-scale embed") from error
        if not isinstance(facts, dict) or features.ndim != 2 or len(features) != len(table):
            raise ValueError(
                f"{folder}: {EMBEDDINGS} and {IMAGES} are not of one run; make them with ijepa-scale embed"
            )
        return cls(features, table, facts)

    @cached_property
    def _mean(self) -> np.ndarray:
        return self.features.mean(axis=0)

    @cached_property
    def _units(self) -> np.ndarray:
        return _unit(self.features - self._mean)

    def nearest(self, query: Query, count: int) -> list[tuple[int, float]]:
        """(row, similarity) of the nearest images, none of which is the query itself, the nearest first.

        Nearest by the cosine between features less their mean over the folder: what all images share says nothing.
        """
        similarity = self._units @ _unit(query.features - self._mean)
        others = (
            row
            for row in np.argsort(-similarity, kind="stable").tolist()
            if row != query.row and (query.file is None or _file_at(self.table[row]["image"]) != query.file)
        )
        return [(row, float(similarity[row])) for row in itertools.islice(others, max(0, count))]

    def row_of(self, query: Query) -> int:
        """Where a query is among the images, by its file where another path leads to it; -1: nowhere."""
        if query.row >= 0 or query.file is None:
            return query.row
        return next((row for row, one in enumerate(self.table) if _file_at(one["image"]) == query.file), -1)

    def picture(self, row: int, images: ImageSet) -> np.ndarray:
        """The centre of the image that a row is of. images: those that were embedded; ValueError if they have changed.

        What is at its index now may be another image.
        """
        index, name = int(self.table[row]["index"]), self.table[row]["image"]
        if index >= len(images) or images.sample_id(index) != name:
            raise ValueError(
                f"{images.name} has changed since it was embedded: image {index} is no longer {name}; run "
                "ijepa-scale embed again"
            )
        return center_crop(images.read(index), self.facts["image_size"])

    def own_queries(self, images: ImageSet) -> Iterator[Query]:
        """Some of the images themselves, evenly spaced. images, errors: as of picture()."""
        for row in np.unique(np.linspace(0, len(self.table) - 1, OWN_QUERIES).round().astype(int)).tolist():
            name = self.table[row]["image"]
            yield Query(name, self.picture(row, images), self.features[row], row, _file_at(name))

    def file_queries(self, paths: Sequence[str], encoder: nn.Module) -> Iterator[Query]:
        """Image files. encoder: the one that made the embeddings. ValueError for a file that cannot be read."""
        rows = {row["image"]: number for number, row in enumerate(self.table)}
        for path in paths:
            try:
                crop = center_crop(decode(path), self.facts["image_size"])
            except Exception as error:  # decoders raise whatever the bytes lead them to
                raise ValueError(f"cannot read the query {printable(path)}: {reason_of(error)}") from error
            features = pooled(encoder, torch.from_numpy(crop)[None], self.facts.get("layers", ())).numpy()[0]
            absolute = os.path.abspath(path)
            yield Query(path, crop, features, rows.get(printable(str(Path(path).absolute())), -1), _file_at(absolute))


def _file_at(path: str) -> tuple[int, int] | None:
    """The same for all paths to a file, by links of any kind; None for what is no path, as a name in a tar."""
    if not os.path.isabs(path) or not os.path.exists(path):
        return None
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
