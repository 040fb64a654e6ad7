"""launch/benchmark.py, end to end at a small size. How fast anything is, is not asked here."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from ijepa_scale import build
from ijepa_scale.benchmark import step as benchmark
from ijepa_scale.benchmark.timing import WARM_UP, turns
from ijepa_scale.config import load_config
from ijepa_scale.engine import distributed
from ijepa_scale.engine.device import peak_flops
from ijepa_scale.objectives.flops import Counts
from tests import processes
from tests.benchmark import worker_benchmark
from tests.processes import ROOT, assert_all, run_ranks

SMALL = ["model.depth=1", "model.width=24", "predictor.width=24", "predictor.depth=1"]
TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.mark.slow
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
    assert found["precision"] == "fp32" and not any({"mfu", "state_bytes"} & row.keys() for row in found["steps"])


@pytest.mark.slow  # bf16 takes a CPU without instructions for it half a minute
def test_compiled_in_bf16_with_a_trace(tmp_path):
    arguments = ["--config", TINY, "--steps", "1", *SMALL, "optimization.micro_batch_size=2", "engine.precision=bf16"]
    arguments += ["--json", str(tmp_path / "deep" / "out.json"), "--profile", str(tmp_path / "trace")]
    arguments += ["engine.compile=true"]
    (end,) = run_ranks(processes.benchmark, 1, tmp_path, *arguments)
    assert end.code == 0, end.output
    found = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert [row["name"] for row in found["steps"]] == [
        "dense baseline",
        "ijepa-scale",
        "ijepa-scale, compiled",
        "ijepa-scale, all context",
        "ijepa-scale, compiled, all context",
    ]
    assert found["precision"] == "bf16" and (tmp_path / "trace" / "trace.json.gz").is_file()
    profile = found["profile"]
    assert len(profile["costliest"]) == 10 and 0 < profile["gaps"]["share"] < 1
    for words in (
        "ijepa-scale, compiled, all context: a step takes",
        profile["costliest"][0]["name"],
        "No operation runs for",
    ):
        assert words in end.output
    assert "KINETO" not in end.output and "USDT" not in end.output


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved_for_all_runs(tmp_path):
    overrides = [*SMALL, "optimization.micro_batch_size=8"]
    for most, batch in ((3, 2), (0, None)):
        out = tmp_path / f"{most}.json"
        assert_all(
            run_ranks(
                worker_benchmark.short_of_memory, 1, tmp_path / f"{most}", TINY, overrides, most, str(out), timeout=60
            )
        )
        found = json.loads(out.read_text())
        assert found["models_at_once"] == 1, "what did not fit is freed before the next attempt"
        if batch:
            assert (found["batch"], found["batch_asked"]) == (batch, 8)
            assert sum("begin again" in line for line in found["said"]) == 2
        else:
            assert "no step fits" in found["error"] and "Tried to allocate 1 GiB." in found["error"]
            assert "more words" not in found["error"]


def test_the_step_attends_as_training_does(tmp_path):
    out = tmp_path / "out.json"
    overrides = [*SMALL, "optimization.micro_batch_size=2"]
    assert_all(run_ranks(worker_benchmark.with_a_kernel, 1, tmp_path, TINY, overrides, str(out)))
    found = json.loads(out.read_text())
    assert found["attention"] == "counting"
    # A first step, then four rounds of warm-up and one timed, each on two kinds of masks; in two networks of one block.
    assert found["calls"] == (1 + 5 * 2) * 2


def test_each_round_has_the_masks_that_its_flops_are_counted_of(monkeypatch, tmp_path):
    config = load_config("tiny", [*SMALL, "engine.compile=true"])
    objective, device = build.build_ijepa(config), torch.device("cpu")
    rounds, taken = 3, []
    equal, ragged = (
        [benchmark.sampled_masks(objective, 2, step, context) for step in range(rounds + WARM_UP)]
        for context in ("batch_min", "all")
    )

    def train_step(run, step, feed, **given):
        taken.append(feed.take().masks)
        feed.load()

    monkeypatch.setattr(benchmark, "run_in_memory", lambda *_, **__: mock.Mock(engine=mock.Mock(module=nn.Module())))
    monkeypatch.setattr(benchmark, "attention_of", lambda run: "sdpa")
    monkeypatch.setattr(benchmark, "train_step", train_step)
    ranks = distributed.Ranks(0, 1, 0, device)
    setting = benchmark.Setting(config, objective, ranks, "fp32", 2)
    runs, _ = benchmark.training_runs(setting, equal, ragged, tmp_path)
    assert [run.name for run in runs] == [
        "ijepa-scale",
        "ijepa-scale, compiled",
        "ijepa-scale, all context",
        "ijepa-scale, compiled, all context",
    ]
    assert len(taken) == 1, "a first step, which makes the optimizer's state"
    taken.clear()
    for run in runs:
        turns([run], rounds, lambda text: None, device)
        flops = [objective.flops.model(Counts.of(masks)) for masks in taken[WARM_UP:]]
        assert flops == run.flops[:rounds] and len(set(run.flops)) == rounds + WARM_UP
        taken.clear()


def test_products_of_any_size_take_about_as_long():
    assert benchmark.repeats(2 * 8192.0**3) == 18
    assert benchmark.repeats(1e14) == 1
    assert benchmark.repeats(3e6) == 1000  # starting them takes longest: as many as FLOPs ask for would take minutes


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "launch" / "benchmark.py", "--config", TINY, "--steps", "2", *SMALL]
    command += ["optimization.micro_batch_size=4", "--json", out, "--profile", tmp_path / "trace"]
    command += ["engine.compile=true"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["steps"]] == [
        "dense baseline",
        "ijepa-scale",
        "ijepa-scale, compiled",
        "ijepa-scale, all context",
        "ijepa-scale, compiled, all context",
    ]
    assert found["precision"] == "bf16" and found["machine"]["gpu"] == torch.cuda.get_device_name()
    for row in found["steps"]:
        assert row["state_bytes"] > 0 and row["step_bytes"] > 0
        assert ("mfu" in row) == (peak_flops(found["machine"]["gpu"], "bf16") is not None)
    assert len({row["state_bytes"] for row in found["steps"][1:]}) == 1 and len(found["steps"]) == 5
    if torch.cuda.get_device_capability()[0] >= 8:
        assert found["attention"] != "sdpa"
    assert found["profile"]["of"] == "kernels" and found["profile"]["costliest"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["loss.kind=l2"], "smooth_l1"),
        (["loss.target_layers=[1,2]"], "the last output alone"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_wrong_input(tmp_path, arguments, words):
    (end,) = run_ranks(processes.benchmark, 1, tmp_path, "--config", TINY, *arguments)
    assert end.code == 2 and words in end.output
