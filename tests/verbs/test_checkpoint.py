"""inspect, verify, prune and convert, on checkpoints that an earlier version wrote and on damaged ones."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.verbs.checkpoint import main
from tests.end_to_end.runs import steps_of
from tests.processes import ROOT, assert_all, pretrain, run_ranks, undrawn

FIXTURES = ROOT / "tests" / "fixtures" / "before_rooms"


@pytest.fixture
def run(tmp_path):
    """A copy of an old run with checkpoints at steps 1 to 6, of which only the one at 4 is what it says."""
    shutil.copytree(FIXTURES / "zero3", tmp_path / "run")
    for step in (1, 2, 3, 5, 6):
        copy_as(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def copy_as(folder, step):
    path = folder / checkpoints.folder_name(step)
    shutil.copytree(folder / "step-00000004", path)
    rewrite(path, step=step)


def rewrite(path, **changes):
    """A manifest with other values, and with the digests that belong to it and to the files as they are."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    for entry in manifest["files"]:
        file = path / entry["name"]
        entry.update(bytes=file.stat().st_size, sha256=checkpoints.sha256_of(file))
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": checkpoints._digest(manifest)}))


def changed(path, change, rank=0):
    """A file whose tensors went through change(), with a manifest that believes it."""
    file = path / f"rank-{rank:05d}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    rewrite(path)


def test_inspect_says_what_there_is_and_what_is_wrong_at_a_glance(run, capsys):
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "step-00000006" in said and "ijepa: image_size 16" in said and "2 ranks at ZeRO-3" in said
    files = (run / "checkpoints" / "step-00000004").glob("*.safetensors")
    state = [(key, values.numel()) for file in files for key, values in load_file(file).items()]
    for kind, words in (("master", "weights"), ("ema", "EMA")):
        elements = sum(count for key, count in state if key.startswith(f"{kind}|"))
        assert f"{words:22} {elements:>15,}" in said
    (run / "checkpoints" / "step-00000006" / "rank-00001.safetensors").unlink()
    assert main(["inspect", str(run)]) == 1
    assert "rank-00001.safetensors is missing" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_verify_finds_what_sizes_do_not_show(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole: every file, every value") == 6
    one, two, three, *_ = (run / "checkpoints" / checkpoints.folder_name(step) for step in range(1, 7))
    content = bytearray((one / "rank-00000.safetensors").read_bytes())
    content[-5] ^= 1
    (one / "rank-00000.safetensors").write_bytes(bytes(content))
    some = "context_encoder.blocks.0.mlp.fc1.weight"

    def lose(tensors):
        del tensors[next(key for key in tensors if key.startswith(f"exp_avg|{some}|"))]

    def spoil(tensors):
        tensors[next(key for key in tensors if key.startswith(f"ema|{some}|"))][3] = float("nan")

    changed(two, lose, rank=1)
    changed(three, spoil)
    assert main(["verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert said.count("NOT WHOLE") == 3 and said.count("every value") == 3
    assert "rank-00000.safetensors does not match its SHA-256" in said
    assert f"{some} (exp_avg) is there up to element 512 of 1,024" in said
    assert f"{some} (ema) holds NaN or infinity" in said


def test_prune_asks_first_and_keeps_what_it_is_told_and_what_is_damaged(run, capsys):
    damaged = run / "checkpoints" / "step-00000001"
    (damaged / "rank-00000.safetensors").unlink()
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert main(["prune", str(run), "--keep-every", "3"]) == 0
    assert "would delete" in (said := capsys.readouterr().out) and "3 checkpoints" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert main(["prune", str(run), "--keep-every", "3", "--delete"]) == 0
    left = [path.name for path in checkpoints.candidates(run / "checkpoints")]
    assert left == ["step-00000006", "step-00000003", "step-00000001"]
    assert main(["prune", str(run), "--keep-last", "0"]) == 2
    assert main(["prune", str(run / "checkpoints" / "step-00000006")]) == 2
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    assert main(["prune", str(run), "--delete"]) == 2
    assert "no whole checkpoint; nothing is deleted" in capsys.readouterr().err and damaged.is_dir()


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("elsewhere, pid 7", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_nothing_is_deleted_of_a_run_that_goes_on(run, capsys):
    words = [sys.executable, "-c", HOLD, str(run / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert main(["prune", str(run), "--delete"]) == 2
        holder.stdin.close()
    assert "in use by elsewhere, pid 7" in capsys.readouterr().err
    assert len(checkpoints.candidates(run / "checkpoints")) == 6


def test_convert_keeps_the_state_and_says_it_as_today(tmp_path, capsys):
    old, new = FIXTURES / "zero1" / "checkpoints" / "step-00000004", tmp_path / "new"
    assert main(["convert", str(FIXTURES / "zero1"), "--out", str(new)]) == 0
    found = new / "checkpoints" / "step-00000004"
    before, after = (json.loads((path / "manifest.json").read_text()) for path in (old, found))
    assert after["objective"] == "ijepa" and after["config"].keys() > before["config"].keys()
    assert after["files"] == before["files"] and after["optimizer_step"] == before["optimizer_step"]
    for entry in after["files"]:
        assert (found / entry["name"]).read_bytes() == (old / entry["name"]).read_bytes()
    assert main(["verify", str(new)]) == 0
    assert main(["convert", str(old), "--out", str(new)]) == 2
    assert "is a run already" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["inspect"], ["verify"], ["prune"], ["convert", "--out", "unused"]])
def test_what_is_no_run_is_wrong_input(words, tmp_path, capsys):
    assert main([words[0], str(tmp_path / "none"), *words[1:]]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.slow
def test_a_converted_run_goes_on_as_the_old_one_did(tmp_path, monkeypatch):
    shutil.copytree(FIXTURES, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    assert main(["convert", "zero1", "--out", "new"]) == 0
    words = ["--config", "new/config.yaml", "run_dir=new", f"data.cache_dir={tmp_path / 'cache'}"]
    assert_all(run_ranks(undrawn, 2, tmp_path / "output", pretrain, *words))
    expected = [step["loss"] for step in steps_of(tmp_path / "old" / "zero1")[4:]]
    assert [step["loss"] for step in steps_of(tmp_path / "old" / "new")] == pytest.approx(expected, abs=1e-6)
    assert torch.isfinite(torch.tensor(expected)).all() and len(expected) == 4
