"""An objective that the package has never heard of trains as I-JEPA does: at every ZeRO stage, with its records."""

import json

import pytest

from ijepa_scale.run.records import read_records
from tests.objectives.pixels import pretrain_pixels
from tests.processes import assert_all, run_ranks, undrawn


@pytest.fixture(scope="module")
def records(small_config, tmp_path_factory):
    """Of each stage, and of one process: all records, by name of the run."""
    found = {}
    for name, ranks, stage in (("alone", 1, 1), ("zero1", 2, 1), ("zero2", 2, 2), ("zero3", 2, 3)):
        folder = tmp_path_factory.mktemp(name)
        overrides = (f"run_dir={folder}/run", f"engine.zero_stage={stage}", "optimization.lr=3e-3")
        more = ("optimization.max_steps=24", "checkpoint.every_steps=12", "logging.health_every_steps=24")
        more += ("report.train_images=32", "report.test_images=16") if name == "zero3" else ()
        worker = (pretrain_pixels, str(small_config), *overrides, *more)
        drawn = name in ("alone", "zero3")
        target, *words = worker if drawn else (undrawn, *worker)
        assert_all(run_ranks(target, ranks, folder, *words))
        found[name] = read_records(folder / "run" / "metrics.jsonl")
        assert not drawn or (folder / "run" / "masks.png").stat().st_size > 10_000
        assert len(list((folder / "run" / "checkpoints").glob("step-*"))) == 2
    assert len(json.loads((folder / "run" / "report.json").read_text())["scores"]) == 2
    return found


def test_it_learns_alike_at_every_stage(records):
    losses = {name: [r["loss"] for r in found if r["kind"] == "step"] for name, found in records.items()}
    for name, values in losses.items():
        assert len(values) == 24 and values == pytest.approx(losses["alone"], abs=2e-6), name
    assert losses["alone"][-1] < 0.6 * losses["alone"][0]


def test_its_own_counts_and_terms_are_recorded_and_none_of_another(records):
    step = next(record for record in records["zero3"] if record["kind"] == "step")
    assert step["seen_tokens"] == 8 * 32 and step["model_flops"] == 2e6 and step["loss_pixels"] == step["loss"]
    assert not {"context_tokens", "target_tokens"} & step.keys()


def test_its_health_is_that_of_its_one_encoder(records):
    health = [record for record in records["zero2"] if record["kind"] == "health"]
    assert len(health) == 2 and all(record["feature_std"] > 0 and "drift" not in record for record in health)
