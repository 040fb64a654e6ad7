"""Evaluations that take a moment: a tiny encoder of random weights, and two splits of images that it can tell apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.data.images import open_images
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.evals.evaluation import Evaluation, Labelled
from ijepa_scale.evals.labels import labelled_pair
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.vit import VisionTransformer
from tests.evals.labelled import write_colours

SIZE = ViTSize(width=32, depth=5, heads=2, mlp_width=48)
SIDE = 16  # pixels, of which a patch has 4
ONE = Ranks(0, 1, 0, torch.device("cpu"))


def write_splits(root: Path, train: int = 40, validation: int = 24, *, noise: int = 30) -> Path:
    """root/train and root/validation, four classes in each. noise: of pixels, of 255; up to 30 they are separable."""
    write_colours(root, "train", train, noise=noise)
    write_colours(root, "validation", validation, noise=noise)
    return root


def small_encoder(seed: int = 0) -> VisionTransformer:
    """Weights large enough that attention and GELU are far from linear, and no two parameters are alike."""
    vit = VisionTransformer(SIZE, image_size=SIDE, patch_size=4).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vit.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return vit


def splits_of_folder(root: Path) -> tuple[Labelled, Labelled]:
    """Of what write_splits() wrote."""
    train, validation = (open_images(str(root), split=split) for split in ("train", "validation"))
    return labelled_pair(train, validation, "label")


def evaluation_of(root: Path, **changed: Any) -> Evaluation:
    """Of root/, as write_splits() wrote it: features go to root/keep, results to root/out.

    changed: fields of Evaluation that are to be others. An encoder of other weights needs another sha256.
    """
    pair = (changed.pop("train"), changed.pop("test")) if "train" in changed else splits_of_folder(root)
    (root / "out").mkdir(exist_ok=True)
    usual = Evaluation(
        encoder=small_encoder(),
        sha256="0" * 64,
        image_size=SIDE,
        train=pair[0],
        test=pair[1],
        ranks=ONE,
        seed=0,
        batch_size=16,
        workers=0,
        keep=root / "keep",
        out=root / "out",
    )
    return replace(usual, **changed)
