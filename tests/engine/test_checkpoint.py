"""Any stage and number of ranks reads a checkpoint; a kill, a full disk or damage never costs the last good one."""

import json
import os
import random
import shutil
import stat
from pathlib import Path

import pytest

from ijepa_scale.engine import checkpoint
from tests.engine import standin, worker_checkpoint
from tests.engine.standin import ALONE, assert_loads, save
from tests.processes import assert_all, run_ranks

STAGES = (1, 2, 3)
ENGINES = [(stage, "fp32") for stage in STAGES] + [(1, "bf16"), (3, "bf16")]


def names(world_size):
    return [worker_checkpoint.name_of(stage, precision, world_size) for stage, precision in ENGINES]


@pytest.fixture(scope="module")
def resharded(tmp_path_factory):
    """What worker_checkpoint.reshard() found, over launches of one rank, two, and one again."""
    root = tmp_path_factory.mktemp("reshard")
    facts = {}
    for launch, (world_size, sources) in enumerate([(1, names(1)), (2, names(2) + names(1)), (1, names(2))]):
        result = root / f"facts-{launch}.json"
        arguments = (str(root), ENGINES, sources, str(result))
        output = root / f"output-{launch}"
        assert_all(run_ranks(worker_checkpoint.reshard, world_size, output, *arguments, timeout=400))
        facts.update(json.loads(result.read_text()))
    return facts


@pytest.mark.parametrize("target", names(2) + names(1))
@pytest.mark.parametrize("source", names(2) + names(1))
def test_any_stage_and_number_of_ranks_restores_any_other_bit_for_bit(resharded, source, target):
    facts = resharded[f"{source} -> {target}"]
    assert facts == {"bits": list(checkpoint.KINDS), "steps": True, "weights": True, "target": True}


# Rank 0's calls of fsync: its file, the manifest, the folder, the parent after the rename, the pointer, the parent.
@pytest.mark.parametrize(
    "victim, point, count, newest",
    [
        (0, "save_file", 1, 1),
        (1, "save_file", 1, 1),
        (0, "half a file", 1, 1),
        (1, "half a file", 1, 1),
        (0, "fsync", 1, 1),
        (1, "fsync", 1, 1),
        (0, "fsync", 2, 1),
        (0, "replace", 1, 1),  # of the manifest
        (0, "fsync", 3, 1),
        (0, "rename", 1, 1),
        (0, "fsync", 4, 2),
        (0, "fsync", 5, 2),
        (0, "replace", 2, 2),  # of the pointer
        (0, "fsync", 6, 2),
        (0, "rename", 2, 2),  # in prune(), before the old checkpoint is set aside
        (0, "half a deletion", 2, 2),  # the first is of what a save replaced
    ],
)
def test_a_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path, victim, point, count, newest):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    ends = run_ranks(
        worker_checkpoint.save_and_die, 2, tmp_path / "output", str(folder), 2, victim, point, count, timeout=60
    )
    assert ends[victim].code == -9, ends[victim].output
    assert ends[1 - victim].code != 0 or newest == 2, "the other rank did not notice"
    found, skipped = checkpoint.newest_good(folder, ALONE)
    assert skipped == []
    assert_loads(found, newest)
    assert_next_save_clears_leftovers(folder)


@pytest.mark.parametrize(
    "victim, point, count, newest",
    [
        (1, "half a file", 1, 1),
        (0, "rename", 1, 1),
        pytest.param(0, "fsync", 1, 1, marks=pytest.mark.slow),
        pytest.param(0, "fsync", 4, 2, marks=pytest.mark.slow),
        pytest.param(0, "rename", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_a_kill_while_a_checkpoint_is_written_aside_leaves_a_whole_one(tmp_path, victim, point, count, newest):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    arguments = (str(folder), 2, victim, point, count, True)
    ends = run_ranks(worker_checkpoint.save_and_die, 2, tmp_path / "output", *arguments, timeout=60)
    assert ends[victim].code == -9, ends[victim].output
    found, skipped = checkpoint.newest_good(folder, ALONE)
    assert skipped == []
    assert_loads(found, newest)
    assert_next_save_clears_leftovers(folder)


def test_what_is_written_aside_is_the_state_as_it_was(tmp_path):
    save(tmp_path, 1, aside=True)
    assert_loads(checkpoint.newest_good(tmp_path, ALONE)[0], 1)


def test_a_kill_while_a_damaged_checkpoint_is_replaced(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    damaged = save(folder, 2)
    (damaged / "manifest.json").write_text("{}")
    ends = run_ranks(worker_checkpoint.save_and_die, 2, tmp_path / "output", str(folder), 2, 0, "rename", 2)
    assert ends[0].code == -9
    assert_loads(checkpoint.newest_good(folder, ALONE)[0], 1)
    assert_next_save_clears_leftovers(folder)


def test_a_kill_while_a_whole_checkpoint_is_replaced_costs_nothing(tmp_path):
    """Between its two renames the only checkpoint is set aside; it is brought back."""
    folder = tmp_path / "checkpoints"
    save(folder, 2)
    ends = run_ranks(worker_checkpoint.save_and_die, 2, tmp_path / "output", str(folder), 2, 0, "rename", 2)
    assert ends[0].code == -9
    assert checkpoint.candidates(folder) == []
    assert_loads(checkpoint.newest_good(folder, ALONE)[0], 2)
    assert_next_save_clears_leftovers(folder)


def assert_next_save_clears_leftovers(folder):
    save(folder, 3)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert_loads(checkpoint.newest_good(folder, ALONE)[0], 3)
    assert (folder / "latest").read_text() == "step-00000003\n"


def flip(path, position=None, bit=0):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(content)


FIRST, SECOND, MANIFEST = "rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"
DAMAGES = {
    "truncated": (SECOND, lambda path: os.truncate(path, path.stat().st_size - 1), "instead of"),
    "emptied": (FIRST, lambda path: os.truncate(path, 0), "has 0 bytes"),
    "flipped on rank 0": (FIRST, flip, "does not match its SHA-256"),
    "flipped on rank 1": (SECOND, flip, "does not match its SHA-256"),
    "missing": (SECOND, lambda path: path.unlink(), "is missing"),
    "manifest missing": (MANIFEST, lambda path: path.unlink(), "cannot be read"),
    "manifest cut": (MANIFEST, lambda path: os.truncate(path, path.stat().st_size // 2), "cannot be read"),
    "manifest no text": (MANIFEST, lambda path: path.write_bytes(b"\xff\xfe\x00garbage"), "cannot be read"),
    "manifest a list": (MANIFEST, lambda path: path.write_text("[]"), "not of format"),
    "manifest of the future": (MANIFEST, lambda path: replace(path, '"format": 1', '"format": 2'), "not of format"),
    "manifest with another step": (MANIFEST, lambda path: replace(path, '"step": 2', '"step": 7'), "SHA-256"),
    "manifest without its step": (MANIFEST, lambda path: replace(path, '"step": 2', '"stop": 2'), "lacks its step"),
}


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def agreements(tmp_path_factory):
    """For each damage of the newer of two checkpoints, and for some other folders, what each of two ranks found."""
    root = tmp_path_factory.mktemp("damage")
    whole = root / "whole"
    assert_all(run_ranks(save_twice, 2, root / "save", str(whole)))
    folders = {"whole": whole, "empty": root / "empty", "none": root / "none"}
    folders["empty"].mkdir()
    for name, (file, damage, _) in DAMAGES.items():
        for copy, steps in ((name, (2,)), (f"all {name}", (1, 2))):
            folders[copy] = root / copy.replace(" ", "-")
            shutil.copytree(whole, folders[copy])
            for step in steps:
                if step == 2 or file != MANIFEST:
                    damage(folders[copy] / checkpoint.folder_name(step) / file)
                else:
                    (folders[copy] / checkpoint.folder_name(step) / file).unlink()
    folders["no pointer"] = root / "no-pointer"
    shutil.copytree(whole, folders["no pointer"])
    (folders["no pointer"] / "latest").unlink()
    folders["pointer elsewhere"] = root / "pointer-elsewhere"
    shutil.copytree(whole, folders["pointer elsewhere"])
    (folders["pointer elsewhere"] / "latest").write_text("step-00000099\n")
    folders["only unfinished"] = root / "only-unfinished"
    shutil.copytree(whole / "step-00000001", folders["only unfinished"] / ".partial-step-00000001")
    paths = {name: str(path) for name, path in folders.items()}
    assert_all(run_ranks(worker_checkpoint.agree, 2, root / "agree", paths, str(root / "facts.json")))
    return json.loads((root / "facts.json").read_text()), folders


def save_twice(folder):
    ranks = worker_checkpoint.join()
    for step in (1, 2):
        standin.save(Path(folder), step, ranks)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_all_ranks_together(agreements, damage):
    facts, folders = agreements
    first, second = facts[damage]
    assert first == second
    assert first["step"] == 1
    (reason,) = first["skipped"]
    assert reason.startswith(f"{folders[damage] / 'step-00000002'}: ")
    assert DAMAGES[damage][2] in reason
    assert DAMAGES[damage][0] in reason
    assert_loads(checkpoint.newest_good(folders[damage], ALONE)[0], 1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_ranks_refuse_to_start_afresh_where_no_checkpoint_is_whole(agreements, damage):
    first, second = agreements[0][f"all {damage}"]
    assert first == second
    assert "none can be used; refusing to start from scratch" in first["error"]
    assert "step-00000001: " in first["error"] and "step-00000002: " in first["error"]
    assert "choose another run_dir" in first["error"]


@pytest.mark.parametrize("folder", ["whole", "no pointer", "pointer elsewhere"])
def test_the_pointer_is_a_hint_only(agreements, folder):
    assert agreements[0][folder] == [{"step": 2, "skipped": []}] * 2


@pytest.mark.parametrize("folder", ["empty", "none", "only unfinished"])
def test_no_checkpoint_is_no_error(agreements, folder):
    assert agreements[0][folder] == [{"step": None, "skipped": []}] * 2


def test_any_flipped_bit_is_found(tmp_path):
    """Every byte of the manifest, and 100 places of the weights."""
    whole = save(tmp_path, 1, config={"lr": 1e-3, "source": "a folder"}, wandb_id=None)
    rng = random.Random(0)
    for name, positions in ((MANIFEST, range((whole / MANIFEST).stat().st_size)), (FIRST, None)):
        file = whole / name
        original = file.read_bytes()
        for position in positions or rng.sample(range(len(original)), 100):
            flip(file, position, rng.randrange(8))
            found, complaint = checkpoint.verify(whole, ALONE)
            assert found is None and name in complaint, (name, position, chr(original[position]))
            file.write_bytes(original)
    assert checkpoint.verify(whole, ALONE)[0] is not None


@pytest.mark.parametrize(
    "victim, way, words",
    [
        (0, "file size limit", "File too large"),
        (1, "file size limit", "File too large"),
        (0, "full at fsync", "No space left"),
        (1, "full at fsync", "No space left"),
        (0, "full at the manifest", "No space left"),
        (0, "too little free", "GB free"),
        (0, "reads back wrong", "reads back differently"),
        (1, "reads back wrong", "reads back differently"),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_on_all_and_costs_nothing(tmp_path, victim, way, words):
    assert_costs_nothing(tmp_path, victim, way, words)


@pytest.mark.parametrize(
    "victim, way, words",
    [
        (1, "file size limit", "File too large"),
        pytest.param(0, "too little free", "GB free", marks=pytest.mark.slow),
    ],
)
def test_so_does_one_that_is_written_aside(tmp_path, victim, way, words):
    assert_costs_nothing(tmp_path, victim, way, words, aside=True)


def assert_costs_nothing(tmp_path, victim, way, words, aside=False):
    folder, result = tmp_path / "checkpoints", tmp_path / "facts.json"
    arguments = (str(folder), victim, way, str(result), aside)
    assert_all(run_ranks(worker_checkpoint.fail_to_save, 2, tmp_path / "output", *arguments))
    facts = json.loads(result.read_text())
    assert all(words in error for error in facts["errors"]), facts["errors"]
    assert facts["left"] == ["latest", "step-00000001"]
    assert facts["found"] == [1, 1] and facts["skipped"] == []
    assert_loads(checkpoint.newest_good(folder, ALONE)[0], 3)


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [(1, 0, [10]), (2, 0, [9, 10]), (3, 4, [4, 8, 9, 10]), (1, 5, [5, 10]), (20, 0, list(range(1, 11)))],
)
def test_retention(tmp_path, keep_last, keep_every, kept):
    for step in range(1, 11):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, ALONE, keep_last=keep_last, keep_every=keep_every, newest=step)
    assert [path.name for path in reversed(checkpoint.candidates(tmp_path))] == [f"step-{step:08d}" for step in kept]
    assert sorted(path.name for path in tmp_path.iterdir() if "step-" not in path.name) == ["latest"]
    for step in kept:
        assert_loads(checkpoint.verify(tmp_path / f"step-{step:08d}", ALONE)[0], step)


def test_damaged_checkpoints_ahead_do_not_cost_what_is_saved_behind_them(tmp_path):
    """After a damaged step 20 was skipped, a run that goes on from step 10 keeps its new checkpoints."""
    save(tmp_path, 10)
    (save(tmp_path, 20) / MANIFEST).unlink()
    for step in (12, 14):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, ALONE, keep_last=1, keep_every=0, newest=step)
        assert_loads(checkpoint.newest_good(tmp_path, ALONE)[0], step)
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step-00000020", "step-00000014"]
    save(tmp_path, 20)  # the run comes to it again
    checkpoint.prune(tmp_path, ALONE, keep_last=1, keep_every=0, newest=20)
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step-00000020"]
    assert_loads(checkpoint.newest_good(tmp_path, ALONE)[0], 20)


def test_an_old_checkpoint_that_cannot_be_deleted_costs_no_run(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    rename, keep = os.rename, {"keep_last": 1, "keep_every": 0, "newest": 3}
    stuck = tmp_path / "step-00000001"

    def failing(path, other):
        if path == stuck:
            raise PermissionError(13, "Permission denied", str(path))
        rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        assert f"Permission denied: '{stuck}'" in checkpoint.prune(tmp_path, ALONE, **keep)
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step-00000003", stuck.name]
    assert_loads(checkpoint.verify(stuck, ALONE)[0], 1)
    assert checkpoint.prune(tmp_path, ALONE, **keep) == "" and not stuck.exists()


def test_the_manifest_holds_what_it_was_given(tmp_path):
    path = save(tmp_path, 4, config={"seed": 1}, architecture={"width": 32})
    manifest = checkpoint.read_manifest(path)
    assert (manifest["step"], manifest["optimizer_step"], manifest["world_size"]) == (4, 4, 1)
    assert manifest["config"] == {"seed": 1} and manifest["architecture"] == {"width": 32}


def test_what_a_checkpoint_lacks_is_named(tmp_path):
    save(tmp_path, 1)
    found, _ = checkpoint.newest_good(tmp_path, ALONE)
    with pytest.raises(ValueError, match=r"holds 0 of the 4 elements of context_encoder\.x \(ema\)"):
        checkpoint.read_weights(found, {"context_encoder.x": standin.SHAPES["context_encoder.c"]}, "ema")
    with pytest.raises(ValueError, match=r"holds 0 of the 11 elements of predictor\.d"):
        checkpoint.read_weights(found, {"predictor.d": standin.SHAPES["predictor.d"]}, "ema")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_may_be_read_by_whom_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        files = [path for path in save(tmp_path, 1).iterdir()] + [tmp_path / "latest"]
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
