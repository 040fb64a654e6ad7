"""Runs that were made before the package had rooms go on as if nothing had happened: tests/fixtures/before_rooms."""

import os
import shutil
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa_scale.engine import checkpoint
from ijepa_scale.exchange.load import load
from launch.embed import main as embed
from tests.end_to_end.runs import steps_of
from tests.processes import ROOT, assert_all, pretrain, run_ranks, undrawn

FIXTURES = ROOT / "tests" / "fixtures" / "before_rooms"
SAVED = Path("checkpoints") / "step-00000004"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the fixtures, as the working folder: their sources are relative paths."""
    shutil.copytree(FIXTURES, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def go_on_and_keep_what_was_restored(folder: str, out: str, *arguments: str) -> None:
    """launch/pretrain.py in a folder; each rank writes its share of the state, once restored, to a file in out."""
    os.chdir(folder)
    restore = checkpoint.restore

    def restoring(found, engine, ema):
        restore(found, engine, ema)
        own = checkpoint._own_pieces(engine, ema)
        state = {f"{kind}|{name}|{start}": values.clone() for kind, name, start, values in own}
        save_file(state, Path(out) / f"rank-{os.environ.get('RANK', '0')}.safetensors")

    with mock.patch.object(checkpoint, "restore", restoring):
        pretrain(*arguments)


def whole_state(folder):
    """(kind, parameter) -> all its elements, from the pieces in a folder's files."""
    pieces = defaultdict(dict)
    for file in folder.glob("*.safetensors"):
        for key, values in load_file(file).items():
            kind, name, start = key.split("|")
            pieces[kind, name][int(start)] = values
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in pieces.items()}


@pytest.mark.parametrize(
    "run, ranks, options",
    [
        ("zero1", 2, []),
        ("zero2", 2, []),
        ("zero3", 2, []),
        ("stream", 2, []),
        pytest.param("zero3", 1, ["engine.zero_stage=1"], marks=pytest.mark.slow),
    ],
    ids=["zero1", "zero2", "zero3", "stream", "other-ranks-and-stage"],
)
def test_an_old_run_goes_on(old, tmp_path, run, ranks, options):
    """All of its state to the bit, then the losses that the code of its time recorded."""
    recorded = steps_of(old / run)
    (tmp_path / "restored").mkdir()
    arguments = ["--config", f"{run}/config.yaml", f"data.cache_dir={tmp_path / 'cache'}", *options]
    worker = (go_on_and_keep_what_was_restored, str(old), str(tmp_path / "restored"), *arguments)
    target, *words = worker if run in ("zero1", "stream") else (undrawn, *worker)  # each kind of source is drawn once
    assert_all(run_ranks(target, ranks, tmp_path / "output", *words))

    restored, saved = whole_state(tmp_path / "restored"), whole_state(FIXTURES / run / SAVED)
    assert restored.keys() == saved.keys() and {kind for kind, _ in saved} == set(checkpoint.KINDS)
    differing = [key for key in saved if not torch.equal(restored[key].view(torch.int32), saved[key].view(torch.int32))]
    assert not differing, differing
    steps = steps_of(old / run)
    assert [step["step"] for step in steps] == list(range(8)) and steps[:4] == recorded[:4]
    assert [step["loss"] for step in steps[4:]] == pytest.approx([step["loss"] for step in recorded[4:]], abs=1e-6)


@pytest.mark.parametrize("run", ["zero1", "stream"])
def test_embed_reads_an_old_run(old, tmp_path, run):
    assert embed([run, "images", "--out", str(tmp_path / "out"), "--workers", "0", "--cache-dir", str(tmp_path)]) == 0
    embeddings = np.load(tmp_path / "out" / "embeddings.npy")
    assert embeddings.shape == (16, 16) and np.isfinite(embeddings).all() and embeddings.std(axis=0).min() > 0
    saved = whole_state(FIXTURES / run / SAVED)
    for name, parameter in load(run).network.named_parameters():
        assert torch.equal(parameter.flatten(), saved["ema", f"context_encoder.{name}"]), name
