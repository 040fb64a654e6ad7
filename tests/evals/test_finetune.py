"""Fine-tuning: learning rates by layer, drop path's draws, and real trainings beside a plain loop and on two ranks."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from ijepa_scale.data.transforms import center_crop
from ijepa_scale.evals import finetune as finetune_module
from ijepa_scale.evals.batches import TrainingBatches
from ijepa_scale.evals.finetune import (
    Classifier,
    FinetuneSettings,
    finetune,
    kept_branches,
    layer_groups,
    layer_of,
    recipe,
)
from ijepa_scale.evals.training import Fit, warmup_cosine
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.vit import VisionTransformer
from tests.evals import worker_training
from tests.evals.labelled import labelled, write_colours
from tests.evals.worker_training import outcome_of, tiny_encoder
from tests.processes import assert_all, run_ranks

# Worked out by hand for 12 blocks and a decay of 0.75: 0.75 ** 13 for the patch embedding, ..., 0.75, 1 for the head.
TABLE = {
    "encoder.patch_embed.proj.weight": 0.0237573,
    "encoder.blocks.0.norm1.weight": 0.0316764,
    "encoder.blocks.5.attn.qkv.weight": 0.1334839,
    "encoder.blocks.10.mlp.fc2.bias": 0.5625,
    "encoder.blocks.11.attn.proj.weight": 0.75,
    "encoder.norm.weight": 1.0,
    "head.weight": 1.0,
    "head.bias": 1.0,
}
QUICK = FinetuneSettings(
    epochs=4, warmup_epochs=1, batch_size=22, micro_batch_size=6, lr=5e-3, drop_path=0.3, checkpoint_epochs=4
)
OFTEN = replace(QUICK, epochs=3, checkpoint_epochs=1)
SEPARABLE = replace(
    QUICK, epochs=16, checkpoint_epochs=16, mixup=0.0, cutmix=0.0, rand_augment="", drop_path=0.0, label_smoothing=0.0
)
WEIGHTS = "out/finetuned.safetensors"


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    write_colours(root, "train", 48)
    write_colours(root, "validation", 23)
    return root


def test_learning_rates_fall_with_depth_as_worked_out_by_hand():
    like = VisionTransformer(ViTSize(width=8, depth=12, heads=2, mlp_width=8), image_size=8, patch_size=4)
    model = Classifier(like, classes=3)
    groups = layer_groups(model, 12, FinetuneSettings(lr=2e-3, weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, scale in TABLE.items():
        assert found[name]["peak_lr"] == pytest.approx(2e-3 * scale, rel=1e-5)
    for name, group in found.items():
        plain = name.endswith("bias") or ".norm" in name
        assert group["weight_decay"] == (0.0 if plain else 0.3)
    assert len(groups) == 2 * 14


def test_recipes_are_the_papers_where_it_has_one():
    full, few = recipe(1280, few_labels=False), recipe(1280, few_labels=True)
    assert (full.epochs, full.lr, full.batch_size, full.weight_decay, full.layer_decay) == (50, 1e-4, 528, 0.04, 0.75)
    assert (full.mixup, full.cutmix, full.drop_path, full.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert (few.epochs, few.lr, few.batch_size, few.weight_decay) == (50, 3e-5, 512, 0.4)
    assert (few.mixup, few.cutmix, few.drop_path, few.mix) == (0.0, 0.0, 0.0, None)
    assert recipe(1024, few_labels=True).weight_decay == 0.05
    for width in (192, 768):
        assert recipe(width, few_labels=False).lr == pytest.approx(5e-4)


def test_drop_path_keeps_the_mean_and_no_image_depends_on_another():
    keep = kept_branches(3, 7, list(range(4000)), depth=5, rate=0.4)
    assert keep.shape == (5, 4000, 2)
    for block, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        values = sorted({0.0, round(1 / (1 - rate), 5)} if rate else {1.0})
        assert [round(value, 5) for value in keep[block].unique().tolist()] == values
        error = (rate / (1 - rate) / keep[block].numel()) ** 0.5
        assert abs(keep[block].mean().item() - 1.0) <= 4 * error
    assert torch.equal(kept_branches(3, 7, [2, 9], 5, 0.4), keep[:, [2, 9]])
    assert not torch.equal(kept_branches(3, 8, list(range(4000)), 5, 0.4), keep)
    assert abs(np.corrcoef(keep[4].T)[0, 1]) < 0.05, "branches are dropped apart"
    assert torch.equal(kept_branches(3, 7, [0, 1], 5, 0.0), torch.ones(5, 2, 2))


def plain_training(root, settings: FinetuneSettings) -> dict[str, torch.Tensor]:
    """One process, one forward a step, torch's own AdamW: nothing of the engine."""
    model = Classifier(tiny_encoder(), classes=4)
    model.encoder.load_state_dict(tiny_encoder().state_dict())
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    groups = [
        {
            "params": [p],
            "scale": settings.layer_decay ** (3 - layer_of(n, 2)),
            "weight_decay": settings.weight_decay * (p.ndim > 1),
        }
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    batches = TrainingBatches(
        labelled=labelled(root),
        augment=settings.augment(),
        mix=settings.mix,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        micro_batch_size=1000,
        image_size=16,
        seed=1,
    )
    for step in range(batches.total_steps):
        batch = batches.batch(step)
        keep = kept_branches(1, step, batch.positions.tolist(), 2, settings.drop_path)
        targets = 0.9 * batch.targets + 0.1 / 4
        loss = -(targets * F.log_softmax(model(batch.images, keep), dim=1)).sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * group["scale"] * warmup_cosine(step, batches.total_steps, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def weights_in(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def alone(colours, tmp_path_factory):
    """A folder of several fine-tunings on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    cases = {
        "quick": (QUICK, {}),
        "often": (OFTEN, {}),
        "separable": (SEPARABLE, {}),
        "shuffled": (SEPARABLE, {"shuffle": True}),
    }
    assert_all(run_ranks(worker_training.run, 1, folder / "log", finetune, str(colours), str(folder), cases))
    return folder


def test_the_engine_trains_as_a_plain_loop_on_one_rank_and_on_two(colours, alone, tmp_path):
    cases = {"quick": (QUICK, {})}
    assert_all(run_ranks(worker_training.run, 2, tmp_path / "log", finetune, str(colours), str(tmp_path), cases))
    plain, before = plain_training(colours, QUICK), tiny_encoder().state_dict()
    blocks = [name for name in plain if name.startswith("encoder.blocks")]
    first = {name: before[name.removeprefix("encoder.")] for name in blocks}
    moved = largest_difference({name: plain[name] for name in blocks}, first)
    assert moved > 1e-2
    one, two = weights_in(alone / "quick"), weights_in(tmp_path / "quick")
    assert largest_difference(one, plain) < 1e-2 * moved
    assert largest_difference(two, one) < 1e-2 * moved
    found = [outcome_of(folder, "quick") for folder in (alone, tmp_path)]
    assert found[0]["predicted"] == found[1]["predicted"] and len(found[0]["predicted"]) == 23
    assert found[0]["left"] == found[1]["left"] == []


def test_all_of_separable_classes_and_chance_of_shuffled_labels(alone):
    measure = outcome_of(alone, "separable")["measures"][0]
    assert (measure["value"], measure["count"], measure["chosen"]) == (100.0, 23, True)
    measure = outcome_of(alone, "shuffled")["measures"][0]
    assert measure["value"] < 60.0 and measure["chance"] == pytest.approx(100 * 6 / 23)


def test_saved_weights_are_a_classifier_that_answers_as_reported(colours, alone):
    model = Classifier(tiny_encoder(), classes=4)
    model.load_state_dict(weights_in(alone / "quick"))
    test = labelled(colours, "validation")
    images = np.stack([center_crop(test.images.read(i), 16) for i in range(23)])
    with torch.no_grad():
        assert model(torch.from_numpy(images)).argmax(1).tolist() == outcome_of(alone, "quick")["predicted"]
    with safe_open(alone / "quick" / WEIGHTS, framework="pt") as file:
        assert '"class-3"' in file.metadata()["classes"] and '"width": 16' in file.metadata()["size"]


def cut_short(evaluation, settings):
    """As finetune(), but killed after the second checkpoint."""

    class Killed(Fit):
        def run(self, look):
            said = []

            def then_die(loss):
                said.append(look(loss))
                if len(said) == 2:
                    os._exit(9)
                return said[-1]

            return super().run(then_die)

    finetune_module.Fit = Killed
    return finetune(evaluation, settings)


def test_a_killed_training_goes_on_to_the_same_bits(colours, alone, tmp_path):
    for task, code in ((cut_short, 9), (finetune, 0)):
        arguments = (task, str(colours), str(tmp_path), {"often": (OFTEN, {})})
        assert_all(run_ranks(worker_training.run, 1, tmp_path / "log", *arguments), code)
        left = [path.name for path in tmp_path.glob("often/keep/checkpoints/*/step-*")]
        assert left == (["step-00000004"] if code else [])
    whole, killed = weights_in(alone / "often"), weights_in(tmp_path / "often")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_training_that_diverges_is_said_on_every_rank(colours, tmp_path):
    cases = {"case": (replace(QUICK, epochs=2, warmup_epochs=0, lr=1e30), {})}
    ends = run_ranks(worker_training.run, 2, tmp_path / "log", finetune, str(colours), str(tmp_path), cases)
    assert_all(ends, 1)
    assert all("finetune: the loss became nan" in end.output and "give a smaller lr" in end.output for end in ends)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_every_zero_stage_and_recomputed_blocks_train_alike(colours, tmp_path, stage):
    settings = replace(QUICK, zero_stage=stage, recompute_every=1)
    arguments = (finetune, str(colours), str(tmp_path), {"case": (settings, {})})
    assert_all(run_ranks(worker_training.run, 2, tmp_path / "log", *arguments))
    assert largest_difference(weights_in(tmp_path / "case"), plain_training(colours, QUICK)) < 1e-3


def test_wrong_settings_are_said():
    for wrong, message in (
        ({"epochs": 0}, "epochs must be 1"),
        ({"drop_path": 1.0}, "drop_path must be in"),
        ({"layer_decay": 0.0}, "layer_decay in"),
        ({"crop": "middle"}, "crop must be"),
        ({"zero_stage": 4}, "zero_stage 1, 2 or 3"),
        ({"weight_decay": -1.0}, "weight_decay must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FinetuneSettings(**wrong)
