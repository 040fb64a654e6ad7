"""The verb evaluate, on a run of two micro-batches' training and 64 pictures of four colours."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa_scale import evaluate as evaluation
from ijepa_scale.evaluate import Request, evaluate_tasks
from ijepa_scale.exchange.load import load
from ijepa_scale.run import records
from ijepa_scale.verbs.evaluate import parser
from tests.evals.small import ONE, write_splits
from tests.processes import ENVIRONMENT, EVALUATE, ROOT, assert_all, evaluate, free_port, run_ranks

RUN = ROOT / "tests" / "fixtures" / "before_rooms" / "zero1"
ALL = ["lowshot.labels=[2,25%]", "linear.epochs=2", "linear.drops=[]", "attentive.epochs=1", "finetune.epochs=1"]
ALL += ["finetune.warmup_epochs=0", "knn.k=[1,5]"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noisy enough that no task gets all of them right."""
    return write_splits(tmp_path_factory.mktemp("images"), noise=800)


@pytest.fixture
def request_of(images, tmp_path, monkeypatch):
    """A Request of one process; with fields of its own. Pictures, which take their time, are not drawn."""
    for draw in ("draw_accuracies", "draw_confusions"):
        monkeypatch.setattr(evaluation, draw, lambda *_: None)
    shutil.copytree(RUN, tmp_path / "run")
    usual = {"task": "knn", "checkpoint": str(tmp_path / "run"), "data": str(images), "workers": 0}
    return lambda **given: Request(**{**usual, "cache_dir": str(tmp_path / "cache"), **given})


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def numbers(results):
    """All of a results.json that must not depend on where and when it was made."""
    return {
        name: [(measure["name"], measure["value"], measure["error"], measure["chosen"]) for measure in task["measures"]]
        for name, task in results["tasks"].items()
    }


@pytest.fixture(scope="module")
def all_tasks(images, tmp_path_factory):
    """The folder of the results of a task, and then of all, each a process of its own, and what they said."""
    folder = tmp_path_factory.mktemp("all")
    usual = ["--checkpoint", str(RUN), "--data", str(images), "--workers", "0", "--cache-dir", str(folder / "cache")]
    said = []
    for words in (["knn", "k=[3]"], ["all", *ALL]):
        ends = run_ranks(evaluate, 1, folder / "output", *words, *usual, "--out", str(folder / "out"))
        assert_all(ends)
        said.append(ends[0].output)
    return folder, said


def test_a_task_and_then_all_that_the_columns_allow(all_tasks):
    folder, (first, second) = all_tasks
    results = results_of(folder / "out")
    assert list(results["tasks"]) == ["knn", "linear", "logistic", "lowshot", "attentive", "finetune"]
    assert (results["network"], results["step"], results["image_size"], results["seed"]) == ("target", 4, 16, 0)
    assert results["data"].endswith(":train") and results["test_data"].endswith(":validation")
    for name, task in results["tasks"].items():
        chosen = [measure["value"] for measure in task["measures"] if measure["chosen"]]
        assert chosen == [task["result"]] and task["seconds"] >= 0.0
        assert {measure["count"] for measure in task["measures"]} == {24} and 0.0 <= task["result"] <= 100.0
        assert f"{name}: 40 images to fit on, 24 to judge by" in second
    knn = results["tasks"]["knn"]
    assert knn["arguments"][:2] == ["all", ALL[0]] and str(RUN) in knn["arguments"]
    assert (
        knn["settings"] == {"k": [1, 5], "temperature": 0.07} and len(knn["measures"]) == 2
    )  # of all, no more of k=[3]
    assert 25.0 < results["tasks"]["logistic"]["result"] < 100.0
    assert results["tasks"]["linear"]["settings"]["epochs"] == 2
    assert "\nlast 2 blocks, BatchNorm, lr 0.01, weight decay 0.0005 " in second  # in one line
    assert "k-NN, k = 3" in first and "k-NN, k = 1" in second and "encoding" in first
    for name in ("count", "distance"):
        assert f"left out: {name}: " in second and f"has no column '{name}'; it has: label (int64)" in second
    assert f"results: {folder / 'out' / 'results.json'}" in second and "Traceback" not in second
    pictures = {path.name for path in (folder / "out").glob("*.png")}
    assert {"knn.png", "lowshot.png", "linear-confusions.png", "logistic-confusions.png"} <= pictures
    assert {path.name for path in (folder / "out").glob("*.txt")} == {
        "lowshot-2-seed0.txt",
        "lowshot-25percent-seed0.txt",
    }


@pytest.mark.slow
def test_two_ranks_of_torchrun_have_the_numbers_of_one_process(all_tasks, images, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    usual = ["--checkpoint", RUN, "--data", images, "--workers", "0", "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(
        [*map(str, [*torchrun, EVALUATE, "all", *usual, "--out", tmp_path / "out", *ALL])],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert numbers(results_of(tmp_path / "out")) == numbers(results_of(all_tasks[0] / "out"))
    assert done.stdout.count("logistic: 40 images to fit on") == 1  # the first rank speaks


# Wrong input


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch-size", "0"], "error: --batch-size must be 1 or more, --workers, --image-size and --seed 0 or more"),
        (["--checkpoint", "/nowhere"], "error: there is no /nowhere; give a run folder or one of its checkpoints"),
        (["lr=1"], "error: unknown config key lr; valid here: k, temperature"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(images, tmp_path, words, message):
    usual = ["--checkpoint", str(RUN), "--data", str(images), "--workers", "0", "--cache-dir", str(tmp_path / "cache")]
    ends = run_ranks(evaluate, 1, tmp_path / "output", "knn", *usual, "--out", str(tmp_path / "out"), *words)
    assert_all(ends, 2)
    assert ends[0].output.startswith(message) and ends[0].output.count("\n") == 1, ends[0].output


@pytest.mark.parametrize(
    "given, message",
    [
        ({"overrides": ["kk=[3]"]}, "unknown config key kk; did you mean k"),
        ({"overrides": ["k=3"]}, r"k is a list: give k=\[3\]"),
        ({"overrides": ["k=[0]"]}, r"k must be at least 1 and temperature above 0, got k \[0\]"),
        ({"overrides": ["k"]}, "'k' is not of the form"),
        ({"features": True}, "--features is of linear, count, distance and attentive, not of knn"),
        ({"split": "trane"}, "has no split 'trane'; it has: train, validation"),
        ({"test_split": "tset"}, "has no split 'tset'; it has: train, validation"),
        ({"test_split": "train"}, "--split and --test-split are both 'train'; .* has: train, validation"),
        ({"label": "breed"}, r"has no column 'breed'; it has: label \(int64\)"),
        ({"task": "count"}, r"has no column 'count'; it has: label \(int64\)"),
        ({"data": "/nowhere"}, "there is no folder '/nowhere'"),
        ({"image_size": 17}, "multiples of the patch, 4 pixels, got 17 x 17"),
        (
            {"task": "all", "overrides": ["k=[3]"]},
            r"'k=\[3\]' is of no task: with all give TASK.key=value, of knn, ",
        ),
        ({"task": "all", "overrides": ["knn.lr=1"]}, "unknown config key lr; valid here: k, temperature"),
        ({"task": "lowshot", "overrides": ["labels=[0%]"]}, "labels must be a percentage such as 1%.* got '0%'"),
        (
            {"task": "linear", "overrides": ["epochs=14"]},
            r"epochs=14 end before .* give drops=\[4,8,12\], or drops=\[\] for",
        ),
        ({"task": "finetune", "overrides": ["epochs=5"]}, "epochs=5 end within warmup_epochs=5.* give warmup_epochs=0"),
        ({"task": "linear", "overrides": ["optimizer=adam"]}, "optimizer must be sgd or lars.* got adam"),
    ],
)
def test_what_wrong_input_is_told(request_of, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(ONE, request_of(**given))
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("field", ["batch_size", "workers", "image_size", "seed", "train_images", "test_images"])
def test_numbers_that_are_too_small(request_of, field):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')}.* got .*-1"):
        request_of(**{field: -1})


@pytest.mark.parametrize("words", [["pca"], ["knn", "--network", "predictor"], ["knn", "--batch-size", "few"], []])
def test_words_that_the_parser_refuses(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_intermixed_args([*words, "--checkpoint", "a", "--data", "b"])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_settings_stand_before_between_and_behind_options():
    required = ["--checkpoint", "a", "--data", "b"]
    orders = [
        ["linear", "lr=1", "epochs=2", *required, "--features"],
        ["linear", *required, "--features", "lr=1", "epochs=2"],
        ["--features", "linear", "lr=1", *required, "epochs=2"],
        ["--local_rank=0", *required, "linear", "lr=1", "--features", "epochs=2"],
    ]
    parsed = [parser().parse_intermixed_args(order) for order in orders]
    assert all(one == parsed[0] for one in parsed)
    assert (parsed[0].task, parsed[0].overrides, parsed[0].features) == ("linear", ["lr=1", "epochs=2"], True)


# Where things go, and of what


def test_features_speed_up_the_tasks_that_have_them(request_of, tmp_path):
    evaluate_tasks(
        ONE, request_of(task="linear", features=True, overrides=["epochs=1", "drops=[]"], out=str(tmp_path / "out"))
    )
    task = results_of(tmp_path / "out")["tasks"]["linear"]
    assert task["settings"]["features"] is True and task["settings"]["epochs"] == 1


def test_each_network_has_its_own_features_and_its_own_folder_in_the_run(request_of, tmp_path, images):
    logistic = {"task": "logistic", "overrides": ["l2=[1.0]"]}
    evaluate_tasks(ONE, request_of(**logistic))
    evaluate_tasks(ONE, request_of(**logistic, network="context"))
    evaluate_tasks(ONE, request_of(checkpoint=str(tmp_path / "run" / "checkpoints" / "step-00000004")))
    name = f"{images.name}-step-00000004"
    folders = [tmp_path / "run" / "evaluations" / of for of in (name, f"{name}-context")]
    assert sorted(folders) == sorted((tmp_path / "run" / "evaluations").iterdir())
    target, context = map(results_of, folders)
    assert list(target["tasks"]) == ["logistic", "knn"] and list(context["tasks"]) == ["logistic"]
    assert target["sha256"] != context["sha256"]
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 4  # of two networks and two splits


def test_other_results_into_one_folder_are_refused_before_anything_is_done(request_of, tmp_path, images):
    out = str(tmp_path / "out")
    evaluate_tasks(ONE, request_of(out=out))
    copy = shutil.copytree(images, tmp_path / images.name)  # by its name the same
    shutil.copy(copy / "train/class-1/001.png", copy / "train/class-0/000.png")
    kept = len(list((tmp_path / "cache" / "features").iterdir()))
    for key, changed in (
        ("network", {"network": "context"}),
        ("seed", {"seed": 1}),
        ("image_size", {"image_size": 12}),
        ("data", {"split": "validation", "test_split": "train"}),
        ("images_sha256", {"data": str(copy)}),
    ):
        message = rf"results\.json is of another evaluation: its {key} is .* give another --out"
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(ONE, request_of(out=out, **changed))
    assert len(list((tmp_path / "cache" / "features").iterdir())) == kept


def test_of_all_what_cannot_be_here_is_left_out_before_the_first_begins(request_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)

    def asked(**given):
        request, said = request_of(train_images=12, **given), []
        loaded = load(request.checkpoint, request.network)
        train, test = evaluation._open(request, loaded, said.append)
        tasks = evaluation._asked(ONE, request, loaded, train, test, tmp_path, said.append)
        return [task.name for task in tasks], "\n".join(said)

    names, said = asked(task="all")
    assert names == ["knn", "linear", "logistic", "lowshot"]
    assert "left out: finetune: timm not installed; get it with: pip install" in said
    assert "left out: attentive: 12 labelled images are too few" in said
    with pytest.raises(ValueError, match="timm not installed"):
        asked(task="finetune")
    with pytest.raises(ValueError, match="timm not installed"):
        asked(task="linear", overrides=["optimizer=lars"])


def test_wandb_that_lets_nobody_in_costs_no_result(request_of, tmp_path, monkeypatch, capsys):
    def refused(*given):
        raise ValueError("logging.wandb=online: no API key; run `wandb login`")

    monkeypatch.setattr(evaluation, "log_evaluation", refused)
    evaluate_tasks(ONE, request_of(out=str(tmp_path / "out")))
    assert results_of(tmp_path / "out")["tasks"].keys() == {"knn"}
    assert "warning: knn is not in the run's wandb: logging.wandb=online: no API key" in capsys.readouterr().out


def test_values_go_to_the_wandb_run_of_the_checkpoint(request_of, tmp_path, monkeypatch):
    given = []

    class Fake:
        def __init__(self, mode, **options):
            given.append((mode, options["run_id"], options["run_dir"]))

        def log(self, record, step):
            given.append((record, step))

        def finish(self):
            given.append("finished")

    monkeypatch.setattr(records, "WandbWriter", Fake)
    request = request_of(overrides=["k=[1,5]"], out=str(tmp_path / "out"))
    evaluate_tasks(ONE, request)
    assert given == []  # the run had it off
    manifest = tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json"
    said = {**json.loads(manifest.read_text()), "wandb_id": "abc"}
    said["config"]["logging"]["wandb"] = "offline"
    del said["sha256"]
    sealed = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({**said, "sha256": sealed}))
    evaluate_tasks(ONE, request)
    values = {f"knn/{m['name']}": m["value"] for m in results_of(tmp_path / "out")["tasks"]["knn"]["measures"]}
    assert given == [("offline", "abc", tmp_path / "run"), (values, 4), "finished"] and len(values) == 2


def test_a_single_split_is_divided_and_said(request_of, tmp_path, images, capsys):
    only = tmp_path / "only"
    shutil.copytree(images / "train", only / "train")
    evaluate_tasks(ONE, request_of(data=str(only), out=str(tmp_path / "out")))
    said = " ".join(capsys.readouterr().out.split())
    assert "only:train is the only split: every fifth image of a class is for testing; or give --test-data" in said
    assert "knn: 32 images to fit on, 8 to judge by" in said
    results = results_of(tmp_path / "out")
    assert results["data"] == results["test_data"] == "only:train"


def test_test_images_of_elsewhere_and_some_images_have_folders_of_their_own(request_of, tmp_path, images):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(images / "validation", elsewhere / "train")
    evaluate_tasks(ONE, request_of())
    evaluate_tasks(ONE, request_of(test_data=str(elsewhere)))
    evaluate_tasks(ONE, request_of(train_images=20))
    folder, name = tmp_path / "run" / "evaluations", f"{images.name}-step-00000004"
    assert {path.name for path in folder.iterdir()} == {name, f"{name}-on-elsewhere-train", f"{name}-20+all-images"}
    found, usual = results_of(folder / f"{name}-on-elsewhere-train"), results_of(folder / name)
    assert results_of(folder / f"{name}-20+all-images")["train_images"] == 20
    assert found["test_data"] == "elsewhere:train" and numbers(found) == numbers(usual)
