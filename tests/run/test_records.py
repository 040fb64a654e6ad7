import json
import math
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.engine.device import memory_bytes
from ijepa_scale.run import records
from ijepa_scale.run.records import JsonlWriter, WandbWriter, log_evaluation, read_records
from tests.processes import run_ranks


def step(number, **values):
    return {"kind": "step", "step": number, **values}


# metrics.jsonl


def test_each_record_is_readable_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "new folder" / "metrics.jsonl"
    with JsonlWriter(path, None) as writer:
        for number in range(3):
            writer.write(step(number, loss=0.5))
            assert [record["step"] for record in read_records(path)] == list(range(number + 1))
    assert path.read_bytes().count(b"\n") == 3


def test_what_json_lacks_is_written_as_null_or_as_a_plain_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = step(
        1, nan=math.nan, infinite=-math.inf, numpy=np.float32(0.5), count=np.int64(3), tensor=torch.tensor(2.5)
    )
    record |= {"nested": {"list": [1, math.nan], "none": None}, "text": "größer\n", "bad": torch.tensor(math.nan)}
    with JsonlWriter(path, None) as writer:
        writer.write(record)
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    expected = step(1, nan=None, infinite=None, numpy=0.5, count=3, tensor=2.5)
    expected |= {"nested": {"list": [1, None], "none": None}, "text": "größer\n", "bad": None}
    assert read_records(path) == [expected]


@pytest.mark.parametrize(
    "tail", ["", '{"kind": "step", "step": 9, "lo', "\0\0\0\0", '{"text": "gr\N{LATIN SMALL LETTER O}']
)
def test_resume_keeps_the_records_before_its_step(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    records = [
        step(0),
        {"kind": "health", "step": 0, "rankme": 3.0},
        step(1),
        step(2),
        {"kind": "health", "step": 2},
        step(3),
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    with JsonlWriter(path, 2) as writer:
        assert read_records(path) == records[:3]
        writer.write(step(2, again=True))
    assert read_records(path) == [*records[:3], step(2, again=True)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_cut_inside_a_character_or_just_before_its_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1, "text": "gr\xc3')
    assert read_records(path) == [{"step": 0}]
    path.write_bytes(b'{"step": 0}\n{"step": 1}')  # whole but for its newline
    with JsonlWriter(path, 5) as writer:
        writer.write({"step": 2})
    assert [record["step"] for record in read_records(path)] == [0, 1, 2]


def test_half_a_line_elsewhere_is_an_error_that_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        JsonlWriter(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step"\n{"step": 2}\n'


def test_a_fresh_run_starts_a_fresh_file_and_resume_needs_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlWriter(path, 3).close()
    assert path.read_text() == ""
    path.write_text('{"step": 0}\n')
    JsonlWriter(path, None).close()
    assert path.read_text() == ""


def test_a_full_disk_is_an_error_that_names_the_file_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path, None) as writer:
        writer.write(step(0))
        writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - the writer closes it
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            writer.write(step(1))
    assert read_records(path) == [step(0)]  # and closing it raised nothing


# wandb

OFFLINE_RUN = """
import socket, sys
reached = []
def no_network(*arguments, **options):
    reached.append(arguments)
    raise OSError("no network in this test")
socket.getaddrinfo = no_network

from ijepa_scale.run.records import WandbWriter
writer = WandbWriter("offline", project="p", name="n", run_dir=sys.argv[1], config={"a": {"b": 1}}, run_id=None)
writer.log({"kind": "step", "loss": 0.5, "skipped": None, "grad_norm": float("nan")}, 4)
writer.log_pictures({"Colours": sys.argv[1] + "/colours.png"}, 4)
writer.finish()
again = WandbWriter("offline", project="p", name="n", run_dir=sys.argv[1], config={}, run_id=writer.run_id)
again.log({"loss": 0.25}, 2)
again.finish()
assert again.run_id == writer.run_id
import atexit
atexit._run_exitfuncs()
print(writer.run_id, len(reached), reached)
"""


def test_wandb_offline_writes_to_the_run_folder_asks_nothing_and_keeps_its_id(tmp_path):
    pytest.importorskip("wandb")
    Image.new("RGB", (9, 7), "red").save(tmp_path / "colours.png")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(tmp_path)],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run_id, reached = done.stdout.split(maxsplit=2)[:2]
    assert reached == "0", done.stdout
    assert done.stderr == "" and done.stdout.count("\n") == 1  # nothing that would tear the progress line
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    assert b"loss" in files[0].read_bytes() and b"Colours" in files[0].read_bytes()
    (picture,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png")
    assert Image.open(picture).size == (9, 7)


def test_wandb_disabled_is_silent_and_is_never_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    writer = WandbWriter("disabled", project="p", name=None, run_dir=tmp_path, config={}, run_id="kept")
    writer.log({"loss": 1.0}, 0)
    writer.log_pictures({"Colours": tmp_path / "none.png"}, 0)
    writer.finish()
    assert writer.run_id == "kept" and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="disabled, offline or online, got 'on'"):
        WandbWriter("on", project="p", name=None, run_dir=tmp_path, config={}, run_id=None)


@pytest.mark.parametrize(
    "said", ["No API key configured. Use `wandb login` to log in.", "Run initialization has timed out"]
)
def test_what_keeps_wandb_from_starting_is_one_line_with_what_to_do(tmp_path, monkeypatch, said):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "setup", lambda settings: None)
    monkeypatch.setattr(wandb, "init", mock.Mock(side_effect=wandb.errors.UsageError(said)))
    with pytest.raises(ValueError, match=r"logging.wandb=online: .*; run `wandb login`, or set logging.wandb=offline"):
        WandbWriter("online", project="p", name=None, run_dir=tmp_path, config={}, run_id=None)


# memory


def memory_before_and_after() -> None:
    before = memory_bytes()
    block = b"x" * (300 * 2**20)
    del block
    print(before, memory_bytes())


def test_memory_on_the_cpu_is_the_peak_of_the_process(tmp_path):
    (end,) = run_ranks(memory_before_and_after, 1, tmp_path)
    before, after = map(int, end.output.split())
    assert 250 * 2**20 < after - before < 350 * 2**20
    assert 10 * 2**20 < memory_bytes() < 2**45


# Evaluations


class FakeWandb:
    """In the place of WandbWriter: what it was made with and given, until it is finished."""

    def __init__(self):
        self.made, self.logged, self.finished = [], [], 0

    def __call__(self, mode, **options):
        self.made.append((mode, options))
        return self

    def log(self, record, step):
        self.logged.append((record, step))

    def finish(self):
        self.finished += 1


def write_manifest(run, *, wandb="offline", wandb_id="abc", **changed):
    folder = run / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    said = {"step": 4, "wandb_id": wandb_id, "config": {"logging": {"wandb": wandb, "wandb_project": "p"}}, **changed}
    (folder / "manifest.json").write_text(json.dumps(said))
    return folder


def test_an_evaluation_goes_to_the_wandb_run_that_trained_its_checkpoint(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setattr(records, "WandbWriter", fake)
    log_evaluation(write_manifest(tmp_path), "knn", {"k-NN, k = 10": 61.5, "k-NN, k = 20": 63.0})
    (mode, options), *more = fake.made
    assert (mode, options["run_id"], options["run_dir"], options["project"]) == ("offline", "abc", tmp_path, "p")
    assert fake.logged == [({"knn/k-NN, k = 10": 61.5, "knn/k-NN, k = 20": 63.0}, 4)] and more == []
    assert fake.finished == 1


@pytest.mark.parametrize(
    "changed",
    [{"wandb": "disabled"}, {"wandb_id": None}, {"wandb_id": ""}, {"config": {}}, {"config": {"logging": {}}}],
)
def test_an_evaluation_of_a_run_without_wandb_goes_nowhere(tmp_path, monkeypatch, changed):
    fake = FakeWandb()
    monkeypatch.setattr(records, "WandbWriter", fake)
    log_evaluation(write_manifest(tmp_path, **changed), "knn", {"k": 1.0})
    log_evaluation(tmp_path / "nothing.pth.tar", "knn", {"k": 1.0})
    log_evaluation(tmp_path, "knn", {"k": 1.0})
    assert fake.made == []
