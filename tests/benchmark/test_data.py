"""launch/benchmark.py --data, end to end on a few images. How fast anything is, is not asked here."""

import io
import json
import os
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.benchmark import data as benchmark_data
from ijepa_scale.benchmark.data import Pipeline
from ijepa_scale.data.images import open_images
from tests import processes
from tests.data.small_sources import write_images, write_parquet
from tests.processes import run_ranks


def write_photos(folder, count):
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg")


@pytest.mark.slow
def test_the_verb_times_and_writes_everything(tmp_path):
    folder, written = tmp_path / "photos", tmp_path / "out.json"
    folder.mkdir()
    write_photos(folder, 12)
    (folder / "12.jpg").write_bytes(b"no image")
    arguments = ["--data", str(folder), "--size", "32", "--steps", "2", "--workers", "1", "--json", str(written)]
    (end,) = run_ranks(processes.benchmark, 1, tmp_path, *arguments)
    assert end.code == 0, end.output
    output = " ".join(end.output.split())
    for words in (
        "round 2 of 2",
        "64 x 48 pixels -> 32 x 32",
        "(the limit)",
        "Left out is 1 image that",
        "1 worker(s)",
    ):
        assert words in output
    found = json.loads(written.read_text())
    assert (found["images"], found["left_out"], found["size"], found["rounds"]) == (12, 1, 32, 2)
    names = [row["name"] for row in found["pipelines"]]
    assert names[:4] == ["ours", "torchvision on Pillow", "decode: Pillow", "decode: simplejpeg"]
    rates = {row["name"]: row["images_per_second"]["median"] for row in found["pipelines"]}
    assert rates[found["limit"]] == max(rate for name, rate in rates.items() if name.startswith("decode: "))
    for row in found["pipelines"]:
        assert 0 < row["of_limit"]["low"] <= row["of_limit"]["median"] <= row["of_limit"]["high"]
    assert next(row for row in found["pipelines"] if row["name"] == found["limit"])["of_limit"]["median"] == 1.0
    assert found["loader"]["workers"] == 1 and found["loader"]["images_per_second"] > 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", ".", "model.depth=1"], "takes no config values"),
        (["--data", ".", "--size", "0"], "--size"),
        (["--data", "/nowhere/at/all"], "there is no folder"),
        (["--data", ""], "the source is empty"),
        (["--data", "scenes"], "only data.source=scenes of training renders scenes"),
        (["--data", ".", "--workers", "-1"], "--workers must be 0 or more"),
        (["--data", "/nowhere/at/all", "--json", "."], "--json . cannot be written: it is a folder"),
        (
            ["--data", "/nowhere/at/all", "--json", "/dev/null/out.json"],
            "--json /dev/null/out.json cannot be written: ",
        ),
        ([], "one of the arguments --config --data is required"),
    ],
)
def test_wrong_input(tmp_path, arguments, words):
    (end,) = run_ranks(processes.benchmark, 1, tmp_path, *arguments)
    assert end.code == 2 and words in end.output


def test_the_verbs_take_a_column_and_a_configuration(tmp_path, capsys, monkeypatch):
    """In this process, which they leave as it is: what they do with them is asked elsewhere."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.path", list(sys.path))
    for variable in ("PYTORCH_ALLOC_CONF", "KINETO_LOG_LEVEL"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    path = str(write_parquet(tmp_path / "x.parquet", range(3)))
    for verb, arguments in (("benchmark", ["--data", path]), ("prepare", [path, "out", "--shorter-side", "8"])):
        main = runpy.run_path(str(processes.ROOT / f"launch/{verb}.py"))["main"]
        for chosen, words in (
            (["--column", "mask"], "no column 'mask' (data.column); its columns are: image"),
            (["--data-config" if verb == "benchmark" else "--config", "a"], "data.config is 'a', and"),
        ):
            assert main([*arguments, *chosen]) == 2
            assert words in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_images_with_one_file_are_as_many_images(tmp_path):
    content = (write_images(tmp_path, range(1)) / "0000.png").read_bytes()
    for i in range(1, 7):
        (tmp_path / f"{i}.png").write_bytes(content if i < 6 else b"no image")
    files, left_out = benchmark_data.sampled_files(open_images(str(tmp_path)), benchmark_data.installed_decoders())
    assert (len(files), left_out) == (6, 1)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_decoders_that_cannot_read_the_kind_of_file_are_left_out(tmp_path):
    images = open_images(str(write_images(tmp_path, range(6))))  # PNG
    decoders = benchmark_data.installed_decoders()
    assert {"decode: Pillow", "decode: simplejpeg", "decode: torchvision"} <= {d.name for d in decoders}
    files, left_out = benchmark_data.sampled_files(images, decoders)
    assert len(files) == 6 and left_out == 0
    assert "decode: simplejpeg" not in {d.name for d in decoders} and len(decoders) > 1


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_all_decoders_give_the_same_pixels():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(file, "JPEG")
    found = [np.asarray(decoder.run(0, file.getvalue())) for decoder in benchmark_data.installed_decoders()]
    for pixels in found[1:]:
        pixels = pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels
        assert np.array_equal(pixels, found[0])


def test_turns_reverse_and_warm_up_is_not_kept(monkeypatch):
    monkeypatch.setattr(benchmark_data, "TURN", 2)
    order: list[tuple[str, int]] = []
    pipelines = [Pipeline(name, lambda i, file, name=name: order.append((name, i))) for name in "ab"]
    benchmark_data._turns(pipelines, [b"", b"", b""], 2, lambda text: None)
    assert order[:6] == [("b", 0), ("b", 1), ("a", 0), ("a", 1), ("a", 2), ("b", 2)]
    assert order[6:9] == [("a", 0), ("a", 1), ("b", 0)] and len(order) == 18
    assert [len(pipeline.rates) for pipeline in pipelines] == [2, 2]
