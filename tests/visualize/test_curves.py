import numpy as np
import pytest
from PIL import Image

from ijepa_scale.visualize import curves as report
from ijepa_scale.visualize.curves import Score, draw_loss_curve, draw_scores
from tests.evals.test_scores import scores


def step_record(step, **values):
    record = {"kind": "step", "step": step, "loss": 1 / (step + 1), "lr": 1e-3, "weight_decay": 0.04}
    return {**record, "ema_momentum": 0.996, "grad_norm": 1.0, **values}


def health_record(step, **values):
    return {"kind": "health", "step": step, "feature_std": 0.2, "rankme": 12.0, "drift": 0.1, "knn": 30.0, **values}


def axes_of(path, records, monkeypatch):
    """The panels by title, caught on their way to the file."""
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    draw_loss_curve(path, records)
    return {axis.get_title(): axis for axis in figures[0].axes}


def test_names_of_labels_are_no_formulas(tmp_path, monkeypatch):
    names = ["[red]x", "[/]", "$1_$2", "$"]
    odd = [Score(probe=f"k-NN {name}", initial=1.0, trained=2.0, chance=1.0, num_test=9) for name in names]
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    draw_scores(tmp_path / "scores.png", odd)
    labels = figures[0].axes[0].get_xticklabels()
    assert len(labels) == len(names) and not any(label.get_parse_math() for label in labels)
    figures[0].canvas.draw()


def test_bars_have_the_heights_of_the_scores(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    draw_scores(tmp_path / "scores.png", scores())
    (axis,) = figures[0].axes
    assert sorted(bar.get_height() for bar in axis.patches) == sorted([28.1, 41.2, 36.0, 36.5, 40.0, 33.0])
    with pytest.raises(ValueError, match="no scores"):
        draw_scores(tmp_path / "scores.png", [])


@pytest.mark.parametrize("chart", ["scores", "curves"])
def test_pictures_are_written(tmp_path, chart):
    path = tmp_path / "new folder" / "picture.png"
    if chart == "scores":
        draw_scores(path, scores()[:1])
    else:
        draw_loss_curve(path, [step_record(step) for step in range(40)] + [health_record(0)])
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    "record", [step_record(0), step_record(7, loss=None, grad_norm=None), {"step": 3, "loss": 0.5}]
)
def test_a_single_record_draws(tmp_path, record):
    draw_loss_curve(tmp_path / "curve.png", [record])
    draw_loss_curve(tmp_path / "curve.png", [record, health_record(0, knn=None, drift=None)])
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_no_step_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no step records"):
        draw_loss_curve(tmp_path / "curve.png", [health_record(0)])


def test_health_panels_appear_with_health_records_only(tmp_path, monkeypatch):
    steps = [step_record(step) for step in range(20)]
    assert not any(title.startswith("features") for title in axes_of(tmp_path, steps, monkeypatch))
    axes = axes_of(tmp_path, [*steps, health_record(0), health_record(10, rankme=13.0)], monkeypatch)
    assert list(axes["features: spread and rank"].lines[0].get_ydata()) == [0.2, 0.2]
    assert axes["features: k-NN and drift"].get_ylabel() == "k-NN (%)"
    unlabelled = axes_of(tmp_path, [*steps, health_record(0, knn=None)], monkeypatch)
    assert unlabelled["features: k-NN and drift"].get_ylabel() == "drift, target to context"


def test_the_parts_of_the_loss_are_drawn_where_it_has_parts(tmp_path, monkeypatch):
    parts = {"loss_prediction": 0.25, "loss_variance": 0.5, "loss_covariance": 3.0}
    steps = [step_record(step, **parts) for step in range(5)]
    assert not any("term" in title for title in axes_of(tmp_path, [step_record(0)], monkeypatch))
    for records in (steps, [*steps, health_record(4)]):
        axes = axes_of(tmp_path, records, monkeypatch)
        assert list(axes["loss (may rise: its targets move)"].lines[-1].get_ydata()) == [0.25] * 5
        assert list(axes["variance term, before its weight"].lines[0].get_ydata()) == [0.5] * 5
        assert list(axes["covariance term, before its weight"].lines[0].get_ydata()) == [3.0] * 5
        assert any(title.startswith("features") for title in axes) == (len(records) > len(steps))


def test_skipped_steps_are_gaps_and_are_counted(tmp_path, monkeypatch):
    records = [step_record(step) for step in range(100)]
    records[3].update(loss=None, grad_norm=None)
    records[4].update(loss=float("nan"))
    records[50].update(grad_norm=float("inf"))  # the loss was finite, the gradients were not
    axis = axes_of(tmp_path, records, monkeypatch)["loss (may rise: its targets move)"]
    ticks = next(line for line in axis.lines if line.get_label() == "3 skipped steps")
    assert list(ticks.get_xdata()) == [3, 4, 50]
    raw = next(line for line in axis.lines if line.get_label() == "each step")
    assert list(np.flatnonzero(np.isnan(raw.get_ydata()))) == [3, 4]


def test_long_runs_are_thinned_but_keep_their_extremes(tmp_path, monkeypatch):
    records = [step_record(step, loss=0.5) for step in range(120_000)]
    records[77_777]["loss"] = 9.0
    records[88_888]["loss"] = None
    axes = axes_of(tmp_path, records, monkeypatch)
    axis = axes["loss (may rise: its targets move)"]
    assert all(len(line.get_xdata()) <= report.MAX_POINTS for line in axis.lines)
    assert max(path.vertices[:, 1].max() for band in axis.collections for path in band.get_paths()) == 9.0
    assert any(line.get_label() == "1 skipped step" for line in axis.lines)


def test_thinning_and_smoothing_agree_with_slow_versions():
    generator = np.random.default_rng(0)
    at, values = np.arange(2357.0), generator.standard_normal(2357)
    values[generator.random(2357) < 0.3] = np.nan
    values[400:420] = np.nan
    for width in (3, 20, 5000):
        expected = [
            np.nanmean(window) if np.isfinite(window).any() else np.nan
            for window in (values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values)))
        ]
        np.testing.assert_allclose(report.moving_average(values, width), expected, atol=1e-12)
    starts = [int(i * 2357 / report.MAX_POINTS) for i in range(report.MAX_POINTS)]
    runs = [slice(a, b) for a, b in zip(starts, [*starts[1:], 2357], strict=True)]
    x, mean, low, high = report.thin(at, values)
    for i in range(0, report.MAX_POINTS, 7):
        run = values[runs[i]][np.isfinite(values[runs[i]])]
        slow = (run.mean(), run.min(), run.max()) if len(run) else (np.nan,) * 3
        np.testing.assert_allclose((x[i], mean[i], low[i], high[i]), (at[runs[i]].mean(), *slow))
