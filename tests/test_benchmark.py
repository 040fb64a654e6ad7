"""launch/benchmark.py, end to end at a small size. How fast anything is, is not asked here."""

import json

import pytest

from ijepa_scale import benchmark
from tests import processes
from tests.processes import ROOT, run_ranks

SMALL = ["model.depth=1", "model.width=24", "predictor.width=24", "predictor.depth=1"]
TINY = str(ROOT / "configs" / "tiny.yaml")


def test_the_verb_times_and_writes_everything(tmp_path):
    written = tmp_path / "out.json"
    arguments = ["--config", TINY, "--steps", "2", *SMALL, "optimization.micro_batch_size=4", "--json", str(written)]
    (end,) = run_ranks(processes.benchmark, 1, tmp_path, *arguments)
    assert end.code == 0, end.output
    for words in ("round 2 of 2", "dense baseline", "they say nothing about GPUs"):
        assert words in " ".join(end.output.split())
    found = json.loads(written.read_text())
    assert found["batch"] == 4 and found["rounds"] == 2 and found["machine"]["threads"] >= 1
    baseline, ours, whole = found["steps"]
    assert (baseline["speedup"]["low"], baseline["cpu_speedup"]["high"]) == (1.0, 1.0)
    for row in found["steps"]:
        for key in ("images_per_second", "tokens_per_second", "gflop_per_second", "speedup"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
        assert row["share_of_matmul"] == row["gflop_per_second"]["median"] / found["matmul_gflop_per_second"]
    # The same masks cost less here: rows that nothing reads are dropped. All the context sampled costs more.
    assert (
        0.6 < ours["gflop_per_step"] / baseline["gflop_per_step"] < 1 < whole["gflop_per_step"] / ours["gflop_per_step"]
    )
    assert found["matmul_gflop_per_second"] == max(rate["median"] for rate in found["matmuls"].values())


def test_turns_reverse_and_warm_up_is_not_kept():
    order, says = [], []
    runs = [benchmark.Timed(name, lambda index, name=name: order.append((name, index)), [1.0]) for name in "ab"]
    benchmark.turns(runs, 2, says.append)
    assert order[-4:] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert [len(run.wall) for run in runs] == [2, 2] and len(says) == benchmark.LAYOUTS + 2


@pytest.mark.parametrize(
    "arguments, words",
    [(["loss.kind=l2"], "smooth_l1"), (["--steps", "0"], "--steps")],
)
def test_wrong_input(tmp_path, arguments, words):
    (end,) = run_ranks(processes.benchmark, 1, tmp_path, "--config", TINY, *arguments)
    assert end.code == 2 and words in end.output


def test_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "BASELINE", tmp_path / "dense_jepa.py")
    with pytest.raises(ValueError, match="from a checkout"):
        benchmark.load_baseline()
