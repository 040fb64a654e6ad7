import io
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ijepa_scale import build
from ijepa_scale.build import EvalImages
from ijepa_scale.config import ReportConfig, load_config
from ijepa_scale.data.images import ImageSet
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.evals.logistic import fit_logistic
from ijepa_scale.evals.probes import Features, probe_scores
from ijepa_scale.run import report as assess
from ijepa_scale.run.health import HealthChecks
from ijepa_scale.run.report import report, report_indices


@pytest.mark.parametrize("ranks, train, test", [(1, 4000, 2000), (2, 10, 6), (3, 30, 30)])
def test_probes_are_not_scored_on_images_they_are_fitted_on(ranks, train, test):
    """Where there is no other split; and there is something of both."""
    images = range(31)
    run = SimpleNamespace(
        ranks=SimpleNamespace(world_size=ranks),
        config=SimpleNamespace(report=ReportConfig(train_images=train, test_images=test)),
        evaluation=EvalImages(images, images, held_out=False),
    )
    fit, score = report_indices(run)
    assert fit and score and not set(fit) & set(score) and len({*fit, *score}) == len(fit) + len(score)
    assert len(fit) % ranks == len(score) % ranks == 0 and {*fit, *score} <= set(images)


COUNT = 40


def file(i):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


FILES = [{"bytes": file(i), "path": None} for i in range(2 * COUNT)]
ALTERNATING = [i // 3 % 2 for i in range(COUNT)]


def image_set(split="train", first=0, features=None, **columns):
    """COUNT images with columns beside them. features: of `datasets`, where Arrow's types do not say it."""
    table = {"image": pa.array(FILES[first : first + COUNT], pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
    table |= {name: pa.array(values) if isinstance(values, list) else values for name, values in columns.items()}
    data = datasets.Dataset(pa.table(table), fingerprint="x")
    return ImageSet(data.cast(datasets.Features({**data.features, **(features or {})})), "image", name="x", split=split)


@pytest.fixture
def run(small_config, tmp_path, monkeypatch):
    """A run that is finished, as its report and its health check see it."""
    config = load_config(small_config, ["report.train_images=24", "report.test_images=12", "logging.health_images=32"])
    model = build.build_model(config)
    checkpoint = SimpleNamespace(step=12, path=Path("step-00000012"), manifest={})
    monkeypatch.setattr(assess.checkpoints, "newest_good", lambda folder, ranks: (checkpoint, []))
    monkeypatch.setattr(assess, "read_weights", lambda found, encoder, objective, network: None)
    for drawing in ("draw_loss_curve", "draw_scores"):  # tested elsewhere, and most of the time that all of this takes
        monkeypatch.setattr(assess, drawing, lambda path, of, **options: path.write_text(str(len(of))))
    monkeypatch.setattr(assess, "write_page", lambda path: path / "report.html")
    monkeypatch.setitem(fit_logistic.__kwdefaults__, "max_iterations", 3)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 0.5}) + "\n")
    return SimpleNamespace(
        config=config,
        ranks=Ranks(0, 1, 0, torch.device("cpu")),
        folder=SimpleNamespace(path=tmp_path, metrics=tmp_path / "metrics.jsonl", checkpoints=tmp_path),
        objective=build.build_objective(config),
        engine=SimpleNamespace(module=model),
        dataset=SimpleNamespace(micro_batch_size=64),
        horizon=SimpleNamespace(stop=12),
    )


def outcome(run, train, test=None):
    """(report.json, the health record) of a run on these images."""
    for name in ("report.json", "scores.png", "loss_curve.png"):
        (run.folder.path / name).unlink(missing_ok=True)
    run.evaluation = EvalImages(train, test or train, held_out=test is not None)
    report(run)
    records = []
    HealthChecks(run, records.append, lambda line: None).measure(12, loss=0.5)
    assert (run.folder.path / "loss_curve.png").exists() and np.isfinite(records[0]["rankme"])
    return json.loads((run.folder.path / "report.json").read_text()), records[0]


UNFIT = {  # a column called label -> what is said of it
    "no labels to probe with": [
        pa.array([2**63 + i for i in range(COUNT)], pa.uint64()),
        pa.array([2**63, 1] * (COUNT // 2), pa.uint64()),
        [10_000 + i for i in range(COUNT)],
        [-i - 1 for i in range(COUNT)],
        [[0, 1, 1]] * COUNT,
        [[[0, 1], [1, 1]]] * COUNT,
        [0.0, 1.0] * (COUNT // 2),
        [float("nan")] * COUNT,
        [True, False] * (COUNT // 2),
        ["cat", "dog"] * (COUNT // 2),
        [None] * COUNT,
        [b"a mask"] * COUNT,
        pa.array([1] * COUNT, pa.duration("s")),
    ],
    "of one class": [[3] * COUNT, pa.array([0] * COUNT, pa.uint8())],
    "a class of its own": [list(range(COUNT))],
    "labelled images to fit on": [
        [0, *[None] * (COUNT - 1)],
        [0, *[-1] * (COUNT - 1)],
        [0, 1, 0, 1, *[None] * (COUNT - 4)],
    ],
}


def test_labels_that_cannot_be_probed_end_no_run_and_cost_no_other_label(run, capsys):
    for reason, columns in UNFIT.items():
        note = outcome(run, image_set(label=columns[0]))[0]
        assert note["scores"] == [] and reason in note["note"]
        assert f"no probes: {note['note']}; curves are in" in capsys.readouterr().out
        for column in columns:
            beside, health = outcome(run, image_set(label=column, **{"class": ALTERNATING}))
            assert [score["probe"] for score in beside["scores"]] == ["k-NN class", "linear class"]
            assert beside["not_probed"] == {} or reason in beside["not_probed"]["label"]
            assert (f"no probes of label: {beside['not_probed'].get('label')}" in capsys.readouterr().out) == bool(
                beside["not_probed"]
            )
            assert health["knn_label"] == "class" or len(set(column)) == 3  # four labels may do for it
            assert 0 <= health["knn"] <= 100
    mask = {"label": datasets.Array2D((2, 2), "int64")}
    assert outcome(run, image_set(label=[[[0, 1], [1, 1]]] * COUNT, features=mask))[0]["note"]
    assert outcome(run, image_set(label=FILES[:COUNT], features={"label": datasets.Image()}))[0]["note"]
    nameless = {"label": datasets.ClassLabel(num_classes=2), "class": datasets.ClassLabel(names=["x", "y"])}
    both = outcome(run, image_set(label=ALTERNATING, **{"class": ALTERNATING}, features=nameless))[0]
    assert len(both["scores"]) == 4


def test_labels_of_one_split_alone(run, capsys):
    labelled, bare = {"label": ALTERNATING}, {}
    for train, test in ((labelled, bare), (bare, labelled), (labelled, {"label": [None] * COUNT})):
        images = image_set(**train), image_set("test", COUNT, **test)
        assert "no labels to probe with" in outcome(run, *images)[0]["note"]
    others = image_set(label=[0, 1] * (COUNT // 2)), image_set("test", COUNT, label=[5, 6] * (COUNT // 2))
    assert "no image to score on is of a class" in outcome(run, *others)[0]["note"]
    assert len(outcome(run, image_set(**labelled), image_set("test", COUNT, **labelled))[0]["scores"]) == 2


def test_features_that_are_not_finite_are_not_probed():
    good, bad = torch.randn(20, 4), torch.full((20, 4), float("nan"))
    labels = {"label": (np.arange(20) % 2, np.arange(20) % 2)}
    for trained in (Features(bad, good), Features(good, bad)):
        scores, reasons = probe_scores(labels, initial=Features(good, good), trained=trained)
        assert scores == [] and "the encoder has diverged" in reasons["label"]


def test_health_of_an_objective_without_a_target(run):
    run.evaluation = EvalImages(image_set(label=ALTERNATING), image_set(label=ALTERNATING), held_out=False)
    records = []
    encoders = run.objective.encoders(run.engine.module)
    for chosen in (encoders, {"context": encoders["context"]}):
        run.objective = SimpleNamespace(name="", encoders=lambda module, chosen=chosen: chosen, advice=lambda: "")
        HealthChecks(run, records.append, lambda line: None).measure(3, loss=None)
    both, alone = records
    assert alone == {key: value for key, value in both.items() if key != "drift"}  # the target is its copy at the start
    assert abs(both["drift"]) < 1e-6
    assert list(both) == ["kind", "step", "feature_std", "rankme", "drift", "loss", "knn", "knn_label", "knn_images"]


def test_a_page_that_cannot_be_written_is_told_and_fails_no_finished_run(run, monkeypatch, capsys):
    def full(path):
        assert (path / "report.json").exists() and (path / "scores.png").exists()
        raise OSError(28, "No space left on device", str(path / "report.html"))

    monkeypatch.setattr(assess, "write_page", full)
    assert len(outcome(run, image_set(label=ALTERNATING))[0]["scores"]) == 2
    said = capsys.readouterr().err
    assert "warning: the page of the run was not written: OSError: [Errno 28] No space left on device" in said
    assert f"ijepa-scale report {run.folder.path}" in said
