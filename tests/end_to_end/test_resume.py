"""A run that was stopped, killed or moved goes on as if nothing had happened."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from ijepa_scale.engine import checkpoint
from ijepa_scale.pictures.subject import open_checkpoint, open_images_of
from ijepa_scale.run import saving
from ijepa_scale.run.folder import RunFolder
from ijepa_scale.run.records import read_records
from ijepa_scale.run.step_pictures import SHOWN
from ijepa_scale.visualize.features import patch_features, pca_scores, turned
from tests.end_to_end import worker_faults
from tests.end_to_end.runs import (
    Runs,
    assert_close_run,
    assert_drawn,
    assert_same_run,
    checkpoints_of,
    steps_of,
    wait_for_step,
)
from tests.engine import standin
from tests.engine.standin import ALONE

STEPS = 12
STOP = 6  # between two checkpoints of every 4 steps, and before an epoch's end


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    return Runs(small_config, tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def whole_runs(runs, tmp_path_factory):
    """A run on two ranks that was never stopped, by ZeRO stage."""
    done = {}

    def whole_run(stage):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(f"whole-{stage}") / "run"
            runs(done[stage], f"engine.zero_stage={stage}", drawn=stage == 1)
        return done[stage]

    return whole_run


@pytest.fixture(scope="module")
def stopped_runs(runs, tmp_path_factory):
    """A copy of a run on two ranks that was stopped at step STOP, by ZeRO stage."""
    done = {}

    def stopped_run(stage, folder):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(f"stopped-{stage}") / "run"
            runs(done[stage], f"engine.zero_stage={stage}", f"optimization.stop_at_step={STOP}")
        shutil.copytree(done[stage], folder)
        return folder

    return stopped_run


STAGES = [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2))]  # stage 1: also when killed, below


@pytest.mark.parametrize("stage", STAGES)
def test_stopping_and_resuming_changes_nothing(runs, whole_runs, stopped_runs, tmp_path, stage):
    """Also with loader processes, and with pictures, which the stopped part and the whole run did not have."""
    run = stopped_runs(stage, tmp_path / "run")
    assert checkpoints_of(run) == [4, STOP]
    ends = runs(run, f"engine.zero_stage={stage}", "data.workers=1", "logging.pictures_every_steps=4", drawn=True)
    assert f"resumed from {run / 'checkpoints' / 'step-00000006'}, step {STOP}" in ends[0].output
    assert_same_run(run, whole_runs(stage), STEPS)
    assert len(steps_of(run)) == STEPS
    assert_drawn(run)
    assert_pictured(run)


def assert_pictured(run):
    """At multiples of 4 and the end, what the target encoder made of the images: as of the checkpoint, read whole."""
    assert sorted(path.name for path in (run / "pictures").glob("*.png")) == [
        f"features-step-{step:08d}.png" for step in (8, STEPS)
    ]
    checkpoint = open_checkpoint(str(run))
    images = open_images_of(checkpoint, "", "", "", among=64, seed=0)
    (features,) = patch_features(checkpoint.encoder, images.pixels, [-1])
    expected = pca_scores(features[:SHOWN] - features.mean(axis=0, dtype=np.float64))
    with np.load(run / "pictures" / f"features-step-{STEPS:08d}.npz") as found:
        _, near = turned(found["scores"], expected)
    assert checkpoint.step == STEPS and near == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_a_killed_run_goes_on_at_once(runs, whole_runs, tmp_path, stage):
    """kill -9 of all ranks, a torn last record, and the same command again without a pause: nothing changes."""
    options = (f"engine.zero_stage={stage}", "data.workers=1")
    processes = runs.start(tmp_path / "run", *options)
    wait_for_step(tmp_path / "run", 5, processes.running)
    for rank in (1, 0):
        os.kill(processes.pid(rank), signal.SIGKILL)
    assert [end.code for end in processes.wait()] == [-9, -9]
    assert checkpoints_of(tmp_path / "run") in ([4], [4, 8])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"kind": "step", "st')
    runs(tmp_path / "run", *options, drawn=True)
    assert_same_run(tmp_path / "run", whole_runs(stage), STEPS)
    assert len(steps_of(tmp_path / "run")) == STEPS
    assert_drawn(tmp_path / "run")


@pytest.mark.slow
def test_many_kills_change_nothing(runs, tmp_path):
    """Kills at whatever a run is doing, on every attempt a little later; 60 steps, a checkpoint every 2."""
    options = ("optimization.max_steps=60", "checkpoint.every_steps=2", "engine.zero_stage=2", "data.workers=1")
    runs(tmp_path / "whole", *options)
    for attempt in range(12):
        processes = runs.start(tmp_path / "run", *options)
        wait_for_step(tmp_path / "run", 4 * attempt + 2, processes.running)
        processes.processes[0].join(0.007 * attempt)
        for rank in (attempt % 2, 1 - attempt % 2):
            if processes.processes[rank].is_alive():
                os.kill(processes.pid(rank), signal.SIGKILL)
        processes.wait()
    runs(tmp_path / "run", *options)
    assert_same_run(tmp_path / "run", tmp_path / "whole", 60)


@pytest.mark.parametrize(
    "stage, options, ranks",
    [
        (1, (), 1),
        (3, ("engine.zero_stage=1",), 1),
        pytest.param(3, ("engine.zero_stage=2",), 2, marks=pytest.mark.slow),
        pytest.param(1, ("engine.zero_stage=3", "optimization.micro_batch_size=2"), 2, marks=pytest.mark.slow),
    ],
)
def test_other_ranks_stage_and_accumulation_go_on_within_rounding(
    runs, whole_runs, stopped_runs, tmp_path, stage, options, ranks
):
    run = stopped_runs(stage, tmp_path / "run")
    runs(run, *options, ranks=ranks)
    assert steps_of(run)[:STOP] == steps_of(whole_runs(stage))[:STOP]
    assert_close_run(run, whole_runs(stage))


def test_one_rank_and_two_with_accumulation_train_alike(runs, whole_runs, tmp_path):
    runs(tmp_path / "one", ranks=1)
    runs(tmp_path / "accumulated", "optimization.micro_batch_size=2")
    for run in (tmp_path / "one", tmp_path / "accumulated"):
        assert_close_run(run, whole_runs(1))


@pytest.mark.slow
def test_terms_over_the_images_of_all_ranks(runs, tmp_path):
    """Two ranks and one train alike, also when one goes on for the other; accumulation, which does not, is refused."""
    terms = ("loss.variance=0.5", "loss.covariance=0.1")
    runs(tmp_path / "one", *terms, ranks=1)
    runs(tmp_path / "two", *terms, f"optimization.stop_at_step={STOP}")
    refused(
        runs(tmp_path / "two", *terms, "optimization.micro_batch_size=2", code=2),
        "images_in_statistics: 8 -> 4",
        "--allow-changes",
    )
    runs(tmp_path / "two", *terms)
    assert_close_run(tmp_path / "two", tmp_path / "one")
    for record in read_records(tmp_path / "two" / "metrics.jsonl"):
        parts = record["loss_prediction"] + 0.5 * record["loss_variance"] + 0.1 * record["loss_covariance"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0.1 < record["loss_variance"] < 1


def test_a_checkpoint_of_another_folder(runs, whole_runs, stopped_runs, tmp_path):
    source = stopped_runs(1, tmp_path / "source")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    runs(tmp_path / "run", "--resume", str(source / "checkpoints" / "step-00000004"))
    assert steps_of(tmp_path / "run") == steps_of(whole_runs(1))[4:]
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


@pytest.mark.slow
def test_an_older_checkpoint_of_the_same_folder(runs, whole_runs, stopped_runs, tmp_path):
    """What came after it is set aside, so that the next resume takes the run's new checkpoints."""
    run = stopped_runs(1, tmp_path / "run")
    older = run / "checkpoints" / "step-00000004"
    ends = runs(run, "--resume", str(older), "optimization.stop_at_step=5")
    assert f"resumed from {older}, step 4" in ends[0].output
    assert (run / "checkpoints" / "abandoned-step-00000006" / "manifest.json").exists()
    assert checkpoints_of(run) == [4, 5]
    runs(run)
    assert_same_run(run, whole_runs(1), STEPS)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_checkpoint_is_skipped_aloud(runs, whole_runs, stopped_runs, tmp_path, keep_last):
    run = stopped_runs(1, tmp_path / "run")
    damaged = run / "checkpoints" / "step-00000006"
    (damaged / "rank-00001.safetensors").write_bytes(b"")
    ends = runs(run, f"checkpoint.keep_last={keep_last}", "checkpoint.every_steps=1")
    assert (
        f"warning: skipped a checkpoint that is not whole: {damaged}: rank-00001.safetensors has 0 bytes instead of"
        in ends[0].output
    )
    assert steps_of(run) == steps_of(whole_runs(1))
    assert checkpoints_of(run) == [11, 12][-keep_last:]


def refused(ends, *words):
    """The reason is said once, on one rank's stderr, without a traceback."""
    text = "".join(end.output for end in ends)
    assert text.count("error: ") == 1 and "Traceback" not in text, text
    for word in words:
        assert word in text, text


def test_what_does_not_fit_is_refused(runs, whole_runs, stopped_runs, tmp_path):
    run = stopped_runs(1, tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_bytes()

    ends = runs(run, "model.depth=3", "predictor.width=24", code=2)
    refused(ends, "another architecture", "depth 2 there, 3 here", "predictor_width 16 there, 24 here")
    (line,) = [line for line in ends[0].output.splitlines() if line.startswith("error: ")]
    assert "choose another run_dir" in line

    ends = runs(run, "optimization.lr=0.002", "seed=3", ranks=1, code=2)
    refused(ends, "optimization.lr: 0.001 -> 0.002", "seed: 0 -> 3", "--allow-changes")

    ends = runs(run, "--resume", "never", ranks=1, code=2)
    refused(ends, "holds checkpoints up to step-00000006", "another run_dir")

    missing = run / "checkpoints" / "step-00000099"
    ends = runs(run, "--resume", str(missing), ranks=1, code=2)
    refused(ends, f"--resume {missing} cannot be used: manifest.json cannot be read")

    for path in checkpoint.candidates(run / "checkpoints"):
        shutil.copy(path / "manifest.json", tmp_path / path.name)
        (path / "manifest.json").write_text("garbage")
    ends = runs(run, code=2)
    refused(ends, "refusing to start from scratch", "step-00000006: ", "step-00000004: ")
    for path in checkpoint.candidates(run / "checkpoints"):
        shutil.copy(tmp_path / path.name, path / "manifest.json")

    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert checkpoints_of(run) == [4, STOP]

    runs(run, "optimization.lr=0.002", "--allow-changes")
    assert steps_of(run)[:STOP] == steps_of(whole_runs(1))[:STOP]
    assert steps_of(run)[STOP]["lr"] > 1.9 * steps_of(whole_runs(1))[STOP]["lr"]


def test_a_finished_run_says_so(runs, whole_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_runs(1), run)
    metrics = (run / "metrics.jsonl").read_bytes()
    ends = runs(run)
    assert f"{run} is finished at step {STEPS}; to train anew, give another run_dir" in ends[0].output
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert checkpoints_of(run) == [8, 12]


def test_a_folder_in_use_is_refused(runs, tmp_path):
    run = tmp_path / "run"
    endless = ("optimization.max_steps=1000000", "checkpoint.every_steps=1000000")
    first = runs.start(run, *endless)
    wait_for_step(run, 0, first.running)
    ends = runs(run, *endless, ranks=1, code=2)
    refused(ends, f"run_dir {run} is in use by", f"pid {first.pid(0)}", "stop it or choose another run_dir")
    os.kill(first.pid(0), signal.SIGTERM)
    assert [end.code for end in first.wait()] == [75, 75]
    assert checkpoints_of(run) == [len(steps_of(run))]


def test_a_killed_owner_frees_its_folder_although_its_workers_live_on(tmp_path):
    """Loader workers look for their parent every five seconds only."""
    reads, writes = os.pipe()
    owner = os.fork()
    if not owner:
        folder = RunFolder(tmp_path)
        folder.lock()
        worker = os.fork() or signal.sigwait([signal.SIGUSR1])
        os.write(writes, str(worker).encode())
        signal.pause()
    worker = int(os.read(reads, 20))
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    try:
        RunFolder(tmp_path).lock()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(runs, whole_runs, tmp_path):
    runs(tmp_path / "run", target=worker_faults.full_disk_at, before=("1,2",))
    assert checkpoints_of(tmp_path / "run") == [12]
    assert_same_run(tmp_path / "run", whole_runs(1), STEPS)


def test_an_old_checkpoint_that_cannot_be_deleted_is_warned_of(tmp_path, monkeypatch):
    path = standin.save(tmp_path, 2)
    monkeypatch.setattr(saving, "prune", lambda *given, **options: "[Errno 13] Permission denied: 'step-00000001'")
    keep = SimpleNamespace(keep_last=1, keep_every=0)
    run = SimpleNamespace(
        ranks=ALONE, folder=SimpleNamespace(checkpoints=tmp_path), config=SimpleNamespace(checkpoint=keep)
    )
    said = []
    saver = saving.Saver(run, said.append)
    saver._begun = SimpleNamespace(step=2, finish=lambda: path)
    saver.finish()
    assert said[0].startswith("warning: an old checkpoint could not be deleted") and "[Errno 13]" in said[0]
    assert said[1].startswith(f"checkpoint {path} (")


def test_checkpoints_that_are_written_beside_training_are_those_of_a_run_that_waits(runs, whole_runs, tmp_path):
    """On a disk so slow that one is ready some steps later, and the next has to wait for it."""
    overrides = ("checkpoint.asynchronous=true", "checkpoint.every_steps=2", "checkpoint.keep_every=4")
    ends = runs(tmp_path / "run", *overrides, target=worker_faults.slow_disk, before=("1.0",))
    assert "checkpoint before is still being written" in ends[0].output
    assert checkpoints_of(tmp_path / "run") == [4, 8, 10, 12]
    assert_same_run(tmp_path / "run", whole_runs(1), STEPS)
    for step in (8, 12):  # which both have kept
        ours, theirs = (
            json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
            for run in (tmp_path / "run", whole_runs(1))
        )
        assert ours["files"] == theirs["files"] and ours["optimizer_step"] == theirs["optimizer_step"]


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_that_is_written_beside_training_and_no_more(runs, whole_runs, tmp_path):
    overrides = ("checkpoint.asynchronous=true",)
    ends = runs(tmp_path / "run", *overrides, target=worker_faults.full_disk_at, before=("1,2",))
    assert "warning: no checkpoint at step 4: " in ends[0].output
    assert checkpoints_of(tmp_path / "run") == [12]
    assert_same_run(tmp_path / "run", whole_runs(1), STEPS)


def test_a_disk_that_stays_full_ends_the_run(runs, tmp_path):
    run = tmp_path / "run"
    ends = runs(run, "checkpoint.every_steps=2", target=worker_faults.full_disk_at, before=("2,3,4",), code=1)
    refused(ends, "warning: no checkpoint at step 8", "No space left on device", "could not be written")
    assert checkpoints_of(run) == [2]
    assert len(steps_of(run)) == 8
    assert [path.name for path in (run / "checkpoints").glob(".partial*")] == []
