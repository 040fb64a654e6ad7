"""A trained run + images -> embeddings on disk, and the nearest neighbours among them."""

import csv
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ijepa_scale.data.images import BadImageError, ImageSet, decode, open_images, reason_of
from ijepa_scale.data.sources.folders import printable
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.evals.extract import pooled_features
from ijepa_scale.exchange.run import load_run
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.visualize.neighbours import draw_neighbours

EMBEDDINGS, IMAGES, FACTS = "embeddings.npy", "images.csv", "embeddings.json"


@dataclass(frozen=True)
class _Crops(Dataset):
    """Item i: the centre of image i, (3, size, size) uint8, or why it cannot be read."""

    images: ImageSet
    size: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return torch.from_numpy(center_crop(self.images.read(index), self.size))
        except BadImageError as error:
            return error.reason


def embed(
    run: str,
    source: str,
    out: str,
    *,
    split: str = "train",
    batch_size: int = 64,
    workers: int = 2,
    cache_dir: str = "",
    column: str = "",
    config: str = "",
) -> None:
    """Average-pooled target-encoder features of every readable image of a source, to the folder `out`.

    embeddings.npy: (images, width) float32. images.csv: for each row the image's index in the source, its path or name,
    and its label where there is one. embeddings.json: what made them, and the images that could not be read.
    column, config: as of `open_images`.
    """
    from rich.progress import track

    encoder, trained, found = load_run(run)
    images = open_images(source, split=split, cache_dir=cache_dir or None, column=column, config=config)
    size = trained.data.image_size
    print(f"{images.name}: {len(images):,} images -> {encoder.size.width} numbers each, by {found.path}", flush=True)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{EMBEDDINGS}.partial"
    # On disk from the start: the embeddings of a large source need not fit into memory.
    rows = np.lib.format.open_memmap(partial, "w+", np.float32, (len(images), encoder.size.width))
    kept: list[int] = []
    unreadable: dict[str, str] = {}
    loader = DataLoader(_Crops(images, size), batch_size=batch_size, num_workers=workers, collate_fn=list)
    for number, batch in enumerate(track(loader, description="embedding", disable=len(images) < batch_size)):
        crops = []
        for index, crop in enumerate(batch, start=number * batch_size):
            if isinstance(crop, str):
                unreadable[images.sample_id(index)] = crop
            else:
                kept.append(index)
                crops.append(crop)
        if crops:
            rows[len(kept) - len(crops) : len(kept)] = pooled_features(encoder, [torch.stack(crops)]).numpy()
    if not kept:
        partial.unlink()
        raise ValueError(f"none of the {len(images)} images can be read, the first: {next(iter(unreadable.items()))}")
    np.save(folder / EMBEDDINGS, rows[: len(kept)])
    partial.unlink()
    _write_images(folder / IMAGES, images, kept)
    facts = {
        "run": str(Path(run).absolute()),
        "checkpoint": str(found.path.absolute()),
        "checkpoint_sha256": found.manifest["sha256"],
        "step": found.step,
        "source": str(Path(source).absolute()) if Path(source).exists() else source,
        "split": images.split,
        "cache_dir": cache_dir,
        "column": column,
        "config": config,
        "image_size": size,
        "unreadable": unreadable,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name, reason in list(unreadable.items())[:10]:
        print(f"warning: left out: cannot read {name}: {reason}")
    print(f"{len(kept):,} embeddings, {len(unreadable)} unreadable images: {folder}/{EMBEDDINGS}, {IMAGES}, {FACTS}")


def _write_images(path: Path, images: ImageSet, kept: list[int]) -> None:
    labels = images.label_columns()
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "image", *labels])
        for index in kept:
            named = [c.names[c.values[index]] if c.values[index] >= 0 else "" for c in labels.values()]
            writer.writerow([index, images.sample_id(index), *named])


def neighbours(folder: str, queries: list[str], out: str, *, count: int = 8) -> None:
    """Print, and draw to `out`, the nearest images of an embed() folder to query image files (none: some of its own).

    Nearest by the cosine between features less their mean over the folder: what all images share says nothing.
    """
    if not (Path(folder) / FACTS).is_file():
        raise ValueError(f"{folder} holds no embeddings ({FACTS} is missing); make them with launch/embed.py")
    facts = json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))
    features = np.load(Path(folder) / EMBEDDINGS).astype(np.float32)
    with open(Path(folder) / IMAGES, encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    images = open_images(
        facts["source"],
        split=facts["split"],
        cache_dir=facts["cache_dir"] or None,
        column=facts.get("column", ""),  # not in older ones
        config=facts.get("config", ""),
    )
    mean = features.mean(axis=0)
    unit = _unit(features - mean)
    shown = []
    for name, picture, own, query in _queries(queries, facts, features, images, table):
        similarity = unit @ _unit(query - mean)
        itself = _file_at(os.path.abspath(name) if queries else name)
        others = (
            row
            for row in np.argsort(-similarity, kind="stable").tolist()
            if row != own and (itself is None or _file_at(table[row]["image"]) != itself)
        )
        order = list(itertools.islice(others, max(0, count)))
        print(f"{printable(name)}:")
        for row in order:
            print(f"  {similarity[row]:.3f}  {table[row]['image']}")
        nearest = [(_picture(images, table[row], facts["image_size"]), f"{similarity[row]:.2f}") for row in order]
        shown.append((picture, printable(Path(name).name), nearest))
    draw_neighbours(out, shown)
    print(f"picture: {out}")


def _file_at(path: str) -> tuple[int, int] | None:
    """The same for all paths to a file, by links of any kind; None for what is no path, as a name in a tar."""
    if not os.path.isabs(path) or not os.path.exists(path):
        return None
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _encoder_of(facts: dict[str, Any]) -> VisionTransformer:
    """The encoder that made the embeddings: another one's features are no neighbours of theirs."""
    path = Path(facts["checkpoint"])
    advice = (
        f"a query needs it: embed {facts['source']} again with launch/embed.py {facts['run']}, or leave out --query"
    )
    if not (path / checkpoints.MANIFEST).is_file():
        raise ValueError(f"the checkpoint of these embeddings, {path}, is no longer there: a run keeps few; {advice}")
    encoder, _, found = load_run(path)
    if facts.get("checkpoint_sha256", found.manifest["sha256"]) != found.manifest["sha256"]:
        raise ValueError(f"the checkpoint of these embeddings, {path}, has been replaced by another one; {advice}")
    return encoder


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def _picture(images: ImageSet, row: dict[str, str], size: int) -> np.ndarray:
    """The image that a row of images.csv is of."""
    index = int(row["index"])
    if index >= len(images) or images.sample_id(index) != row["image"]:  # what is there now is another image
        raise ValueError(
            f"{images.name} has changed since it was embedded: image {index} is no longer {row['image']}; run "
            "launch/embed.py again"
        )
    return center_crop(images.read(index), size)


def _queries(
    paths: list[str], facts: dict[str, Any], features: np.ndarray, images: ImageSet, table: list[dict[str, str]]
) -> Iterator[tuple[str, np.ndarray, int, np.ndarray]]:
    """(name, pixels, row among the embeddings or -1, features) of each query."""
    size = facts["image_size"]
    if not paths:
        for row in np.unique(np.linspace(0, len(table) - 1, 6).round().astype(int)).tolist():
            yield table[row]["image"], _picture(images, table[row], size), row, features[row]
        return
    encoder = _encoder_of(facts)
    rows = {row["image"]: number for number, row in enumerate(table)}
    for path in paths:
        try:
            crop = center_crop(decode(path), size)
        except Exception as error:  # decoders raise whatever the bytes lead them to
            raise ValueError(f"cannot read the query {printable(path)}: {reason_of(error)}") from error
        vector = pooled_features(encoder, [torch.from_numpy(crop)[None]]).numpy()[0]
        yield path, crop, rows.get(printable(str(Path(path).absolute())), -1), vector
