"""The recipes of a comparison, each checked, and what they must have in common for it to be a fair one."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ijepa_scale import build
from ijepa_scale.config import CompareConfig, PretrainConfig, check_source_given, load_config, to_dict
from ijepa_scale.exchange.run import stored_names
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.plan.dry_run import dry_run

SAMPLED_STEPS, SAMPLED_IMAGES = 20, 16  # layouts that the FLOPs of an image are the mean of
# Which images come when, and what they are probed with. Crops, and how many images make a step, are a recipe's own.
ALIKE = (
    *(f"data.{key}" for key in ("source", "split", "column", "config", "eval_split", "image_size", "streaming")),
    *(f"data.{key}" for key in ("shuffle_buffer", "num_images", "max_pixels")),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """name, file, words: as the comparison's config gives them. config: what they amount to, less a run's own keys.

    steps: for the images of the comparison. flops: of an image, as the model needs them, by its expected tokens.
    """

    name: str
    file: str
    words: tuple[str, ...]
    config: PretrainConfig
    steps: int
    flops: float

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.config.optimization.global_batch_size


def open_recipes(config: CompareConfig, *, ranks: int) -> list[Recipe]:
    """Every recipe, checked as --dry-run checks it. Raises ValueError, which names the recipe, for what cannot be.

    Also for recipes that would not start from the same encoder, or not see the same images in the same order.
    """
    named, read, recipes = config.named_recipes, {}, []
    for name, (file, words) in named.items():
        with _naming(name):
            read[name] = _read(config, file, words)
    _check_alike(read)
    _check_encoders(read)
    for name, (file, words) in named.items():
        with _naming(name):
            flops = _flops(read[name], ranks)
        steps = read[name].optimization.max_steps
        recipes.append(Recipe(name=name, file=file, words=tuple(words), config=read[name], steps=steps, flops=flops))
    return recipes


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error


def _read(config: CompareConfig, file: str, words: list[str]) -> PretrainConfig:
    batch = load_config(file, words).optimization.global_batch_size
    if config.images % batch:
        near = max(1, round(config.images / batch)) * batch
        raise ValueError(
            f"images {config.images} is not a multiple of optimization.global_batch_size {batch}; use images={near}"
        )
    own = [f"optimization.max_steps={config.images // batch}", "optimization.stop_at_step=0", f"run_dir={config.out}"]
    read = load_config(file, [*words, *own])
    if read.model.init_from:
        raise ValueError("model.init_from: a comparison starts from random weights; leave it out")
    check_source_given(read)
    build.build_objective(read).check()
    return read


def _flops(read: PretrainConfig, ranks: int) -> float:
    """Of an image. ValueError for whatever --dry-run refuses."""
    dry_run(read, ranks=ranks)
    objective = build.build_objective(read)
    masks = [objective.draw_masks(step, range(SAMPLED_IMAGES)) for step in range(SAMPLED_STEPS)]
    return sum(objective.expected(masks).flops.values())


def _check_alike(recipes: dict[str, PretrainConfig]) -> None:
    (first, config), *others = recipes.items()
    for other, another in others:
        # A stream's shards are dealt to the images of a step: other steps, another order.
        for key in (*ALIKE, *(["optimization.global_batch_size"] if config.data.streaming else [])):
            section, _, leaf = key.partition(".")
            ours, theirs = (to_dict(one)[section][leaf] for one in (config, another))
            if ours != theirs:
                raise ValueError(
                    f"recipes {first} and {other} would not see the same images in the same order: {key} is "
                    f"{ours!r} and {theirs!r}; give it once, in the comparison's overrides"
                )


OF_ENCODERS = ("image_size", "patch_size", "width", "depth", "heads", "mlp_width")  # every objective's architecture()


def _check_encoders(recipes: dict[str, PretrainConfig]) -> None:
    objectives = {name: build.build_objective(config) for name, config in recipes.items()}
    (first, objective), *others = objectives.items()
    for name, one in objectives.items():
        if one.name == "sketch":
            raise ValueError(f"recipe {name} trains no encoder: its objective is sketch; leave it out")
    begun = initial_digest(objective)
    for other, another in others:
        if initial_digest(another) != begun:
            ours, theirs = objective.architecture(), another.architecture()
            differ = [f"{key} {ours[key]} and {theirs[key]}" for key in OF_ENCODERS if ours[key] != theirs[key]]
            raise ValueError(
                f"recipes {first} and {other} do not start from the same encoder: "
                f"{', '.join(differ) or 'the names of its parameters differ'}; give both the same section model"
            )


def initial_digest(objective: Objective) -> str:
    """SHA-256 of the weights that training starts from, of the encoder that is probed in the end, by names in it."""
    with torch.device("meta"):  # for its shapes alone
        network, encoder = next(iter(objective.encoders(objective.build()).items()))
    names, _ = stored_names(objective, network)
    digest = hashlib.sha256()
    for name, parameter in encoder.named_parameters():
        digest.update(name.encode())
        digest.update(objective.initial_weight(names[name], parameter.shape).numpy().data)
    return digest.hexdigest()
