"""The verb report, on folders of toy runs."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.evals.evaluation import Measure, Outcome
from ijepa_scale.evals.results import write_results
from ijepa_scale.run import page
from ijepa_scale.verbs import report
from tests.run.toy_run import write_picture, write_run

SECRET = "s3cr3tvalue"


def written(arguments, capsys):
    assert report.main([str(word) for word in arguments]) == 0
    kind, _, path = capsys.readouterr().out.strip().partition(": ")
    return kind, path


def test_the_page_of_a_run_says_what_it_came_to(tmp_path, capsys):
    run = write_run(tmp_path / "my run")
    Image.new("RGB", (40, 30)).save(run / "masks.png")
    assert written([run], capsys) == ("page", str(run / "report.html"))
    text = (run / "report.html").read_text()
    assert len(text) < 10_000_000
    for words in (
        "I-JEPA on scenes:train: finished after 20 of 20 steps.",
        "16 images a step, 2 processes",
        "steps skipped",
        "25.0 ± 3.8",  # k-NN of 128 images
        "18.4 ± 0.6",
        "linear &lt;b&gt;x&lt;/b&gt; $1_$2",
        "rank of the features (RankMe)",
        "loss, variance part",
        f"torchrun --nproc-per-node 2 --module ijepa_scale.verbs.command pretrain --config &#39;{run}/config.yaml&#39;",
        "What the encoder sees of the first images",
        "32.0 images/s",
    ):
        assert words in text, words


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", "half"])
def test_a_picture_that_is_half_written_is_left_out_and_said(tmp_path, capsys, content):
    run = write_run(tmp_path / "run")
    Image.new("RGB", (40, 30)).save(run / "masks.png")
    if content == "half":
        content = (run / "masks.png").read_bytes()[:-20]
    (run / "masks.png").write_bytes(content)
    written([run], capsys)
    text = (run / "report.html").read_text()
    assert "masks.png: it is " in text and "What the encoder sees of the first images" not in text


def test_a_run_of_several_nodes_is_started_on_each(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    said = {**json.loads((run / "environment.json").read_text()), "world_size": 32, "nodes": 4}
    (run / "environment.json").write_text(json.dumps(said))
    written([run], capsys)
    words = "torchrun --nnodes 4 --node-rank N --master-addr FIRST_NODE --nproc-per-node 8 --module"
    assert words in (run / "report.html").read_text()


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_run_that_goes_on_or_died_has_a_page(tmp_path, capsys, steps):
    run = write_run(tmp_path / "run", steps=steps, finished=False)
    for name in ("config.yaml", "environment.json"):
        (run / name).unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    written([run, "--axis", "seconds"], capsys)
    text = (run / "report.html").read_text()
    assert f"{steps} steps so far, not finished" in text and "No probes" in text


def test_pictures_stand_in_their_sections_and_what_is_wrong_with_others_is_said(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for name, number in (("b", 20), ("a", 100), ("c", 3)):
        write_picture(run, name, step=number)
    write_picture(run, "sketch", section="sketches", title="Dreams")
    write_picture(run, "elsewhere", section="unheard")
    write_picture(run, "empty").write_bytes(b"")
    write_picture(run, "torn").with_suffix(".json").write_text("{")
    write_picture(run, "alone").with_suffix(".json").unlink()
    written([run], capsys)
    text = (run / "report.html").read_text()
    assert text.index("Step 3.") < text.index("Step 20.") < text.index("Step 100.") < text.index("Dreams")
    assert text.count('type="range"') == 1 and text.count("<img ") == 4
    for name in ("elsewhere", "empty", "torn", "alone"):
        assert f"Left out: {name}.png" in text


@dataclass(frozen=True)
class Settings:
    features: bool = True
    epochs: int = 28


def write_evaluation(run, name, *, step=20, task="linear", arguments=(), **facts):
    """As evaluate does, of two measures."""
    accuracies = [Measure(name=words, value=value, error=0.51, count=5000, chance=1.0) for words, value in MEASURES]
    outcome = Outcome.best_of(
        accuracies, [np.array([0])] * 2, np.array([0]), train_images=400, arguments=[task, *arguments]
    )
    facts = {"step": step, "network": "target", "data": "a:train", "test_data": "a:validation", "label": "", **facts}
    write_results(run / "evaluations" / name, facts, task, Settings(), outcome, 1.0)


MEASURES = [("output, <b>", 17.84), ("last 4 blocks", 19.06)]


def test_what_evaluate_found_is_among_the_probes(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    write_evaluation(run, "new", arguments=["--checkpoint", "my run", f"--data=https://me:{SECRET}@host/x"])
    write_evaluation(run, "old", step=10, task="knn", network="context", label="colour")
    write_evaluation(tmp_path, "of-another-run", step=7)
    for name, text in (("torn", "{"), ("foreign", '{"tasks": {"knn": {}}}')):
        (run / "evaluations" / name).mkdir()
        (run / "evaluations" / name / "results.json").write_text(text)
    written([run], capsys)
    text = (run / "report.html").read_text()
    probes = text[text.index(">Probes</h2>") : text.index(">Environment</h2>")]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", probes)]
    kinds = ["a:train, 400 images", "a:validation, 5,000 images"]
    assert ["linear", "20", "19.1 ± 0.5%", "1.0%", "last 4 blocks, features computed once", *kinds] in rows
    kinds[0] = "a:train, colour, 400 images"
    words = "last 4 blocks, features computed once, context encoder"
    assert ["knn", "10", "19.1 ± 0.5%", "1.0%", words, *kinds] in rows
    assert "evaluate linear --checkpoint &#39;my run&#39; &#39;--data=https://[hidden]@host/x&#39;" in probes
    assert "settings: features=True epochs=28" in probes and SECRET not in text
    for name in ("torn", "foreign"):
        assert f"Left out: evaluations/{name}/results.json: no results as evaluate writes them" in text


def test_no_secret_is_on_a_page(tmp_path, capsys):
    data = {"source": f"https://me:{SECRET}@host/x-{{0..9}}.tar?signature={SECRET}"}
    engine = {"deepspeed": {"wandb": {"api_key": SECRET}}}
    run = write_run(tmp_path / "run", data=data, engine=engine, logging={"wandb_project": (SECRET * 4)[:40]})
    environment = json.loads((run / "environment.json").read_text())
    environment["command"] += [f"data.source={data['source']}", f"HF_TOKEN={SECRET}"]
    environment["host"] = "a-private-host"
    (run / "environment.json").write_text(json.dumps(environment))
    write_picture(run, "a", caption=f"of {data['source']}")
    other = write_run(tmp_path / "other")
    for arguments in ([run], [run, other, "--out", tmp_path / "both.html"]):
        _, path = written(arguments, capsys)
        text = Path(path).read_text()
        assert SECRET not in text and "a-private-host" not in text and "[hidden]" in text


@pytest.mark.parametrize("axis", ["steps", "images", "seconds"])
def test_several_runs_are_compared(tmp_path, capsys, axis):
    data = {"source": "/data/<b>", "image_size": 64, "column": "new"}
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", steps=9, finished=False, data=data)]
    out = tmp_path / "new" / "both.html"
    assert written([*runs, "--axis", axis, "--out", out], capsys) == ("page", str(out))
    text = out.read_text()
    assert all(f"</svg>{run}</li>" in text for run in runs)  # the folders' own names are the same
    assert "9 of 20" in text and "data.source</th>" in text and "/data/&lt;b&gt;" in text
    assert "data.image_size" not in text and "data.column" not in text  # the same; not known of the other
    assert (f"{axis}</text>" in text) if axis != "seconds" else ("seconds in training steps</text>" in text)


def test_curves_alone_are_a_png(tmp_path, capsys):
    runs = [write_run(tmp_path / name) for name in ("_a", "$b$")]
    assert written([*runs, "--out", tmp_path / "both.png"], capsys) == ("curves", str(tmp_path / "both.png"))
    assert Image.open(tmp_path / "both.png").format == "PNG"


@pytest.mark.parametrize("words", [["nowhere"], ["run", "--out", "x.pdf"], ["run", "nowhere"]])
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert report.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "run" / page.PAGE).exists() and not (tmp_path / "comparison.html").exists()
