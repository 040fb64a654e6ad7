"""Which checkpoint is taken, and what is refused; runs that resume: tests/end_to_end/test_resume.py."""

import pytest

from ijepa_scale import build
from ijepa_scale.config import ModelConfig, PretrainConfig, to_dict
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.run.folder import RunFolder
from ijepa_scale.run.resume import find_checkpoint, refuse_misfit
from tests.engine import standin

OBJECTIVE = build.build_ijepa(PretrainConfig())


def test_resume_takes_a_checkpoint_or_a_run_folder_s_newest_whole_one(tmp_path):
    facts = {"architecture": {}, "config": to_dict(PretrainConfig()), "images": 9, "precision": "fp32"}
    for step in (1, 2, 3):
        standin.save(tmp_path / "old" / "checkpoints", step, **facts)
    (tmp_path / "old" / "checkpoints" / "step-00000003" / "rank-00000.safetensors").write_bytes(b"")

    def found(resume, run="new"):
        folder = RunFolder(tmp_path / run)
        return find_checkpoint(OBJECTIVE, folder, standin.ALONE, facts, 9, resume=str(resume), allow=False)

    checkpoints = tmp_path / "old" / "checkpoints"
    for resume, step in ((tmp_path / "old", 2), (checkpoints, 2), (checkpoints / "step-00000001", 1)):
        assert found(resume)[0].step == step
    for resume in (tmp_path / "old", checkpoints, "auto"):  # its own: damaged ones are skipped, and none set aside
        there, notes = found(resume, "old")
        assert there.step == 2 and sum("skipped a checkpoint that is not whole" in note for note in notes) == 1
    assert len(list(checkpoints.glob("step-*"))) == 3
    for resume in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"--resume .* cannot be used: .*; give a run folder, or one of its"):
            found(resume)


@pytest.mark.parametrize(
    "before, words",
    [
        ({"torch": "2.11.0", "numpy": "2.0"}, ["torch 2.11.0 -> 2.15.0; roundings may differ"]),
        ({"torch": "2.15.0", "numpy": "2.0"}, []),
        (None, []),
    ],
)
def test_other_packages_than_before_are_said(tmp_path, before, words):
    facts = {"architecture": {}, "config": to_dict(PretrainConfig())}
    folder = RunFolder(tmp_path)
    standin.save(folder.checkpoints, 2, **facts, **({"packages": before} if before else {}))
    now = facts | {"packages": {"torch": "2.15.0", "numpy": "2.0"}}
    _, notes = find_checkpoint(OBJECTIVE, folder, standin.ALONE, now, 9, resume="auto", allow=False)
    assert [note.partition("here on: ")[2] for note in notes if "with other packages" in note] == words


def test_what_an_older_checkpoint_does_not_say_means_the_default(tmp_path):
    """Of its config and of its architecture; what differs all the same is refused."""
    config = PretrainConfig(model=ModelConfig(name="vit_tiny"))
    objective = build.build_ijepa(config)
    facts = {"architecture": objective.architecture(), "config": to_dict(config), "images": 9, "precision": "fp32"}
    older = {"config": {"model": {"name": "vit_tiny"}}, "images": 9, "precision": "fp32"}

    def resume(architecture, **changes):
        found = Checkpoint(tmp_path, {**older, "architecture": architecture, **changes})
        refuse_misfit(objective, found, facts, allow=False)

    resume({})
    resume({"depth": 12})
    with pytest.raises(ValueError, match=r"another architecture: depth 3 there, 12 here, width 8 there, 192 here; cho"):
        resume({"depth": 3, "width": 8})
    with pytest.raises(ValueError, match="another architecture: patch_size 16 there, 14 here"):
        resume({}, config={"model": {"name": "vit_tiny", "patch_size": 16}, "data": {"image_size": 224}})
    with pytest.raises(ValueError, match="another architecture: registers 4 there, None here"):
        resume({**facts["architecture"], "registers": 4})
    with pytest.raises(ValueError, match=r"alter training [^\n]*\n  optimization.lr: 0.5 -> 0.001"):
        resume({}, config={"model": {"name": "vit_tiny"}, "optimization": {"lr": 0.5}})


def test_images_that_have_changed_are_refused(tmp_path):
    """As many as before, under other names or of other content; older checkpoints do not say."""
    facts = {"architecture": OBJECTIVE.architecture(), "config": to_dict(PretrainConfig()), "images": 9}
    found = Checkpoint(tmp_path, {**facts, "images_digest": "a" * 64})
    refuse_misfit(OBJECTIVE, found, {**facts, "images_digest": "a" * 64}, allow=False)
    refuse_misfit(OBJECTIVE, Checkpoint(tmp_path, facts), {**facts, "images_digest": "a" * 64}, allow=False)
    with pytest.raises(ValueError, match=r"contents of images, as SHA-256: 'a{12}' -> 'b{12}'\nrestore them"):
        refuse_misfit(OBJECTIVE, found, {**facts, "images_digest": "b" * 64}, allow=False)
    refuse_misfit(OBJECTIVE, found, {**facts, "images_digest": "b" * 64}, allow=True)


def test_another_objective_is_refused_whatever_is_allowed(tmp_path):
    facts = {"architecture": {}, "config": to_dict(PretrainConfig())}
    found = Checkpoint(tmp_path, {"architecture": {}, "config": {"objective": {"name": "other"}}})
    with pytest.raises(ValueError, match=r"learns another objective: other there, ijepa here; choose another run_dir"):
        refuse_misfit(OBJECTIVE, found, facts, allow=True)
