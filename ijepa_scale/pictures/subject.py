"""What is looked at: a checkpoint with its encoder of before training, and some images."""

import copy
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_scale import build
from ijepa_scale.build_objectives import target_layers
from ijepa_scale.config import PretrainConfig, from_dict
from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import ImageSet, open_images, splits_of
from ijepa_scale.data.order import BLOCKS, SIZES, generator_for, permuted_index
from ijepa_scale.data.sources.folders import judging_split
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.engine.checkpoint import MANIFEST, candidates
from ijepa_scale.engine.distributed import alone
from ijepa_scale.evals.embed import check_layers
from ijepa_scale.exchange.load import find
from ijepa_scale.exchange.networks import NETWORKS, Loaded, Networks
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.objectives.ijepa import IJepa
from ijepa_scale.run.init_from import fill_initial
from ijepa_scale.run.step_pictures import CHOICE
from ijepa_scale.visualize.sheet import Box


@dataclass(frozen=True)
class Checkpoint:
    """networks: what find() gave. loaded: the encoder that is looked at. config: of the run, where it is known."""

    networks: Networks
    loaded: Loaded
    config: PretrainConfig | None

    @property
    def encoder(self) -> Any:
        return self.loaded.network

    @property
    def run(self) -> Path | None:
        """The folder of the run that it is of."""
        path = self.loaded.path
        return path.parents[1] if path.is_dir() and path.parent.name == "checkpoints" else None

    @property
    def step(self) -> int:
        """Of the run; where there is none it is not known."""
        assert self.loaded.step is not None
        return self.loaded.step

    @property
    def trained(self) -> str:
        return "trained" if self.loaded.step is None else f"trained, step {self.loaded.step:,}"

    def why_not(self, what: str) -> str:
        """Why a picture cannot be made of it; "" where it can."""
        path, lacking = self.networks.path, [name for name in NETWORKS if name not in self.networks.names]
        if what == "masks" and self.config is None:
            return f"{path} does not say how images were masked; give a run or one of its checkpoints"
        if what in ("predict", "sketch"):
            if self.config and self.config.objective.name != "ijepa":
                return f"{path} is of the objective {self.config.objective.name}; {what} is of ijepa alone"
            if lacking:
                return (
                    f"{path} holds no {' and no '.join(lacking)}; {what} needs both encoders and the predictor: give "
                    "the run, or an export in the format safetensors"
                )
        return ""

    def folder(self, out: str) -> Path:
        if not out and self.run is None:
            raise ValueError(
                f"{self.loaded.path} is no checkpoint of a run, whose folder would be used: give --out DIR"
            )
        return Path(out) if out or self.run is None else self.run / "pictures"

    def size(self, size: int) -> int:
        return size or self.loaded.image_size

    def grid(self, size: int = 0) -> PatchGrid:
        """Of images of so many pixels a side. ValueError for what is no multiple of the patch."""
        return PatchGrid.of_image(self.size(size), self.size(size), self.encoder.patch_embed.patch_size)

    def layers(self, layers: list[int]) -> list[int]:
        """Blocks from 0. Of none: four, evenly."""
        check_layers(self.encoder, layers)
        depth = self.encoder.size.depth
        even = np.unique(np.linspace(0, depth - 1, 4).round().astype(int)).tolist()
        return [layer % depth for layer in layers] or even

    @cached_property
    def initial(self) -> tuple[Any, str]:
        """The encoder with the weights that training started from, and which these are, in words."""
        encoder = copy.deepcopy(self.encoder)
        if self.config is None:
            with torch.no_grad():
                for name, parameter in encoder.named_parameters():
                    parameter.copy_(initial_weight(f"context_encoder.{name}", parameter.shape, 0))
            return encoder, "random weights"
        manifest = self.loaded.path / MANIFEST
        began = json.loads(manifest.read_text(encoding="utf-8")).get("init_from", {}) if manifest.is_file() else {}
        words = fill_initial(encoder, build.build_objective(self.config), self.loaded.name, alone(), began)
        if not began and (start := self.config.model.init_from):
            words += f", though training began with those of {start}, of which nothing is recorded here"
        return encoder, words

    def model(self) -> IJepa:
        """All three networks, as they were trained together."""
        context, predictor, target = (
            self.networks.load(name).network.to(alone().device) for name in ("context", "predictor", "target")
        )
        layers = target_layers(self.config) if self.config else ()
        return IJepa(context, predictor, target, target_layers=layers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Images:
    """Some images of a set, at the size that the encoder was trained on. pixels: (n, 3, S, S). words: which."""

    source: ImageSet
    indices: list[int]
    pixels: np.ndarray
    words: str

    def at_size(self, size: int, count: int) -> np.ndarray:
        if size == self.pixels.shape[-1]:
            return self.pixels[:count]
        return np.stack([center_crop(self.source.read(index), size) for index in self.indices[:count]])


def checkpoints_at(run: str, steps: list[str]) -> list[str]:
    """The checkpoints that a run has kept of some steps, or of ["all"], the newest first.

    Raises ValueError where it has none, or none of one of the steps.
    """
    kept = {int(path.name[-8:]): str(path) for path in candidates(Path(run) / "checkpoints")}
    if not kept:
        raise ValueError(f"--steps is of a run, and there is no checkpoint in {Path(run) / 'checkpoints'}")
    if steps == ["all"]:
        return list(kept.values())
    if lacking := [step for step in steps if not step.isdecimal() or int(step) not in kept]:
        raise ValueError(
            f"--steps {lacking[0]}: {run} has kept checkpoints of the steps {', '.join(map(str, sorted(kept)))}; give "
            "some of these, or all (checkpoint.keep_every=N keeps every Nth)"
        )
    return [path for step, path in kept.items() if step in map(int, steps)]


def open_checkpoint(what: str) -> Checkpoint:
    """ValueError for what load() refuses."""
    networks = find(what)
    loaded = networks.load("target")
    for note in loaded.notes:
        print(note, flush=True)
    loaded.network.to(alone().device)
    return Checkpoint(networks, loaded, from_dict(dict(loaded.config)) if loaded.config else None)


def open_images_of(checkpoint: Checkpoint, source: str, split: str, cache_dir: str, *, among: int, seed: int) -> Images:
    """A random choice of the images of a source, or of the run's own that it was not trained on."""
    size, config = checkpoint.loaded.image_size, checkpoint.config
    if source:
        cache = cache_dir or (config.data.cache_dir if config else "")
        source = build.scenes(cache, image_size=size) if source == "scenes" else source
        splits = splits_of(source, cache or None)
        found = split or judging_split(splits) or splits[0]
        images, note = open_images(source, split=found, cache_dir=cache or None), ""
    elif config:
        data, run = config.data, checkpoint.run
        data = replace(data, cache_dir=cache_dir or data.cache_dir, eval_split=split or data.eval_split)
        evaluation = build.build_eval_images(replace(config, data=data, run_dir=str(run or config.run_dir)))
        images = evaluation.test
        note = ", never trained on" if evaluation.held_out else ", of the split that was trained on"
    else:
        raise ValueError(f"{checkpoint.loaded.path} does not say what it was trained on: give --images FOLDER|SOURCE")
    indices, crops = [], []
    for place in range(len(images)):
        index = permuted_index(seed, CHOICE, len(images), place)
        try:
            crops.append(center_crop(images.read(index), size))
        except BadImageError as error:
            print(f"warning: left out: {error}", flush=True)
            continue
        indices.append(index)
        if len(indices) == among:
            break
    if len(indices) < 2:
        raise ValueError(f"{images.name} has {len(indices)} images that can be read, and pictures need 2 or more")
    return Images(images, indices, np.stack(crops), f"{len(indices):,} images of {images.name}{note}")


def drawn_boxes(checkpoint: Checkpoint, count: int, seed: int) -> list[Box]:
    """A box an image, anywhere, all of one size, as the target blocks of training are drawn."""
    grid, config = checkpoint.grid(), checkpoint.config
    spec = build.build_blocks(config) if config else MultiBlock(grid=grid)
    height, width = block_sizes(spec, generator_for(seed, SIZES, CHOICE)).target
    rngs = [generator_for(seed, BLOCKS, CHOICE, image) for image in range(count)]
    free = (grid.rows - height + 1, grid.columns - width + 1)
    return [(int(rng.random() * free[0]), int(rng.random() * free[1]), height, width) for rng in rngs]
