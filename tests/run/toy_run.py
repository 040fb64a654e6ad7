"""A run folder as a short run leaves it, for what reads one."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ijepa_scale.run.records import JsonlWriter

SCORES = [
    {"probe": "k-NN count", "initial": 14.2, "trained": 18.4, "chance": 13.3, "num_test": 4000},
    {"probe": "linear <b>x</b> $1_$2", "initial": 21.5, "trained": 29.0, "chance": 13.3, "num_test": 4000},
]


def step(number: int, **values) -> dict:
    record = {"kind": "step", "step": number, "epoch": number / 10, "loss": 0.5 / (number + 1), "lr": 1e-3}
    record |= {"weight_decay": 0.04, "ema_momentum": 0.99, "grad_norm": 1.0, "applied": True, "model_flops": 1e9}
    record |= {"images_per_second": 32.0, "step_seconds": 0.5, "data_wait_seconds": 0.01, "memory_bytes": 2**30}
    return record | {"loss_prediction": 0.4, "loss_variance": 0.1} | values


def health(number: int, **values) -> dict:
    record = {"kind": "health", "step": number, "feature_std": 0.2, "rankme": 10.0 + number, "drift": 0.1}
    return record | {"loss": 0.3, "knn": 25.0, "knn_images": 128, "knn_label": "count"} | values


def write_run(folder: Path, *, steps: int = 20, finished: bool = True, **config) -> Path:
    """config: sections over the usual ones."""
    folder.mkdir(parents=True)
    with JsonlWriter(folder / "metrics.jsonl", None) as writer:
        for number in range(steps):
            if number % 5 == 0:
                writer.write(health(number))
            writer.write(step(number, **({"loss": None, "grad_norm": None, "applied": False} if number == 3 else {})))
    said = {"data": {"source": "scenes", "image_size": 64}, "model": {"name": "vit_tiny", "patch_size": 8}}
    said |= {"optimization": {"global_batch_size": 16, "max_steps": 20, "lr": 1e-3}, "run_dir": str(folder)} | config
    (folder / "config.yaml").write_text(json.dumps(said))  # JSON is YAML
    environment = {
        "command": ["launch/pretrain.py", "--config", "tiny"],
        "python": "3.11",
        "packages": {"torch": "2.14"},
    }
    environment |= {"device": "CPU", "world_size": 2, "precision": "fp32", "images": 160, "source": "scenes:train"}
    (folder / "environment.json").write_text(json.dumps(environment))
    if finished:
        (folder / "report.json").write_text(
            json.dumps({"step": steps, "seed": 0, "train_images": 99, "scores": SCORES})
        )
    return folder


def write_picture(folder: Path, name: str, *, side: int = 32, **said) -> Path:
    """A PNG of noise in RUN/pictures, with its words beside it."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(pictures / f"{name}.png")
    words = {"title": "Colours", "caption": "A caption.", "alt": "Noise.", "section": "features", "step": None} | said
    (pictures / f"{name}.json").write_text(json.dumps(words))
    return pictures / f"{name}.png"
