"""Which runs there are, how long each is, and what it has taken, by metrics written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from ijepa_scale.compare.pacing import Clock, plan_in_words
from ijepa_scale.compare.recipes import Recipe
from ijepa_scale.compare.runs import Plan, Training, spent
from ijepa_scale.config import load_config, to_dict
from ijepa_scale.engine import checkpoint as checkpoints
from tests.compare.toy import toy

SECONDS = {"plain": 0.4, "terms": 0.1}  # of a step
FLOPS = {"plain": 3e9, "terms": 1e9}


@pytest.fixture
def plan(tmp_path):
    """Of recipes that are not opened, which takes seconds."""
    config = toy(tmp_path, equal=["images", "seconds", "flops"])
    recipes = [
        Recipe(
            name=name, file=file, words=tuple(words), config=load_config(file, words), steps=8, flops=FLOPS[name] / 8
        )
        for name, (file, words) in config.named_recipes.items()
    ]
    return Plan(config=config, recipes=recipes, ranks=1, out=Path(config.out))


def finish(training: Training, *, seconds: float | None = None, upto: int | None = None) -> None:
    """What a run leaves, without weights. upto: a step that it was stopped after."""
    done, name = upto or training.steps, training.recipe.name
    each = {"step_seconds": seconds or SECONDS[name], "model_flops": FLOPS[name], "hardware_flops": 2 * FLOPS[name]}
    records = [{"kind": "step", "step": step, "loss": 0.5, **each} for step in range(done)]
    records.insert(1, {"kind": "health", "step": 1})
    folder = training.folder / "checkpoints" / checkpoints.folder_name(done)
    folder.mkdir(parents=True)
    (training.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    manifest = {"format": checkpoints.FORMAT, "step": done, "files": [], "config": to_dict(training.config)}
    manifest["sha256"] = checkpoints._digest(manifest)
    (folder / checkpoints.MANIFEST).write_text(json.dumps(manifest))


def names(trainings):
    return [(training.name, training.steps) for training in trainings]


def test_every_recipe_is_trained_with_every_seed_seed_by_seed(plan):
    assert names(plan.runs("images")) == [
        ("plain-seed0", 8),
        ("terms-seed0", 8),
        ("plain-seed1", 8),
        ("terms-seed1", 8),
    ]
    assert plan.runs("seconds") == []  # not known yet
    assert names(plan.runs("seconds", {"plain": 2.0, "terms": 0.5})) == [
        ("terms-seed0-equal-seconds", 32),
        ("terms-seed1-equal-seconds", 32),
    ]
    assert names(plan.runs("flops")) == [("terms-seed0-equal-flops", 24), ("terms-seed1-equal-flops", 24)]


@pytest.mark.parametrize(
    "steps, probes, every, probed", [(8, 2, 4, [4, 8]), (10, 4, 3, [3, 6, 9, 10]), (3, 5, 1, [1, 2, 3])]
)
def test_probed_steps_end_with_the_run_and_are_those_that_pretrain_keeps(plan, steps, probes, every, probed):
    training = Training(
        recipe=plan.recipes[0], seed=0, equal="images", steps=steps, probes=probes, folder=plan.out / "r"
    )
    assert training.probed == probed
    config = training.config
    assert (config.checkpoint.every_steps, config.checkpoint.keep_every) == (every, every)
    assert (config.optimization.max_steps, config.seed, config.run_dir) == (steps, 0, str(plan.out / "r"))
    assert config.report.train_images == 0


def test_what_was_spent_is_summed_up_to_each_probed_step(plan):
    (training, *_) = plan.runs("images")
    finish(training)
    assert training.finished
    np.testing.assert_allclose(
        spent(training), [[0, 0, 0, 0], [32, 1.6, 1.2e10, 2.4e10], [64, 3.2, 2.4e10, 4.8e10]], rtol=1e-12
    )


def test_runs_of_equal_seconds_take_what_the_first_recipe_took_over_all_seeds(plan):
    runs = plan.runs("images")
    for training, seconds in zip(runs, (0.4, 0.2, 0.2, 0.1), strict=True):
        finish(training, seconds=seconds)
    assert names(plan.runs("seconds")) == [("terms-seed0-equal-seconds", 16), ("terms-seed1-equal-seconds", 16)]


def test_a_recipe_that_is_as_fast_needs_no_run_of_its_own(plan):
    for training in plan.runs("images"):
        finish(training, seconds=0.4 if training.recipe.name == "plain" else 0.397)
    assert plan.runs("seconds") == []


def test_a_run_that_was_begun_keeps_its_length_when_seeds_are_added(plan, tmp_path):
    for training in plan.runs("images"):
        finish(training)
    (first, _) = plan.runs("seconds")
    finish(first, upto=10)
    config = toy(tmp_path, seeds=[0, 1, 2], equal=["images", "seconds"])
    more = Plan(config=config, recipes=plan.recipes, ranks=1, out=plan.out)
    finish(more.runs("images")[-2], seconds=4.0)
    finish(more.runs("images")[-1], seconds=0.1)
    assert {training.steps for training in more.runs("seconds")} == {32} and len(more.runs("seconds")) == 3
    assert not more.runs("seconds")[0].finished


def test_what_was_trained_with_other_settings_is_refused(plan, tmp_path):
    (training, *_) = plan.runs("images")
    finish(training)
    training.check_goes_on()
    longer = Training(**{**vars(training), "steps": 16})
    with pytest.raises(
        ValueError, match=r"plain-seed0 was trained with other settings: optimization.max_steps: 8 there, 16"
    ):
        longer.check_goes_on()


def test_the_dry_run_lists_runs_and_the_minutes_that_are_known(plan):
    text = plan_in_words(plan)
    assert "speed not known before the first run" in text and "minutes" not in text
    (first, *_) = plan.runs("images")
    finish(first, seconds=6.0)
    lines = {line.split()[0]: " ".join(line.split()) for line in plan_in_words(plan).splitlines() if "seed" in line}
    assert lines["plain-seed0"] == "plain-seed0 64 images 8 steps finished"
    assert lines["plain-seed1"] == "plain-seed1 64 images 8 steps 0.8 minutes"
    assert lines["terms-seed0"] == "terms-seed0 64 images 8 steps 0.3 minutes"  # by its FLOPs
    assert lines["terms-seed1-equal-seconds"] == "terms-seed1-equal-seconds 192 images 24 steps 0.8 minutes"


def test_the_clock_counts_what_is_left(plan, monkeypatch, capsys):
    """plain: 10 s a step as it goes, terms a third of it; after it three of equal images, and the others."""
    now = [100.0]
    monkeypatch.setattr("ijepa_scale.compare.pacing.time.monotonic", lambda: now[0])
    clock, (training, *_) = Clock(plan), plan.runs("images")
    clock.begin(training)
    for step, seconds in ((0, 0.0), (1, 10.0), (2, 10.0)):
        now[0] += seconds
        clock.show({"step": step, "loss": 0.25})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "run 1 of 6, plain-seed0: 8 steps of 8 images"  # those of equal FLOPs have a length already
    # This run, plain again, terms twice, and its runs of equal seconds and FLOPs with both seeds.
    left = 6 * 10 + 8 * 10 + 2 * 8 * 10 / 3 + 2 * 2 * 24 * 10 / 3
    minutes, seconds = divmod(round(left), 60)
    eta = f"all runs: ETA 0:{minutes:02}:{seconds:02}"
    assert said[1] == f"run 1 of 8, plain-seed0: step 2/8, loss 0.2500, 1 images/s; {eta}"
    assert len(said) == 2  # not a line a step
