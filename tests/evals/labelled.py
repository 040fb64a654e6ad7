"""Labelled images for tests of tasks: each class a colour of its own, plain but for a little noise."""

from pathlib import Path

import numpy as np
from PIL import Image

from ijepa_scale.data.images import open_images
from ijepa_scale.evals.evaluation import Labelled

COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220), (200, 200, 60))


def write_colours(root: Path, split: str, count: int, *, side: int = 20, seed: int = 0, noise: int = 30) -> None:
    """PNGs root/split/CLASS/NUMBER.png, classes in turn."""
    rng = np.random.default_rng((seed, len(split)))
    for i in range(count):
        folder = root / split / f"class-{i % len(COLOURS)}"
        folder.mkdir(parents=True, exist_ok=True)
        off = rng.integers(-noise, noise + 1, (side, side + 4, 3))
        pixels = np.clip(np.array(COLOURS[i % len(COLOURS)]) + off, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def labelled(root: Path, split: str = "train") -> Labelled:
    """All images of a folder of class folders."""
    images = open_images(str(root), split=split)
    column = images.label_columns()["label"]
    return Labelled(images, np.arange(len(images)), column.values, column.names)
