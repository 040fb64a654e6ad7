"""What a run is told in confidence is in no byte that it leaves or prints."""

import base64
import shutil
import tarfile
from pathlib import Path

import pytest

from ijepa_scale.run.records import read_records
from tests.conftest import SMALL_CONFIG
from tests.data.server import serving
from tests.data.small_sources import write_noise_tar
from tests.end_to_end.runs import Runs
from tests.processes import ENVIRONMENT

PASSWORD, SIGNATURE, KEY, TOKEN = (
    "p4ssw0rd@of-mine-alone",
    "s1gnatureofmine",
    "5" * 20 + "abcdefabcdefabcdefab",
    "hf_" + "Q" * 30,
)
SECRETS = (*PASSWORD.split("@"), SIGNATURE, KEY, TOKEN, base64.b64encode(f"me:{PASSWORD}".encode()).decode())


def bytes_with_a_secret(folder: Path) -> list[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [
        (str(path.relative_to(folder)), secret)
        for path in files
        for secret in SECRETS
        for encoding in ("utf-8", "utf-32-le")  # the other is NumPy's
        if secret.encode(encoding) in path.read_bytes() or secret in str(path.relative_to(folder))
    ]


@pytest.mark.slow
def test_no_secret_is_left_or_said(tmp_path, monkeypatch):
    """Streams from a server that wants a password and signed URLs, with a bad image, a failure and wandb's files.

    The same command goes on, with another password. A server that refuses ends a run in one line.
    """
    (tmp_path / "set").mkdir()
    write_noise_tar(tmp_path / "set/train-0.tar", range(12))
    write_noise_tar(tmp_path / "set/train-1.tar", range(12, 23))
    with tarfile.open(tmp_path / "set/train-1.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("bad.png"))
    for name, value in {"WANDB_API_KEY": KEY, "HF_TOKEN": TOKEN}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    config = tmp_path / "small.yaml"
    with serving(tmp_path / "set") as server:
        host = server.url.removeprefix("http://")
        source = f"http://me:{PASSWORD}@{host}/train-{{0..1}}.tar?X-Amz-Signature={SIGNATURE}"
        config.write_text(SMALL_CONFIG % "nothing")
        runs, run = Runs(config, tmp_path / "output"), tmp_path / "run"
        words = [f"data.source={source}", "data.streaming=true", "data.num_images=23", "data.max_bad_fraction=1.0"]
        words += ["logging.wandb=offline", "report.train_images=8", "report.test_images=8"]
        words += ["data.workers=1"]
        server.faults = [500]
        runs(run, *words, "optimization.stop_at_step=4", ranks=1, drawn=True)
        assert server.requests[-1][2] == f"Basic {SECRETS[-1]}"
        again = [word.replace(PASSWORD, "an0ther").replace(SIGNATURE, "later") for word in words]
        ends = runs(run, *again, "optimization.stop_at_step=6", ranks=1, drawn=True)
        assert "step-00000004, step 4" in ends[0].output
        given = "engine.deepspeed={wandb: {enabled: true, api_key: " + KEY + "}}"
        (refused,) = runs(run, *again, given, ranks=1, code=2)
        assert "engine.deepspeed (wandb) is refused by DeepSpeed: wandb.api_key (Extra inputs" in refused.output
        server.faults = [403] * 50
        (refused,) = runs(tmp_path / "refused", *words, ranks=1, code=2)
        assert "[hidden]" in refused.output and "Traceback" not in refused.output
    shutil.copytree(tmp_path / "output", run / "output")  # what was printed
    for kept in ("config.yaml", "environment.json", "metrics.jsonl", "report.html", "report.json"):
        assert (run / kept).is_file()
    assert list(run.glob("checkpoints/*/manifest.json")) and list(run.glob("wandb/offline-run-*/*.wandb"))
    (bad,) = {record["sample"] for record in read_records(run / "metrics.jsonl") if record["kind"] == "bad_image"}
    assert bad == "train-1.tar?[hidden]#1[11] bad.png"
    assert bytes_with_a_secret(run) == []
    assert bytes_with_a_secret(tmp_path / "refused") == []


@pytest.mark.slow
def test_no_secret_is_left_of_a_list_of_urls(tmp_path):
    """In records of a bad image, in the images that are kept for pictures, and in what belongs to these."""
    write_noise_tar(tmp_path / "x.tar", range(12))
    with tarfile.open(tmp_path / "x.tar") as tar:
        tar.extractall(tmp_path / "set", filter="data")
    (tmp_path / "set/0005.png").write_bytes(b"damaged")
    config, run = tmp_path / "small.yaml", tmp_path / "run"
    with serving(tmp_path / "set") as server:
        host = server.url.removeprefix("http://")
        links = [f"http://me:{PASSWORD}@{host}/{i:04}.png?id={i}&X-Amz-Signature={SIGNATURE}" for i in range(12)]
        (tmp_path / "list.csv").write_text("\n".join(["url", *links]) + "\n")
        config.write_text(SMALL_CONFIG % (tmp_path / "list.csv"))
        words = ["data.streaming=true", "data.max_bad_fraction=1.0", "logging.pictures_every_steps=2"]
        runs = Runs(config, tmp_path / "output")
        runs(run, *words, "optimization.stop_at_step=4", ranks=1, drawn=True)
        runs(run, *words, "optimization.stop_at_step=8", ranks=1, drawn=True)
    shutil.copytree(tmp_path / "output", run / "output")
    assert list(run.glob("samples/*.arrow")) and list(run.glob("pictures/*.npz"))
    bad = [record["sample"] for record in read_records(run / "metrics.jsonl") if record["kind"] == "bad_image"]
    assert bad == [f"http://[hidden]@{host}/0005.png?[hidden]#5"]  # once, though the run was begun twice
    assert bytes_with_a_secret(run) == []
