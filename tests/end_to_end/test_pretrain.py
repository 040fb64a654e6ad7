"""launch/pretrain.py as a user runs it: the real launcher, real processes, what is printed and what is left behind."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale import train
from ijepa_scale.build import build_ijepa
from ijepa_scale.config import load_config
from ijepa_scale.engine.distributed import alone
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.train import RunError, explained_memory_errors
from tests.end_to_end import worker_faults
from tests.processes import assert_all, free_port, pretrain, run_ranks, start_ranks, undrawn

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONFIG = """
data: {image_size: 32, workers: 1, max_bad_fraction: 0.2}
model: {name: vit_tiny, width: 32, depth: 2, heads: 2, patch_size: 4}
predictor: {width: 16, depth: 1}
mask: {min_keep: 4}
optimization: {global_batch_size: 16, epochs: 2, warmup_epochs: 1}
logging: {health_every_steps: 3, health_images: 32}
report: {train_images: 32, test_images: 16}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG)
    return path


def draw_images(folder, count, *, classes=()):
    rng = np.random.default_rng(0)
    for i in range(count):
        name = folder / (classes[i % len(classes)] if classes else "deep/er") / f"{i:03}.jpg"
        name.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((48, 40 + i % 5), Image.Resampling.BICUBIC).save(name)


def run(command, *, cwd, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def launcher(ranks=2):
    return ["deepspeed", "--num_gpus", ranks, "--master_port", free_port(), ROOT / "launch" / "pretrain.py"]


def without_torch(*arguments, code):
    """launch/pretrain.py in a process that must end with the code, before torch is imported."""
    script = (
        f"import runpy, sys; sys.argv = ['pretrain.py', *{arguments!r}]\n"
        f"try:\n    runpy.run_path({str(ROOT / 'launch' / 'pretrain.py')!r}, run_name='__main__')\n"
        f"except SystemExit as stop:\n    assert (stop.code or 0) == {code}, stop.code\n"
        "assert not {'torch', 'deepspeed', 'datasets'} & set(sys.modules)"
    )
    result = run([sys.executable, "-c", script], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize(
    "source, words",
    [
        ("data.source=/no/where", "error: there is no folder '/no/where'"),
        ("'data.source=[{path: scenes}, {path: /no/where}]'", "error: there is no folder '/no/where'"),
        ("data.source=", "error: data.source is not set: give"),
        ("data.source='/no/where-{0..3}.tar'", "error: '/no/where-{0..3}.tar' can be streamed only"),
        ("data.source='/no/where-{0..3}.tar' data.streaming=true", "error: /no/where-0.tar is missing, one of 4"),
    ],
)
def test_a_source_that_is_nowhere_is_refused_at_once(source, words):
    assert words in without_torch("--config", "small_images", *shlex.split(source), code=2).stderr


def test_help_needs_no_torch():
    result = without_torch("--help", code=0)
    assert "key.sub=value" in result.stdout and "--resume" in result.stdout and "75" in result.stdout


def test_a_folder_of_unlabelled_images_on_two_ranks_with_one_torn_file(config, tmp_path):
    draw_images(tmp_path / "images", 40)
    (tmp_path / "images" / "deep" / "er" / "007.jpg").write_bytes(b"\xff\xd8 torn")
    command = [*launcher(), "--config", config, "data.source=images", f"data.cache_dir={tmp_path / 'cache'}"]
    result = run([*command, "run_dir=out", "logging.wandb=offline"], cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "out"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [0, 1, 2, 3]  # 2 epochs of floor(40 / 16)
    for key in [
        "step",
        "epoch",
        "loss",
        "lr",
        "weight_decay",
        "ema_momentum",
        "grad_norm",
        "context_tokens",
        "target_tokens",
        "images_per_second",
        "data_wait_seconds",
        "data_wait_worst_seconds",
        "slowest_rank_seconds",
        "mean_rank_seconds",
        "step_seconds",
        "memory_bytes",
        "model_flops",
        "hardware_flops",
        "flops_per_second_per_device",
    ]:
        assert all(isinstance(record[key], int | float) for record in steps), key
    objective = build_ijepa(load_config(config))
    for record in steps:  # of both ranks' images; a CPU's peak is not known
        masks = objective.draw_masks(record["step"], range(16))
        assert record["model_flops"] == objective.flops.model(Counts.of(masks))
        assert record["flops_per_second_per_device"] == record["model_flops"] / record["step_seconds"] / 2
        assert not {"mfu", "hfu"} & record.keys()
    assert all(0 < record["loss"] < 2 and record["grad_norm"] > 0 for record in steps)
    assert [record["step"] for record in records if record["kind"] == "health"] == [0, 3, 4]
    bad = [record for record in records if record["kind"] == "bad_image"]
    assert len(bad) == 1 and bad[0]["sample"].endswith("007.jpg")
    assert result.stdout.count("007.jpg") == 1, "named once, by rank 0 alone"
    for name in ("loss_curve.png", "masks.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("L").getcolors(1 << 20)) > 20
    assert "no labels" in json.loads((folder / "report.json").read_text())["note"]
    assert "finished after 4 of 4 steps" in (folder / "report.html").read_text()
    assert "width: 32" in (folder / "config.yaml").read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["attention"] == "sdpa"
    assert result.stdout.count("attention: sdpa (") == 1
    manifest = json.loads((folder / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-00000004"
    assert list((folder / "wandb").glob(f"offline-run-*-{manifest['wandb_id']}"))


def test_classes_on_two_ranks_report_probes_and_a_finished_run_says_so(config, tmp_path):
    draw_images(tmp_path / "images" / "train", 48, classes=("cat", "dog"))
    draw_images(tmp_path / "images" / "val", 21, classes=("cat", "dog"))
    arguments = ["--config", str(config), f"data.source={tmp_path / 'images'}", f"run_dir={tmp_path / 'out'}"]
    arguments += [f"data.cache_dir={tmp_path / 'cache'}"]
    ends = run_ranks(pretrain, 2, tmp_path / "first", *arguments)
    assert_all(ends)
    assert "Traceback" not in ends[0].output and not ends[1].output, "only rank 0 speaks"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"] and report["train_images"] == 32
    assert [score["probe"] for score in report["scores"]] == ["k-NN label", "linear label"]
    assert all(score["num_test"] == 16 and 0 <= score["trained"] <= 100 for score in report["scores"])
    assert (tmp_path / "out" / "scores.png").is_file()
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all("knn" in record for record in records if record["kind"] == "health")
    (again,) = run_ranks(pretrain, 1, tmp_path / "second", *arguments)
    assert again.code == 0 and "is finished at step 6" in again.output and "another run_dir" in again.output


def test_a_few_labelled_images_without_a_validation_split_are_shared_out(config, tmp_path):
    draw_images(tmp_path / "images", 48, classes=("cat", "dog"))
    arguments = ["--config", str(config), f"data.source={tmp_path / 'images'}", f"run_dir={tmp_path / 'out'}"]
    arguments += ["optimization.max_steps=1", "report.train_images=4000", f"data.cache_dir={tmp_path / 'cache'}"]
    (end,) = run_ranks(undrawn, 1, tmp_path, pretrain, *arguments)
    assert end.code == 0, end.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not report["held_out"] and report["train_images"] == 32
    assert [score["num_test"] for score in report["scores"]] == [16, 16]
    assert "were among the training images" in end.output


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    draw_images(folder, 5)
    return folder


@pytest.fixture(scope="module")
def specks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("specks")
    Image.new("RGB", (3, 3)).save(folder / "small.png")
    return folder


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "data.source is not set"),
        (["optimization.lr=fast"], "optimization.lr"),
        (["data.source={few}", "mask.min_keep=60"], "mask.min_keep"),
        (["data.source=nowhere/at/all"], "nowhere/at/all"),
        (["data.source={specks}", "optimization.global_batch_size=2"], "1 images, fewer than"),
        (["data.source={specks}", "optimization.global_batch_size=1"], "small.png"),
        (["data.source={few}", "engine.deepspeed.fp16={{enabled: true}}"], "engine.deepspeed.fp16"),
        (["data.source={few}", "model.attention=fa3", "engine.precision=fp32"], "model.attention=fa3 "),
        (["data.source={few}", "--resume", "{few}"], "manifest.json"),
    ],
)
def test_wrong_input_is_one_line_with_exit_code_2(config, few, specks, tmp_path, arguments, words):
    given = [argument.format(few=few, specks=specks) for argument in arguments]
    common = [f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'out'}"]
    if "--resume" in given:
        common.append("optimization.global_batch_size=4")
    (end,) = run_ranks(pretrain, 1, tmp_path, "--config", str(config), *common, *given)
    lines = [line for line in end.output.splitlines() if line.startswith("error: ")]
    assert end.code == 2 and len(lines) == 1 and words in lines[0], end.output
    assert "Traceback" not in end.output


def test_each_line_of_the_log_is_printed_once(config, few, tmp_path):
    (end,) = run_ranks(worker_faults.hub_that_warns, 1, tmp_path, "--config", str(config), f"data.source={few}")
    assert end.code == 2
    for name in ("huggingface_hub", "ijepa_scale"):
        assert end.output.count(f"a line of {name}\n") == 1, end.output


def test_wrong_input_on_several_ranks_ends_all_and_is_said_once(config, few, tmp_path):
    arguments = ["--config", str(config), f"data.source={few}", f"run_dir={tmp_path / 'out'}"]
    ends = run_ranks(pretrain, 2, tmp_path, *arguments, f"data.cache_dir={tmp_path / 'cache'}")
    assert_all(ends, code=2)
    assert ends[0].output.count("5 images, fewer than optimization.global_batch_size 16") == 1
    assert "error" not in ends[1].output


def test_too_many_bad_images_stop_the_run_on_all_ranks_with_their_list(config, tmp_path):
    draw_images(tmp_path / "images", 40)
    for i in range(0, 40, 3):
        (tmp_path / "images" / "deep" / "er" / f"{i:03}.jpg").write_bytes(b"\xff\xd8 torn")
    arguments = ["--config", str(config), f"data.source={tmp_path / 'images'}", f"run_dir={tmp_path / 'out'}"]
    ends = run_ranks(pretrain, 2, tmp_path, *arguments, f"data.cache_dir={tmp_path / 'cache'}")
    assert_all(ends, code=1)
    output = ends[0].output
    assert "more than data.max_bad_fraction 0.2" in output and "Traceback" not in output
    assert len(set(re.findall(r"deep/er/\d+\.jpg", output.split("max_bad_fraction")[-1]))) > 8


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_ends_the_others_which_name_it(config, tmp_path, stopped):
    draw_images(tmp_path / "images", 40)
    arguments = ["--config", str(config), f"data.source={tmp_path / 'images'}", f"run_dir={tmp_path / 'out'}"]
    arguments += [f"data.cache_dir={tmp_path / 'cache'}", "optimization.max_steps=100000", "engine.hang_seconds=5"]
    ranks = start_ranks(pretrain, 2, tmp_path, *arguments)
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("grad_norm") > 2):
        assert time.monotonic() < deadline and ranks.processes[0].is_alive(), ranks.logs[0].read_text()
        time.sleep(0.1)
    os.kill(ranks.pid(stopped), signal.SIGSTOP)
    ranks.processes[1 - stopped].join(30)
    os.kill(ranks.pid(stopped), signal.SIGKILL)
    end = ranks.wait()[1 - stopped]
    assert end.code == 1 and "in loop" in end.output
    assert f"error: rank {1 - stopped} (" in end.output and "more than engine.hang_seconds=5 seconds: " in end.output
    who = "the first rank" if stopped == 0 else f"rank 1 ({socket.gethostname()}, pid {ranks.pid(1)})"
    assert f"seconds: {who} gives no sign any more: it is stopped, or its machine is gone; the same" in end.output


@pytest.mark.slow
def test_a_loader_that_hangs_ends_all_ranks_which_name_its_own(config, tmp_path):
    draw_images(tmp_path / "images", 40)
    arguments = ["--config", str(config), f"data.source={tmp_path / 'images'}", f"run_dir={tmp_path / 'out'}"]
    arguments += [f"data.cache_dir={tmp_path / 'cache'}", "optimization.max_steps=100", "engine.hang_seconds=5"]
    ends = run_ranks(worker_faults.stuck_loader, 2, tmp_path, "1", "3", *arguments)
    for end in ends:
        assert end.code == 1
        assert re.search(
            r"seconds: rank 1 \(\S+, pid \d+\) has been waiting for the images of step \d+ for \d+ s;", end.output
        )


@pytest.mark.parametrize(
    "facts, advice",
    [
        ((), r"lower optimization.micro_batch_size \(for example 32"),
        (("images_in_statistics",), "start anew, in another run_dir, with a smaller optimization.micro_batch_size"),
    ],
)
def test_out_of_memory_names_the_micro_batch(facts, advice):
    run = SimpleNamespace(
        ranks=SimpleNamespace(device="cuda:0"),
        dataset=SimpleNamespace(micro_batch_size=64),
        objective=SimpleNamespace(batch_facts=lambda: facts),
    )
    message = f"64 images a micro-batch; .*{advice}"
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ):
        with pytest.raises(RunError, match=message), explained_memory_errors(run):
            raise error
    with pytest.raises(RuntimeError, match="another"), explained_memory_errors(run):
        raise RuntimeError("another error passes as it is")


@pytest.mark.parametrize(
    "error, local",
    [(OSError(28, "No space left on device", "report.json"), True), (ValueError("none can be used"), False)],
)
def test_a_report_that_cannot_be_made_says_how_it_comes_about(monkeypatch, tmp_path, error, local):
    finished = SimpleNamespace(
        start_step=4, horizon=SimpleNamespace(stop=4), notes=[], folder=SimpleNamespace(path=tmp_path), engine=0, ema=0
    )
    monkeypatch.setattr(train, "set_up", lambda *given, **options: finished)
    monkeypatch.setattr(train, "report", mock.Mock(side_effect=error))
    with pytest.raises(
        RunError, match=r"report could not be made: .*(space|used).* the same command makes it"
    ) as caught:
        train.run_on(alone(), None, None, None, mock.Mock(), resume="auto", allow_changes=False)
    assert caught.value.local == local  # a disk's error is one rank's


def run_code(code):
    os.chdir(ROOT)
    exec(code, {"__name__": "__main__"})


def test_the_examples_of_the_docs_run(tmp_path):
    text = (ROOT / "docs" / "python.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    (end,) = run_ranks(run_code, 1, tmp_path, code)
    assert end.code == 0, end.output
    assert "torch.Size([2, 64, 192])" in end.output


def junk(folder, share):
    """Of every split's images the last part, by name, become text."""
    files = sorted(folder.rglob("*.jpg"))
    for file in files[int(len(files) * (1 - share)) :]:
        file.write_text("no image")


def test_a_validation_split_of_junk_is_found_before_training(config, tmp_path):
    draw_images(tmp_path / "images" / "train", 32, classes=("cat", "dog"))
    draw_images(tmp_path / "images" / "val", 16, classes=("cat", "dog"))
    junk(tmp_path / "images" / "val", 1)
    arguments = ["--config", str(config), f"data.source={tmp_path / 'images'}", f"run_dir={tmp_path / 'out'}"]
    (end,) = run_ranks(pretrain, 1, tmp_path / "a", *arguments)
    assert end.code == 2 and "Traceback" not in end.output, end.output
    assert "error: images:validation: 16 of 16 images sampled cannot be used" in end.output
    arguments += ["report.train_images=0", "optimization.max_steps=1", "logging.health_every_steps=0"]
    (end,) = run_ranks(undrawn, 1, tmp_path / "b", pretrain, *arguments)  # nothing looks at it
    assert end.code == 0, end.output


@pytest.mark.slow
def test_images_that_become_unreadable_are_left_out_of_the_probes_and_without_any_the_run_says_so(config, tmp_path):
    """On two ranks, after the run: half of them, with their labels; then all, of which the checkpoint knows nothing."""
    draw_images(tmp_path / "images" / "train", 32, classes=("cat", "dog"))
    draw_images(tmp_path / "images" / "val", 16, classes=("cat", "dog"))
    arguments = ["--config", str(config), f"data.source={tmp_path / 'images'}", f"run_dir={tmp_path / 'out'}"]
    arguments += ["optimization.max_steps=2", "logging.health_every_steps=0"]
    assert_all(run_ranks(pretrain, 2, tmp_path / "a", *arguments))
    junk(tmp_path / "images" / "val", 0.5)
    ends = run_ranks(pretrain, 2, tmp_path / "b", *arguments)
    assert_all(ends)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(score["num_test"], score["chance"]) for score in report["scores"]} == {(8, 100.0)}  # cats alone are left
    assert "8 of 48 images cannot be read and were left out of the probes" in ends[0].output
    late = [worker_faults.junk_once_set_up, 2, tmp_path / "c", str(tmp_path / "images" / "val")]
    ends = run_ranks(*late, *arguments)
    assert_all(ends, code=1)
    assert "error: images:validation: none of 16 images can be read, the first because: " in ends[0].output
    assert not any("Traceback" in end.output for end in ends)
    assert (tmp_path / "out" / "checkpoints" / "step-00000002").is_dir()


def test_a_folder_of_junk_is_found_before_training_when_streamed_too(config, tmp_path):
    draw_images(tmp_path / "images", 20)
    junk(tmp_path / "images", 1)
    arguments = ["--config", str(config), f"data.source={tmp_path / 'images'}", f"run_dir={tmp_path / 'out'}"]
    (end,) = run_ranks(pretrain, 1, tmp_path / "a", *arguments, "data.streaming=true")
    assert end.code == 2 and "20 of 20 images sampled cannot be used" in end.output, end.output


def test_health_votes_with_the_labelled_images_of_a_source_that_has_some(config, tmp_path):
    draw_images(tmp_path, 24)
    rows = [{"path": f"deep/er/{i:03}.jpg", "label": i % 2 if i % 3 else None} for i in range(24)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--config", str(config), f"data.source={tmp_path / 'list.jsonl'}", f"run_dir={tmp_path / 'out'}"]
    arguments += ["optimization.max_steps=1", "report.train_images=0"]
    (end,) = run_ranks(undrawn, 1, tmp_path / "a", pretrain, *arguments)
    assert end.code == 0, end.output
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [0 <= record["knn"] <= 100 for record in records if record["kind"] == "health"] == [True, True]
