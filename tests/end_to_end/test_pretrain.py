"""launch/pretrain.py as a user runs it: the real launcher, real processes, what is printed and what is left behind."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["deepspeed", "--num_gpus", ranks, "--master_port", port, ROOT / "launch" / "pretrain.py"]


def test_help_needs_no_torch():
    code = (
        "import runpy, sys; sys.argv = ['pretrain.py', '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / 'launch' / 'pretrain.py')!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code in (0, None)\n"
        "assert not {'torch', 'deepspeed', 'datasets'} & set(sys.modules)"
    )
    result = run([sys.executable, "-c", code], cwd=ROOT)
    assert result.returncode == 0, result.stderr
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
        "step_seconds",
        "memory_bytes",
    ]:
        assert all(isinstance(record[key], int | float) for record in steps), key
    assert all(0 < record["loss"] < 2 and record["grad_norm"] > 0 for record in steps)
    assert [record["step"] for record in records if record["kind"] == "health"] == [0, 3, 4]
    bad = [record for record in records if record["kind"] == "bad_image"]
    assert len(bad) == 1 and bad[0]["sample"].endswith("007.jpg")
    assert result.stdout.count("007.jpg") == 1, "named once, by rank 0 alone"
    for name in ("loss_curve.png", "masks.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("L").getcolors(1 << 20)) > 20
    assert "no labels" in json.loads((folder / "report.json").read_text())["note"]
    assert "width: 32" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    manifest = json.loads((folder / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-00000004"
    assert list((folder / "wandb").glob(f"offline-run-*-{manifest['wandb_id']}"))


def test_one_process_with_classes_reports_probes_and_says_so_when_finished(config, tmp_path):
    draw_images(tmp_path / "images" / "train", 48, classes=("cat", "dog"))
    draw_images(tmp_path / "images" / "val", 20, classes=("cat", "dog"))
    command = [sys.executable, ROOT / "launch" / "pretrain.py", "--config", config, "data.source=images", "run_dir=out"]
    command += [f"data.cache_dir={tmp_path / 'cache'}"]
    result = run(command, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"] and report["train_images"] == 32
    assert [score["probe"] for score in report["scores"]] == ["k-NN label", "linear label"]
    assert all(score["num_test"] == 16 and 0 <= score["trained"] <= 100 for score in report["scores"])
    assert (tmp_path / "out" / "scores.png").is_file()
    knn = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all("knn" in record for record in knn if record["kind"] == "health")
    again = run(command, cwd=tmp_path)
    assert again.returncode == 0 and "is finished at step 6" in again.stdout and "another run_dir" in again.stdout


def test_wrong_input_is_one_line_from_rank_0_with_exit_code_2(config, tmp_path):
    draw_images(tmp_path / "few", 5)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "empty" / "small.png")
    alone = [sys.executable, ROOT / "launch" / "pretrain.py", "--config", config]
    cases = [
        ([*launcher(), "--config", config, "optimization.lrr=1"], "did you mean optimization.lr"),
        (
            [*launcher(), "--config", config, "data.source=few"],
            "5 images, fewer than optimization.global_batch_size 16",
        ),
        ([*alone], "data.source is not set"),
        ([*alone, "optimization.lr=fast"], "optimization.lr"),
        ([*alone, "data.source=few", "mask.min_keep=60"], "mask.min_keep"),
        ([*alone, "data.source=nowhere/at/all"], "nowhere/at/all"),
        ([*alone, "data.source=empty", "optimization.global_batch_size=1"], "small.png"),
        ([*alone, "data.source=few", "engine.deepspeed.fp16={enabled: true}"], "engine.deepspeed.fp16"),
    ]
    for command, words in cases:
        result = run([*command, f"data.cache_dir={tmp_path / 'cache'}"], cwd=tmp_path)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and words in lines[0], (command, result.stderr)
        assert "Traceback" not in result.stderr + result.stdout
        if command[0] == sys.executable:
            assert result.returncode == 2
        else:
            assert result.returncode != 0


def test_too_many_bad_images_stop_the_run_with_their_list(config, tmp_path):
    draw_images(tmp_path / "images", 40)
    for i in range(0, 40, 3):
        (tmp_path / "images" / "deep" / "er" / f"{i:03}.jpg").write_bytes(b"\xff\xd8 torn")
    command = [sys.executable, ROOT / "launch" / "pretrain.py", "--config", config, "data.source=images", "run_dir=out"]
    result = run([*command, f"data.cache_dir={tmp_path / 'cache'}"], cwd=tmp_path)
    assert result.returncode == 1
    assert "more than data.max_bad_fraction 0.2" in result.stderr and "Traceback" not in result.stderr
    assert len(re.findall(r"deep/er/\d+\.jpg", result.stderr)) > 8


def test_the_example_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    result = run([sys.executable, "-c", f"import sys; sys.path[:0] = ['.', 'kernels']\n{code}"], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2, 64, 192])" in result.stdout
