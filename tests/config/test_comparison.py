"""Configs of comparisons: what is read, and what is refused in one line."""

import pytest

from ijepa_scale.config import load_comparison

TWO = "recipes:\n  a: {config: tiny}\n  b: {config: small_images, overrides: [optimization.lr=2e-3, seed_of=1]}\n"


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        (tmp_path / "mine.yaml").write_text(text)
        return load_comparison(tmp_path / "mine.yaml", list(overrides))

    return read


def test_a_recipes_own_overrides_take_the_place_of_common_ones(read):
    common = "overrides: [optimization.lr=1e-3, data.workers=0]\nimages: 64\n"
    recipes = read(TWO + common).named_recipes
    assert recipes["a"] == ("tiny", ["optimization.lr=1e-3", "data.workers=0"])
    assert recipes["b"] == ("small_images", ["data.workers=0", "optimization.lr=2e-3", "seed_of=1"])


def test_the_folder_is_named_after_the_file_and_a_recipe_is_left_out_from_the_command_line(read, monkeypatch, tmp_path):
    assert read(TWO + "images: 64\n").out == "runs/mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(TWO + "images: 64\nout: ~/there\n").out == str(tmp_path / "there")
    three = TWO + "  c: {config: vits16}\nimages: 64\n"
    assert list(read(three, "recipes.b=null", "seeds=[7]").named_recipes) == ["a", "c"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], r"images must be 1 or more, got 0"),
        (["images=64", "recipes.b=null"], r"needs two recipes or more, got \['a'\]"),
        (["images=64", "recipes.b=5"], r"recipes.b wants \{config: FILE, overrides: .*\}, got 5"),
        (["images=64", "recipes.b={config: tiny, override: []}"], r"recipes.b wants .*'override'"),
        (["images=64", "recipes.b={config: tiny, overrides: [1]}"], r"recipes.b wants"),
        (["images=64", "overrides=[seed=3]"], r"recipes.a: seed=3 is set by the comparison itself; leave it out"),
        (["images=64", "overrides=[checkpoint.keep_last=3]"], r"checkpoint.keep_last=3 is set by the comparison"),
        (["images=64", "equal=[seconds]"], r"equal must be images, and after it any of seconds and flops, got"),
        (["images=64", "equal=[images,hours]"], r"equal must be .*'hours'"),
        (["images=64", "seeds=[0,0]"], r"seeds names something twice, got \[0, 0\]"),
        (["images=64", "seeds=[-1]"], r"seeds must be 0 or more"),
        (["images=64", "probes=0"], r"probes must be 1 or more, got 0"),
        (["imges=64"], r"unknown config key imges; did you mean images\?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(read, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        read(TWO, *overrides)
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_folder_is_refused(read):
    with pytest.raises(ValueError, match=r"a name is of letters, digits, - and _"):
        read(TWO + "  ../c: {config: tiny}\nimages: 64\n")
