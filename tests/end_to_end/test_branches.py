"""Starting a run from another's checkpoint, and what may not change on a resume."""

import pytest

from ijepa_scale.run.records import read_records
from tests.end_to_end.runs import Runs, steps_of


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    return Runs(small_config, tmp_path_factory.mktemp("branches"))


@pytest.fixture(scope="module")
def first(runs, tmp_path_factory):
    return whole_run(runs, tmp_path_factory.mktemp("runs") / "first")


def whole_run(runs, folder, *options):
    runs(folder, "checkpoint.keep_last=5", *options, ranks=1)
    assert names(folder) == ["step-00000004", "step-00000008", "step-00000012"]
    return folder


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def wandb_ids(folder):
    return {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}


@pytest.mark.slow
def test_a_branch_goes_on_from_its_own_checkpoints_under_an_id_of_its_own(runs, tmp_path):
    first, branch = whole_run(runs, tmp_path / "first", "logging.wandb=offline"), tmp_path / "branch"
    start = ["--resume", str(first / "checkpoints" / "step-00000004"), "logging.wandb=offline"]
    (end,) = runs(branch, *start, "optimization.stop_at_step=6", ranks=1)
    assert "resumed from" in end.output and names(branch) == ["step-00000006"]
    (end,) = runs(branch, *start, ranks=1)
    assert "step-00000006, step 6" in end.output and "where it started" in end.output
    assert steps_of(branch) == steps_of(first)[4:]
    assert len(wandb_ids(branch)) == 1 and wandb_ids(branch) != wandb_ids(first)
    (end,) = runs(tmp_path / "late", "--resume", str(first / "checkpoints" / "step-00000012"), ranks=1, code=2)
    assert "is at step 12 and this run ends at step 12" in end.output


def test_a_fresh_start_keeps_the_metrics_of_a_run_that_never_saved(first, runs, tmp_path):
    (tmp_path / "run").mkdir()
    records = (first / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(records)
    (end,) = runs(tmp_path / "run", "optimization.stop_at_step=1", ranks=1)
    assert "starting from scratch" in end.output
    assert (tmp_path / "run" / "metrics.jsonl.old").read_text() == records
    assert len(steps_of(tmp_path / "run")) == 1 and read_records(tmp_path / "run" / "metrics.jsonl")[0]["step"] == 0


@pytest.mark.parametrize("change", ["engine.precision=bf16", "engine.deepspeed.zero_optimization.overlap_comm=true"])
def test_precision_and_raw_settings_are_no_free_keys(first, runs, change):
    (end,) = runs(first, change, "optimization.stop_at_step=13", ranks=1, code=2)
    assert "alter training" in end.output and change.split("=")[0] in end.output
