"""Whole comparisons of a tiny I-JEPA with and without terms against collapse."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ijepa_scale.compare import comparison, probing
from ijepa_scale.compare.comparison import compare
from ijepa_scale.compare.probing import labelled_images
from ijepa_scale.compare.runs import make_plan
from ijepa_scale.config import load_comparison
from ijepa_scale.engine.signals import StopRequest
from ijepa_scale.evals.tasks import TASKS
from ijepa_scale.evaluate import Request, evaluate_tasks
from ijepa_scale.run.records import read_records
from tests.compare.toy import toy, write_toy
from tests.end_to_end.runs import assert_same_run, checkpoints_of
from tests.evals.small import ONE
from tests.processes import ENVIRONMENT, ROOT, assert_all, pretrain, run_ranks

pytestmark = pytest.mark.slow  # half a minute
NAMES = [f"{probe} label" for probe in ("k-NN", "linear", "3 labels")]
SECONDS = {"plain": 0.5, "terms": 0.25}  # of a step, as the metrics are made to say


class Trained:
    """In the place of launching.train(): a process that has all its imports, and times that are known beforehand."""

    def __init__(self, folder):
        self.folder, self.names, self.stop_in = folder, [], ""

    def __call__(self, training, ranks, stop, watch):
        self.names.append(training.name)
        words = training.words
        if training.name == self.stop_in:
            words = [word.replace("stop_at_step=0", "stop_at_step=2") for word in words]
        assert_all(run_ranks(pretrain, ranks, self.folder / training.name, "--config", training.recipe.file, *words))
        if training.name == self.stop_in:
            stop.reason = "SIGTERM"
            return False
        path = training.folder / "metrics.jsonl"
        records = [{**record, "step_seconds": SECONDS[training.recipe.name]} for record in read_records(path)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        watch(records[-1])
        return True


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, config, what was trained in which order) of a comparison that was stopped in its second run."""
    root = tmp_path_factory.mktemp("compared")
    confided = ["logging.wandb_project=https://me:p4ssw0rd@host/x"]
    config, trained = toy(root, seeds=[3], overrides=confided), Trained(root / "output")
    stop = StopRequest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "train", trained)
        trained.stop_in = "terms-seed3"
        assert compare(config, stop) == 75
        trained.stop_in = ""
        assert compare(config, stop) == 0
        again = list(trained.names)
        assert compare(config, stop) == 0
        assert trained.names == again  # nothing is left to do
    stop.close()
    return root / "out", config, again


def results(done):
    return json.loads((done[0] / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_a_stopped_comparison_goes_on_and_repeats_no_run(done):
    assert done[2] == ["plain-seed3", "terms-seed3", "terms-seed3", "terms-seed3-equal-seconds"]
    assert checkpoints_of(done[0] / "terms-seed3") == [8]  # those that were probed are gone


def test_no_file_holds_a_password_of_a_setting(done):
    files = [path for path in done[0].rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"p4ssw0rd" in path.read_bytes()]
    assert "@host/x" in (done[0] / "results.json").read_text()


def test_curves_hold_what_was_spent_and_every_score(done):
    curves = results(done)["curves"]
    found = {(curve["recipe"], curve["equal"]): curve for curve in curves}
    assert list(found) == [("plain", "images"), ("terms", "images"), ("terms", "seconds")]
    assert found["plain", "images"]["spent"]["seconds"] == [[0.0, 2.0, 4.0]]
    assert found["terms", "seconds"]["spent"]["seconds"] == [[0.0, 2.0, 4.0]]
    assert found["terms", "seconds"]["spent"]["images"] == [[0.0, 64.0, 128.0]]
    for curve in curves:
        assert list(curve["scores"]) == [*NAMES, "k-NN", "linear", "3 labels"] and curve["seeds"] == [3]
        assert np.array(list(curve["scores"].values())).shape == (6, 1, 3)
        assert curve["scores"]["linear"] == curve["scores"]["linear label"]  # the mean over one label
        hardware, model = (np.array(curve["spent"][f"{kind}_flops"]) for kind in ("hardware", "model"))
        assert (hardware[:, 1:] > model[:, 1:]).all() and (model[:, 0] == 0).all()


def test_recipes_begin_alike_and_learn_apart(done):
    """The predictions of the first step are the same; what terms against collapse do comes after it."""
    plain, terms = (read_records(done[0] / f"{name}-seed3" / "metrics.jsonl") for name in ("plain", "terms"))
    assert plain[0]["loss"] == pytest.approx(terms[0]["loss_prediction"], abs=1e-6)
    assert plain[-1]["loss"] != terms[-1]["loss_prediction"]
    curves = results(done)["curves"]
    assert len({tuple(curve["scores"][name][0][0] for name in NAMES) for curve in curves}) == 1


def test_scores_are_those_of_the_verb_evaluate(done, tmp_path):
    """Of a run's last checkpoint, which stays."""
    asked = probing.read_probes(done[0] / "plain-seed3" / "probes.jsonl", asked_of(done[1]))[8]
    words = {"knn": ["k=[20]"], "logistic": [], "lowshot": ["labels=['3']"]}
    assert words.keys() <= TASKS.keys()
    usual = {"checkpoint": str(done[0] / "plain-seed3"), "data": str(done[0].parent / "images"), "workers": 0}
    for task, overrides in words.items():
        request = Request(task=task, overrides=overrides, seed=3, cache_dir=str(tmp_path), out=str(tmp_path), **usual)
        evaluate_tasks(ONE, request)
    tasks = json.loads((tmp_path / "results.json").read_text())["tasks"]
    found = [next(m for m in tasks[task]["measures"] if m["chosen"]) for task in words]
    assert [asked[name]["value"] for name in NAMES] == [measure["value"] for measure in found]
    assert [asked[name]["chance"] for name in NAMES] == [measure["chance"] for measure in found] == [25.0] * 3


def asked_of(config):
    asked = {key: getattr(config, key) for key in ("train_images", "test_images", "labels_per_class")}
    return {"labels": ["label"], **asked}


def test_the_table_is_at_equal_images_seconds_and_flops(done):
    rows = results(done)["equal"]
    assert [(row["equal"], row["recipe"], row["of_run"]) for row in rows] == [
        ("images", "plain", "equal images"),
        ("images", "terms", "equal images"),
        ("seconds", "plain", "equal images"),
        ("seconds", "terms", "equal seconds"),
        ("model_flops", "plain", "equal images"),
        ("model_flops", "terms", rows[-1]["of_run"]),
    ]
    assert [row["images"] for row in rows[:4]] == [64.0, 64.0, 64.0, 128.0]
    assert [row["seconds"] for row in rows[:4]] == [4.0, 2.0, 4.0, 4.0]
    assert rows[4]["model_flops"] == pytest.approx(rows[5]["model_flops"], rel=1e-9)
    curve = next(c for c in results(done)["curves"] if (c["recipe"], c["equal"]) == ("terms", "seconds"))
    assert rows[3]["scores"]["linear label"] == {"mean": curve["scores"]["linear label"][0][-1], "std": 0.0}


def test_the_page_has_both_tables_and_there_is_a_plot(done):
    page = (done[0] / "results.md").read_text()
    assert "| at | recipe | images | seconds | GFLOP | k-NN label | linear label | 3 labels label |" in page
    assert "| 64 images | terms | 64 | 2 |" in page and "| 4 seconds | terms | 128 | 4 |" in page
    assert "| terms | plain |" in page and "k-NN, seconds | k-NN, FLOPs" in page and "features, 1 seed:" in page
    assert (done[0] / "results.png").stat().st_size > 30_000
    times = results(done)["times"]
    assert len(times) == 2 * 3 * 2 and all(row["words"] in page for row in times)


def test_scores_to_begin_with_are_of_this_encoder_and_these_images(done, tmp_path):
    """A start that came to no checkpoint leaves its own, and the settings may have changed since then."""
    config = toy(done[0].parent, seeds=[3])
    (training, *_), pairs = make_plan(config).all_runs(), labelled_images(config, make_plan(config).recipes[0].config)
    file = training.folder.parent / "initial-seed3.jsonl"
    before, found = file.read_text(), probing.probe_initial(training, config, pairs)
    for key, value in (("encoder", "another"), ("images", ["others", "others"])):
        line = json.loads(before)
        line["asked"][key] = value
        line["scores"] = {name: {**score, "value": 99.9} for name, score in line["scores"].items()}
        file.write_text(json.dumps(line) + "\n")
        assert probing.probe_initial(training, config, pairs) == found
        assert file.read_text() == before


def test_other_probes_or_lengths_in_the_same_folder_are_refused(done):
    with pytest.raises(ValueError, match=r"probed with other settings: .*'labels_per_class': 3.* give another out"):
        compare(toy(done[0].parent, seeds=[3], labels_per_class=5), None)
    with pytest.raises(ValueError, match=r"plain-seed3 was trained with other settings: .*max_steps: 8 there, 16"):
        make_plan(toy(done[0].parent, seeds=[3], images=128))
    with pytest.raises(ValueError, match=r"has no column 'colour'"):
        compare(toy(done[0].parent, seeds=[3], labels=["colour"]), None)


@pytest.mark.slow
def test_the_verb_trains_two_ranks_stops_on_a_signal_and_goes_on_to_the_same(tmp_path):
    """Ctrl-C reaches the verb alone: it passes it on, and the run ends with a checkpoint."""
    path = write_toy(tmp_path, seeds=[0], images=480, equal=["images"], ranks=2)
    command = [sys.executable, str(ROOT / "launch" / "compare.py"), "--config", str(path)]
    environment = {**os.environ, **ENVIRONMENT}
    run = tmp_path / "out" / "terms-seed0"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (run / "metrics.jsonl").exists() or len(read_records(run / "metrics.jsonl")) < 4:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    assert "stopped by SIGINT in terms-seed0; the same command goes on from there" in said
    (stopped, *_) = checkpoints_of(run)
    assert stopped < 60 and "Traceback" not in said
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "run 1 of" not in ended.stdout and "run 2 of 2, terms-seed0" in ended.stdout
    (_, training) = make_plan(load_comparison(path)).runs("images")
    words = [word for word in training.words if not word.startswith("run_dir=")] + [f"run_dir={tmp_path / 'whole'}"]
    assert_all(run_ranks(pretrain, 2, tmp_path / "output", "--config", training.recipe.file, *words))
    assert_same_run(run, tmp_path / "whole", 60)
