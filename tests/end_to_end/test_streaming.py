"""Runs on two ranks that stream: the same images and losses with and without a stop, and nothing repeats in silence."""

import shutil

import pytest

from ijepa_scale.engine.checkpoint import read_manifest
from ijepa_scale.run.records import read_records
from tests.conftest import SMALL_CONFIG
from tests.data.server import serving
from tests.data.small_sources import write_noise_tar
from tests.end_to_end import worker_streams
from tests.end_to_end.runs import Runs, assert_drawn, assert_same_run, steps_of

STEPS = 12
SHARDS = (9, 14, 7)  # images of each: 12 steps of 8 are three passes and more
STREAM = ("data.streaming=true", "data.workers=1", "data.shuffle_buffer=4", "report.train_images=0")


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    root = tmp_path_factory.mktemp("tars")
    first = 0
    for i, count in enumerate(SHARDS):
        write_noise_tar(root / f"train-{i}.tar", range(first, first + count))
        first += count
    return root


@pytest.fixture(scope="module")
def runs(tars, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL_CONFIG % tars)
    return Runs(path, tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def whole_run(runs, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    runs(run, *STREAM, target=worker_streams.record_names, drawn=True)
    assert_drawn(run)
    return run


def names_of(run):
    """The images of each step, rank and micro-step, as trained on."""
    names = {}
    for file in sorted(run.glob("names-*.txt")):
        for line in file.read_text().splitlines():
            step, *images = line.split(" ")
            names[int(step), file.name] = images
    return names


def test_stopping_and_resuming_changes_nothing(runs, whole_run, tmp_path):
    """The same images and the same bits, with processes that read ahead of what was trained on."""
    run = tmp_path / "run"
    runs(run, *STREAM, "optimization.stop_at_step=5", target=worker_streams.record_names)
    ends = runs(run, *STREAM, target=worker_streams.record_names)
    assert "step-00000005, step 5" in ends[0].output
    assert_same_run(run, whole_run, STEPS)
    assert names_of(run) == names_of(whole_run) and len(names_of(run)) == 2 * STEPS
    positions = read_manifest(run / "checkpoints" / "step-00000012")["stream_positions"]
    assert positions == read_manifest(whole_run / "checkpoints" / "step-00000012")["stream_positions"]


def test_every_image_of_uneven_shards_comes_once_a_pass_and_passes_are_told(whole_run):
    """3 shards on 2 ranks: rank 0 has two of them, rank 1 one; neither waits for the other."""
    passes = [record for record in read_records(whole_run / "metrics.jsonl") if record["kind"] == "stream_pass"]
    names = names_of(whole_run)
    for rank, images in ((0, SHARDS[0] + SHARDS[2]), (1, SHARDS[1])):
        seen = [name for step in range(STEPS) for name in names[step, f"names-{rank}.txt"]]
        assert len(seen) == 4 * STEPS
        rounds = [seen[start : start + images] for start in range(0, len(seen), images)]
        for part in rounds:
            assert len(set(part)) == len(part)
        assert all(set(part) == set(rounds[0]) for part in rounds[:-1])
        assert rounds[0] != rounds[1]
        own = [record for record in passes if record["rank"] == rank]
        assert [(r["pass"], r["images"], r["stream"]) for r in own] == [(i, images, 0) for i in range(1, len(rounds))]
        assert [r["step"] for r in own] == [i * images // 4 for i in range(1, len(rounds))]


def test_how_shards_are_dealt_is_said_and_must_stay(runs, whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    options = (*STREAM, "optimization.stop_at_step=10", "logging.health_every_steps=0")
    ends = runs(run, *options, ranks=1, code=2)
    assert "streams: {'ranks': 2, 'streams': 1, 'shards': [3]} -> {'ranks': 1," in ends[0].output
    ends = runs(run, *options, "--allow-changes", ranks=1)
    assert "every stream starts a new pass" in ends[0].output
    (position,) = read_manifest(run / "checkpoints" / "step-00000010")["stream_positions"][0]
    assert position["sources"][0]["pass_number"] == 1 + 2  # rank 1 was in its third pass at step 8
    assert steps_of(run)[:8] == steps_of(whole_run)[:8]


@pytest.mark.slow
def test_a_network_that_fails_now_and_then_changes_nothing_and_one_that_is_gone_ends_the_run(
    runs, whole_run, tars, tmp_path
):
    """Over HTTP, from a server that fails; then one that fails for good: one line, exit code 1, and no rank hangs."""
    with serving(tars) as server:
        source = f"data.source={server.url}/train-{{0..2}}.tar"
        server.faults = [None, 503, "drop", None, "drop", 500]
        ends = runs(tmp_path / "run", *STREAM, source)
        assert server.faults == []
        assert "503" in "".join(end.output for end in ends) and "trying again in 1 s" in "".join(e.output for e in ends)
        assert steps_of(tmp_path / "run") == steps_of(whole_run)

        before = len(server.requests)
        options = (*STREAM, source, "logging.health_every_steps=0", "data.retry_seconds=0.5")
        runs(tmp_path / "gone", *options, "optimization.stop_at_step=1", ranks=1)
        server.faults = [None] * (len(server.requests) - before) + [503] * 1000
        ends = runs(tmp_path / "other", *options, ranks=1, code=1)
        assert f"error: {server.url}/train-" in ends[0].output
        assert "cannot be read: HTTPError: HTTP Error 503" in ends[0].output
        assert "Traceback" not in ends[0].output and "gave up after 2 tries" in ends[0].output
