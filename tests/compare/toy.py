"""A comparison that takes seconds: two recipes of a tiny I-JEPA on 40 images of four colours."""

from pathlib import Path
from typing import Any

import yaml

from ijepa_scale.config import load_comparison
from tests.evals.small import write_splits

RECIPE = """\
data: {source: %s, image_size: 16, crop_scale: [0.5, 1.0], workers: 0}
model: {name: vit_tiny, patch_size: 4, width: 32, depth: 2, heads: 2}
predictor: {width: 16, depth: 1}
mask: {min_keep: 1}
optimization: {global_batch_size: 8, epochs: 4, warmup_epochs: 1, lr: 1e-3, ema: [0.9, 1.0]}
logging: {health_every_steps: 0}
"""


def write_toy(root: Path, **changed: Any) -> Path:
    """root/compare.yaml, its recipes and its images; results go to root/out. changed: keys of it."""
    write_splits(root / "images", noise=800)
    (root / "recipe.yaml").write_text(RECIPE % (root / "images"))
    recipes = {
        "plain": {"config": str(root / "recipe.yaml")},
        "terms": {"config": str(root / "recipe.yaml"), "overrides": ["loss.variance=0.02", "loss.covariance=0.004"]},
    }
    usual = {"recipes": recipes, "seeds": [0, 1], "images": 64, "probes": 2, "labels_per_class": 3, "ranks": 1}
    text = yaml.safe_dump({**usual, "out": str(root / "out"), **changed}, sort_keys=False)
    (root / "compare.yaml").write_text(text)
    return root / "compare.yaml"


def toy(root: Path, *overrides: str, **changed: Any):
    return load_comparison(write_toy(root, **changed), list(overrides))
