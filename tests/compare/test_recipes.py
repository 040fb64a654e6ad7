"""What makes a comparison fair: the same encoder to begin with, the same images in the same order."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ijepa_scale import build
from ijepa_scale.compare.recipes import initial_digest, open_recipes
from ijepa_scale.config import load_config
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.vit import VisionTransformer
from tests.compare.toy import toy
from tests.processes import ROOT

SMALL = ["model.width=32", "model.depth=2", "model.heads=2"]


@dataclass(frozen=True)
class Lone:
    """An objective of one encoder and a head of its own, with the encoder where objectives have it."""

    config: object
    name: str = "lone"

    def build(self) -> nn.Module:
        return nn.ModuleDict({"head": nn.Linear(32, 7), "context_encoder": build.build_encoder(self.config)})

    def encoders(self, module: nn.Module) -> dict[str, VisionTransformer]:
        return {"context": module["context_encoder"]}

    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        return dict(module.items())

    def averaged(self, module: nn.Module):
        return []

    def initial_weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        return initial_weight(name, shape, self.config.seed)


def small(*overrides):
    return load_config(ROOT / "configs" / "tiny.yaml", [*SMALL, *overrides])


def test_objectives_start_from_the_same_encoder_at_a_seed():
    """The target encoder of one, the only encoder of the other; and it is what build_model() starts with."""
    config = small()
    digest = initial_digest(build.build_objective(config))
    assert initial_digest(Lone(config)) == digest
    assert initial_digest(build.build_objective(small("predictor.width=32", "loss.variance=0"))) == digest
    assert initial_digest(build.build_objective(small("seed=1"))) != digest
    assert initial_digest(Lone(small("seed=1"))) == initial_digest(build.build_objective(small("seed=1")))
    ours = dict(build.build_model(config).target_encoder.named_parameters())
    theirs = build.build_encoder(config)
    assert ours.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        expected = initial_weight(f"context_encoder.{name}", parameter.shape, config.seed)
        assert torch.equal(ours[name], expected)


@pytest.mark.parametrize("name", [name for name in build.OBJECTIVES if name not in ("ijepa", "sketch")])
def test_every_objective_starts_from_the_encoder_of_ijepa(name):
    path = ROOT / "configs" / f"{name}_small.yaml"
    theirs, ours = (load_config(file, SMALL) for file in (path, ROOT / "configs" / "small_images.yaml"))
    assert initial_digest(build.build_objective(theirs)) == initial_digest(build.build_objective(ours))


def test_recipes_know_their_steps_and_flops(tmp_path):
    plain, terms = open_recipes(toy(tmp_path), ranks=1)
    assert (plain.steps, plain.batch, plain.config.optimization.max_steps) == (8, 8, 8)
    assert plain.flops == terms.flops > 1e6
    deeper = {"plain": {"config": plain.file}, "deep": {"config": plain.file, "overrides": ["predictor.depth=3"]}}
    assert open_recipes(toy(tmp_path, recipes=deeper), ranks=1)[1].flops > 1.2 * plain.flops


def test_two_recipes_see_the_same_images_in_the_same_order(tmp_path):
    """Crops too, where a recipe has none of its own. Where its step is of more images, epoch by epoch, without them."""
    recipe = str(tmp_path / "recipe.yaml")
    others = {"terms": ["loss.variance=0.02"], "larger": ["optimization.global_batch_size=16"]}
    others = {name: {"config": recipe, "overrides": words} for name, words in others.items()}
    config = toy(tmp_path, recipes={"plain": {"config": recipe}, **others})
    assert [one.steps for one in open_recipes(config, ranks=1)] == [8, 8, 4]
    seen = []
    for file, words in config.named_recipes.values():
        read = load_config(file, [*words, "seed=3"])
        objective, images = build.build_objective(read), build.build_images(read)
        batch = read.optimization.global_batch_size
        micro = build.build_micro_batches(read, images, objective, micro_batch_size=batch, rank=0, ranks=1)
        an_epoch = len(images) // batch  # steps: what is left fills none
        batches = [micro.batch(epoch * an_epoch + step) for epoch in range(2) for step in range(32 // batch)]
        indices = [index for one in batches for index in one.indices]
        seen.append((indices, torch.cat([one.images for one in batches])))
    (indices, images), (same, pixels), (larger, _) = seen
    assert indices == same == larger and torch.equal(images, pixels)
    assert len(set(indices[:32])) == len(set(indices[32:])) == 32 and indices[:32] != indices[32:]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["data.split=validation"],
            r"recipes plain and other would not see the same images .*data.split is 'train' and",
        ),
        (["model.depth=3"], r"plain and other do not start from the same encoder: depth 2 and 3; give both"),
        (["model.init_from=runs/x"], r"recipe other: model.init_from: a comparison starts from random weights"),
        (["optimization.learning=1"], r"recipe other: unknown config key optimization.learning"),
        (["optimization.micro_batch_size=3"], r"recipe other: .*is not a multiple of optimization.micro_batch_size 3"),
    ],
)
def test_an_unequal_or_wrong_recipe_is_refused_before_anything_is_trained(tmp_path, overrides, message):
    recipe = str(tmp_path / "recipe.yaml")
    recipes = {"plain": {"config": recipe}, "other": {"config": recipe, "overrides": overrides}}
    with pytest.raises(ValueError, match=message):
        open_recipes(toy(tmp_path, recipes=recipes), ranks=1)


def test_images_that_fill_no_whole_steps_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"recipe plain: images 60 is not a multiple of .* 8; use images=64"):
        open_recipes(toy(tmp_path, images=60), ranks=1)


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"recipe plain: .*/nowhere/at/all"):
        open_recipes(toy(tmp_path, overrides=["data.source=/nowhere/at/all"]), ranks=1)


def test_a_config_that_is_not_there_is_refused(tmp_path):
    recipes = {"plain": {"config": "tiny"}, "other": {"config": "no_such_config"}}
    with pytest.raises(ValueError, match=r"recipe other: no config file no_such_config; give a YAML file, or one of"):
        open_recipes(toy(tmp_path, recipes=recipes, images=128), ranks=1)
