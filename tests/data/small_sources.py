"""Small sources of every kind, whose images tell which they are."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ijepa_scale.data.decoding import USUAL, decode
from ijepa_scale.data.streams.samples import preview_images

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def picture(number: int) -> Image.Image:
    """10 x 8 pixels of a colour that `number_of` reads."""
    return Image.new("RGB", (10, 8), (number // 250, number % 250, 77))


class Whole:
    """In the place of a crop: all of an image, (height, width, 3) uint8."""

    def of(self, file, limits=USUAL):
        return np.asarray(decode(file, limits))


WHOLE = Whole()


def number_of(image) -> int:
    red, green, _ = np.asarray(image)[4, 4]
    return int(red) * 250 + int(green)


def photo(width, height, seed=0):
    """Smooth colours with sharp edges and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([128 + 100 * np.sin(x / 7), 255 * y / height, 255 * ((x // 9 + y // 5) % 2)], -1)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8))


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, numbers: range, group: int = 4, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers]
    pq.write_table(pa.table({"image": pa.array(images, IMAGE), **columns}), path, row_group_size=group)
    return path


def write_tar(path: Path, numbers: range, mode: str = "w", label: bool = False) -> Path:
    """Each sample with a mask that comes after its image, and perhaps a label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for i in numbers:
            files = {"json": b"{}", "png": encoded(i), "seg.png": encoded(999)}
            if label:
                files["cls"] = str(i % 3).encode()
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{'long/' * (30 * (i % 2))}{i:04}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_images(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (folder / f"{i:04}.png").write_bytes(encoded(i))
    return folder


def save_to_disk(path: Path, numbers: range, shards: int = 3) -> Path:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "cow"])})
    columns = {
        "image": [{"bytes": encoded(i), "path": None} for i in numbers],
        "label": [i % 3 for i in numbers],
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(path, num_shards=shards)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_noise_tar(path: Path, numbers: range) -> Path:
    """Images large enough to train on, each with a name of its own."""
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            pixels = np.random.default_rng(i).integers(0, 256, (36 + i % 9, 40, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            info = tarfile.TarInfo(f"{i:04}.png")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    return path


def count_images(source: str, **options) -> int:
    """As --dry-run counts them, without a copy."""
    return preview_images(source, **options).num_images
