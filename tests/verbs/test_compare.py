"""The verb compare: its dry run, its errors, and the comparisons that are shipped."""

import pytest

from ijepa_scale import build
from ijepa_scale.compare.recipes import open_recipes
from ijepa_scale.config import load_comparison
from ijepa_scale.plan import sampling
from ijepa_scale.verbs import compare
from tests.compare.toy import write_toy
from tests.processes import ROOT

SHIPPED = sorted(ROOT.glob("configs/compare_*.yaml"))


class Stop:
    doing = ""


@pytest.fixture(autouse=True)
def few_layouts(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLED_STEPS", 2)


def test_the_dry_run_lists_all_runs_and_writes_nothing(tmp_path, capsys):
    path = write_toy(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert compare.compare(Stop(), ["--config", str(path), "seeds=[4]", "--dry-run", "probes=4"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if "-seed" in line] == ["plain-seed4", "terms-seed4"]
    assert "4 checkpoints of each run" in text and "GFLOP an image" in text
    assert sorted(tmp_path.iterdir()) == before


def test_the_dry_run_prints_no_password(tmp_path, capsys):
    words = ['recipes.terms.overrides=["logging.wandb_project=https://me:p4ssw0rd@host/x"]', "--dry-run"]
    assert compare.compare(Stop(), ["--config", str(write_toy(tmp_path)), *words]) == 0
    assert "@host/x" in (text := capsys.readouterr().out) and "p4ssw0rd" not in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["images=61"], "error: recipe plain: images 61 is not a multiple of optimization.global_batch_size 8; use"),
        (["recipes.terms.config=nowhere"], "error: recipe terms: no config file nowhere; give a YAML file, or one of"),
        (["colour=3"], "error: unknown config key colour; valid here: recipes, overrides, seeds"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    assert compare.compare(Stop(), ["--config", str(write_toy(tmp_path)), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_compares_all_objectives_and_says_what_it_costs(path):
    config = load_comparison(path)
    assert list(config.named_recipes) == ["ijepa", "mae", "data2vec", "cae"]
    head = path.read_text().split("\nrecipes:")[0]
    assert f"launch/compare.py --config configs/{path.name}" in head
    assert ("Not run" in head) == (path.stem == "compare_imagenet") and config.labels_per_class == 12
    assert load_comparison(path.stem) == config


def test_the_small_one_is_of_scenes_with_three_seeds_and_its_recipes_are_alike():
    config = load_comparison("compare_small")
    assert len(config.seeds) == 3 and config.equal == ("images", "seconds")
    if missing := config.named_recipes.keys() - build.OBJECTIVES.keys():
        pytest.skip(f"there are no objectives {', '.join(sorted(missing))}")
    recipes = open_recipes(config, ranks=2)
    assert [recipe.config.objective.name for recipe in recipes] == list(config.named_recipes)
    assert {recipe.config.data.source for recipe in recipes} == {"scenes"} and len({r.steps for r in recipes}) == 1
