"""Which trained sketches draw of an encoder: those that are named, and those in its run that fit."""

from types import SimpleNamespace

import pytest

from ijepa_scale.pictures import sketches


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    for name in ("sketch", "sketch-flow"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)

    def read(path, kind, checkpoint):
        if path.name in checkpoint.strangers:
            raise ValueError(f"{path} draws features of another encoder")
        return f"{kind} in {path.name}"

    monkeypatch.setattr(sketches, "read_drawer", read)
    return SimpleNamespace(run=tmp_path, networks=SimpleNamespace(path=tmp_path), strangers=["sketch-flow"])


def test_what_lies_in_the_run_and_does_not_fit_is_left_out(checkpoint):
    said = []
    assert sketches.read_drawers(checkpoint, {"decoder": "new"}, said.append) == {"decoder": "decoder in new"}
    assert len(said) == 1 and said[0].startswith("left out: ") and "sketch-flow draws features of another" in said[0]
    assert sketches.why_not(checkpoint, {}) == ""  # the decoder in the run


def test_what_is_named_must_fit_and_something_must(checkpoint):
    assert "sketch-flow draws features of another" in sketches.why_not(checkpoint, {"flow": "sketch-flow"})
    checkpoint.strangers = ["sketch", "sketch-flow"]
    reason = sketches.why_not(checkpoint, {})
    assert "sketch draws features of another" in reason and "sketch-flow draws" in reason
    checkpoint.run = None
    assert "nothing draws sketches of" in sketches.why_not(checkpoint, {})
