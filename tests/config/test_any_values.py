"""Whatever a config says: it is taken by all checks before the first step, or refused in a line that names the key."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st

from ijepa_scale.config import OBJECTIVE_SECTIONS, CompareConfig, PretrainConfig, load_comparison, load_config
from ijepa_scale.engine import zero
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.evals.tasks import TASKS
from ijepa_scale.evaluate import Request, check_request
from ijepa_scale.run.records import read_records
from ijepa_scale.run.setup import check, set_up
from tests.config.drawn import names_one, some_values, written
from tests.data.small_sources import write_images
from tests.processes import pretrain, run_ranks, undrawn

# Texts of these are free: a folder of any name would be made.
PLACES = ("run_dir", "data.cache_dir", "data.source", "model.init_from", "logging.wandb_project")
TOY = """\
data: {source: %s, image_size: 32, crop_scale: [0.5, 1.0], workers: 0}
model: {name: vit_tiny, patch_size: 8, width: 32, depth: 2, heads: 2}
optimization: {global_batch_size: 8, max_steps: 2, epochs: 4, warmup_epochs: 1, lr: 1e-3, ema: [0.9, 1.0]}
logging: {health_every_steps: 0}
report: {train_images: 0}
"""
OWN = {
    "ijepa": "predictor: {width: 16, depth: 1}\nmask: {min_keep: 1}\n",
    "data2vec": "predictor: {width: 16, depth: 1}\ndata2vec: {top_layers: 2, masks_an_image: 2}\n",
    "mae": "mae: {decoder_width: 16, decoder_depth: 1, decoder_heads: 2}\n",
    "cae": "cae: {regressor_depth: 1, decoder_depth: 1}\n",
    "sketch": "predictor: {width: 16, depth: 1}\nsketch: {width: 16, depth: 1, heads: 2, perceptual: 0, kind: flow}\n",
}
drawn = functools.partial(
    settings,
    deadline=None,  # other tests share the machine
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


class ReachedError(Exception):
    """All checks are passed."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "set"
    write_images(root, range(16))
    return root


@pytest.fixture
def judge(tmp_path, monkeypatch, images):
    """A function of YAML: "" where a run would come to its networks, else why not; other errors are raised."""

    def reached(*arguments: Any, **options: Any) -> None:
        raise ReachedError

    monkeypatch.setattr(zero, "building_context", reached)
    monkeypatch.setattr("ijepa_scale.run.frozen.initial_weights", lambda *given: (None, {}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def judge(text: str) -> str:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            config = load_config(path)
            ranks = Ranks(0, 1, 0, torch.device("cpu"))
            set_up(config, check(config), ranks, resume="auto", allow_changes=False)
        except (ValueError, OSError) as error:
            return str(error) or repr(error)
        except ReachedError:
            return ""
        raise AssertionError("set up")

    return judge


def base_of(objective: str, images: Path) -> str:
    return f"objective: {{name: {objective}}}\n{TOY % images}{OWN[objective]}"


def sections_of_others(objective: str) -> tuple[str, ...]:
    own = OBJECTIVE_SECTIONS[objective]
    return tuple(name for names in OBJECTIVE_SECTIONS.values() for name in names if name not in own)


@pytest.mark.parametrize("objective", OWN)
def test_the_toys_pass_all_checks(judge, images, objective):
    assert judge(base_of(objective, images)) == ""


MET = [  # once taken and fatal later, or refused under another key's name
    ("ijepa", {"engine.hang_seconds": 1e12}),
    ("ijepa", {"data.crop_scale": {}}),
    ("ijepa", {"optimization.micro_batch_size": 52}),
    ("ijepa", {"optimization.weight_decay": [0.1, float("nan")]}),
    ("ijepa", {"mask.target_aspect_ratio": [1.0, float("inf")]}),
    ("ijepa", {"mask.num_target_blocks": 10**9}),
    ("ijepa", {"model.heads": 3}),
    ("ijepa", {"predictor.width": 18}),
    ("ijepa", {"model.width": 2**16, "model.depth": 40}),
    ("mae", {"model.depth": 10**9}),
    ("mae", {"mae.decoder_heads": 3}),
    ("mae", {"engine.deepspeed": {"steps_per_print": "x"}}),
    ("mae", {"engine.deepspeed": {"timers": 3}}),
    ("mae", {"engine.deepspeed": {"comet": {"enabled": True}}}),
    ("mae", {"engine.deepspeed": {"zero_optimization": {"reduce_bucket_size": -1}}}),
    ("cae", {"data.workers": 10**6}),
]


@pytest.mark.parametrize("objective, values", MET, ids=str)
def test_what_was_met_is_refused_by_name(judge, images, objective, values):
    assert names_one(judge(written(base_of(objective, images), values)), values)


def assert_taken_or_named(judge, images, objective, values):
    said = judge(written(base_of(objective, images), values))
    event("refused" if said else "taken")
    assert not said or names_one(said, values), (said, values)


pretraining = st.sampled_from(sorted(OWN)).flatmap(
    lambda name: st.tuples(
        st.just(name), some_values(PretrainConfig, less=(*PLACES, "objective", *sections_of_others(name)))
    )
)


@drawn(max_examples=15)
@given(case=pretraining)
def test_any_values_are_taken_or_refused_by_name(judge, images, case):
    assert_taken_or_named(judge, images, *case)


@pytest.mark.slow
@drawn(max_examples=800)
@given(case=pretraining)
def test_any_values_are_taken_or_refused_by_name_at_length(judge, images, case):
    assert_taken_or_named(judge, images, *case)


@pytest.mark.slow
@drawn(max_examples=12, phases=[Phase.generate])
@given(case=pretraining)
def test_what_is_taken_trains_and_what_is_refused_ends_before(judge, images, tmp_path_factory, case):
    """The command itself: two steps, or the line of the checks and exit code 2."""
    objective, values = case
    assume(objective != "sketch")  # which wants a run to be of
    text, folder = written(base_of(objective, images), values), tmp_path_factory.mktemp("run")
    said = judge(text)
    # Large networks and long reports that are taken would take minutes.
    small = all(-100 < value < 100 for value in values.values() if isinstance(value, int | float))
    assume(said or small)
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    words = ("--config", str(folder / "x.yaml"), f"run_dir={folder}/run", "optimization.stop_at_step=2")
    (end,) = run_ranks(undrawn, 1, folder / "output", pretrain, *words, timeout=300)
    assert "Traceback" not in end.output, end.output
    if said:
        errors = [line for line in end.output.splitlines() if line.startswith("error: ")]
        assert (end.code, len(errors)) == (2, 1), (values, end.output)
        assert not list(folder.glob("run/metrics.jsonl"))
    else:
        assert end.code == 0, (values, end.output)
        records = read_records(folder / "run/metrics.jsonl")
        assert [record["step"] for record in records if record["kind"] == "step"] == [0, 1]


def words_of(values: dict[str, Any]) -> list[str]:
    shown = {key: yaml.safe_dump(value, default_flow_style=True, width=10**6) for key, value in values.items()}
    return [f"{key}={text.strip().removesuffix('...').strip()}" for key, text in shown.items()]


of_tasks = st.sampled_from(sorted(TASKS)).flatmap(
    lambda name: st.tuples(st.just(name), some_values(type(TASKS[name].usual[0]), most=2))
)


@drawn(max_examples=30)
@given(case=of_tasks)
def test_any_settings_of_a_task_are_taken_or_refused_by_name(case):
    """Before an encoder or images are opened: there are none."""
    name, values = case
    try:
        check_request(Request(task=name, checkpoint="none", data="none", overrides=words_of(values)))
    except ValueError as error:
        assert names_one(str(error), values), (str(error), values)


RECIPES = "recipes: {a: {config: tiny}, b: {config: mae_small}}\nimages: 128\n"


@drawn(max_examples=30)
@given(values=some_values(CompareConfig, less=("out",), most=2))
def test_any_comparison_is_taken_or_refused_by_name(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("compare") / "x.yaml"
    path.write_text(written(RECIPES, values), encoding="utf-8")
    try:
        load_comparison(path)
    except ValueError as error:
        assert names_one(str(error), values), (str(error), values)
