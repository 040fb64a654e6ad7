"""Data and a config that several tests share."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests import processes

# An 8 x 8 patch grid, 8 steps an epoch of the 64 images below, 12 steps: every run crosses an epoch's end.
SMALL_CONFIG = """\
data: {source: %s, image_size: 32, crop_scale: [0.5, 1.0], workers: 0}
model: {name: vit_tiny, patch_size: 4, width: 32, depth: 2, heads: 2}
predictor: {width: 16, depth: 1}
mask: {min_keep: 2}
optimization: {global_batch_size: 8, max_steps: 12, epochs: 4, warmup_epochs: 1, lr: 1e-3, ema: [0.9, 1.0]}
checkpoint: {every_steps: 4}
logging: {health_every_steps: 0}
report: {train_images: 0}
"""


# Under nohup, or in the background of a script, these are ignored, and what is started would ignore them, too. One that
# is handled here does nothing here, and has its default there.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """64 small images of noise and rectangles in four class folders, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(64):
        rng = np.random.default_rng(i)
        image = Image.fromarray(rng.integers(0, 256, (36 + i % 9, 40 + i % 5, 3), dtype=np.uint8))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).rectangle((3 + i % 7, 5, 20 + i % 11, 30), fill=colour)
        folder = root / "train" / f"class-{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def small_config(image_folder, tmp_path_factory):
    """The path of a config that trains a tiny model on image_folder."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL_CONFIG % image_folder)
    return path


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test():
    yield
    processes.end_all()
