"""What a run came to: its curves, its scores against the untrained network, and whether the difference is real."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ijepa_scale.data.files import written_whole
from ijepa_scale.evals.scores import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 1000  # drawn of one curve: more than a panel has pixels
SMOOTHING = 0.02  # width of the moving average, as a share of the run
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#D55E00", "#009E73", "#B2182B", "#9E9E9E"


def draw_scores(path: str | Path, scores: Sequence[Score]) -> None:
    """Write a PNG of bars: each probe at initialisation and trained, with standard errors, and its chance level."""
    from matplotlib.figure import Figure

    if not scores:
        raise ValueError("no scores to draw; the report needs one probe or more")
    figure = Figure(figsize=(max(5.0, 1.5 * len(scores) + 1.5), 4.0), dpi=120, facecolor="white", layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(scores))
    for offset, colour, label in ((-0.2, GREY, "initial"), (0.2, BLUE, "trained")):
        heights = [getattr(score, label) for score in scores]
        errors = [getattr(score, f"{label}_error") for score in scores]
        name = "before training" if label == "initial" else label
        axis.bar(places + offset, heights, 0.38, yerr=errors, capsize=3, color=colour, label=name)
        for place, height, error in zip(places + offset, heights, errors, strict=True):
            axis.annotate(
                f"{height:.1f}", (place, height + error), (0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    chances = [score.chance for score in scores]
    axis.hlines(chances, places - 0.45, places + 0.45, colors="black", linestyles="dashed", linewidth=1, label="chance")
    axis.set_xticks(places, [f"{score.probe}\n{score.verdict}" for score in scores], fontsize=8, parse_math=False)
    axis.set_ylabel("top-1 accuracy (%)")
    axis.set_ylim(0, 1.12 * max([1.0, *chances, *(max(score.initial, score.trained) for score in scores)]))
    axis.set_title("Frozen features, probed (error bars: ± one standard error)", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(figure, path)


def draw_loss_curve(path: str | Path, records: Sequence[dict[str, Any]], *, moving: bool = True) -> None:
    """Write a PNG of a run's curves against the step, from the records of metrics.jsonl.

    Loss, gradient norm, schedules and EMA momentum from the "step" records, and the parts of the loss, if it has any;
    feature spread and rank, k-NN and drift from the "health" records, if there are any. A null is a gap; a step that
    was skipped is marked and counted. moving: whether the loss's targets are of an encoder that is trained, too.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    steps = [record for record in records if record.get("kind", "step") == "step"]
    health = [record for record in records if record.get("kind") == "health"]
    if not steps:
        raise ValueError("no step records to draw: metrics.jsonl is empty; train at least one step")
    with_terms = any("loss_variance" in record for record in steps)
    columns = 2 + with_terms + bool(health)
    figure = Figure(figsize=(4.4 * columns, 6.4), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    _draw_loss(axes[0, 0], steps, moving)
    _draw_gradient_norm(axes[0, 1], steps)
    _draw_pair(axes[1, 0], steps, ("lr", "learning rate", BLUE), ("weight_decay", "weight decay", ORANGE))
    axes[1, 0].set_title("schedules", fontsize=10)
    if moving:
        _draw_series(axes[1, 1], *_series(steps, "ema_momentum"), GREEN)
        axes[1, 1].set_title("EMA momentum", fontsize=10)
        axes[1, 1].ticklabel_format(axis="y", useOffset=False)
    else:
        axes[1, 1].set_axis_off()  # there is no EMA
    if with_terms:
        for axis, part, color in ((axes[0, 2], "variance", BLUE), (axes[1, 2], "covariance", ORANGE)):
            _draw_series(axis, *_series(steps, f"loss_{part}"), color)
            axis.set_title(f"{part} term, before its weight", fontsize=10)
    if health:
        _draw_pair(axes[0, -1], health, ("feature_std", "feature std", BLUE), ("rankme", "RankMe", ORANGE))
        axes[0, -1].set_title("features: spread and rank", fontsize=10)
        _draw_pair(axes[1, -1], health, ("knn", "k-NN (%)", GREEN), ("drift", "drift, target to context", GREY))
        axes[1, -1].set_title("features: k-NN and drift", fontsize=10)
    first, last = steps[0]["step"], max(record["step"] for record in records)
    margin = max(1.0, 0.03 * (last - first))
    for axis in axes.flat:
        axis.set_xlim(first - margin, last + margin)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 150k
    for axis in axes[1]:
        axis.set_xlabel("step")
    save(figure, path)


def _draw_loss(axis: "Axes", records: Sequence[dict[str, Any]], moving: bool) -> None:
    at, loss = _series(records, "loss")
    skipped = at[~np.isfinite(loss) | _null(records, "grad_norm")]
    label = "each step" if len(at) <= MAX_POINTS else f"mean and range of {len(at) / MAX_POINTS:.0f} records"
    _draw_series(axis, at, loss, BLUE, alpha=0.35, label=label)
    if np.isfinite(loss).sum() > 10:
        mean = moving_average(loss, max(3, round(SMOOTHING * len(loss))))
        axis.plot(*thin(at, mean)[:2], color=BLUE, linewidth=1.8, label="smoothed")
    part, prediction = _series(records, "loss_prediction")
    if np.isfinite(prediction).any():
        _draw_series(axis, part, prediction, GREEN, label="of it: prediction")
    if len(skipped):
        label = f"{len(skipped)} skipped step{'s' if len(skipped) > 1 else ''}"
        shown = skipped[:: math.ceil(len(skipped) / MAX_POINTS)]
        axis.plot(shown, np.full(len(shown), 0.03), "|", color=RED, label=label, transform=axis.get_xaxis_transform())
    axis.set_title("loss (may rise: its targets move)" if moving else "loss", fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)


def _draw_gradient_norm(axis: "Axes", records: Sequence[dict[str, Any]]) -> None:
    at, norm = _series(records, "grad_norm")
    _draw_series(axis, at, norm, ORANGE)
    positive = norm[norm > 0]
    if len(positive) and positive.max() > 100 * positive.min():
        axis.set_yscale("log")
    axis.set_title("gradient norm", fontsize=10)


def _draw_pair(axis: "Axes", records: Sequence[dict[str, Any]], *curves: tuple[str, str, str]) -> None:
    """Draw the curves (key, label, colour) that the records have; the second against an axis on the right."""
    present = [curve for curve in curves if any(_finite(record.get(curve[0])) for record in records)]
    for side, (key, label, colour) in zip((axis, axis.twinx() if len(present) > 1 else axis), present, strict=False):
        _draw_series(side, *_series(records, key), colour)
        side.set_ylabel(label, color=colour)
        side.tick_params(axis="y", labelcolor=colour)
    if not present:
        _draw_nothing(axis)


def _draw_nothing(axis: "Axes") -> None:
    axis.text(0.5, 0.5, "no value recorded", transform=axis.transAxes, ha="center", color=GREY)


def _draw_series(
    axis: "Axes", at: np.ndarray, values: np.ndarray, colour: str, *, alpha: float = 1.0, label: str | None = None
) -> None:
    if not np.isfinite(values).any():
        _draw_nothing(axis)
        return
    x, mean, low, high = thin(at, values)
    marker = "o" if len(x) <= 30 else None  # a single point has no line, and few are better seen
    axis.plot(x, mean, color=colour, alpha=alpha, linewidth=1.2, marker=marker, markersize=3, label=label)
    if len(x) < len(at):
        axis.fill_between(x, low, high, color=colour, alpha=0.3 * alpha, linewidth=0)


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, (n,) float64; a missing value or a null is NaN."""
    at = np.array([record["step"] for record in records], dtype=np.float64)
    values = np.array([record.get(key) for record in records], dtype=np.float64)  # NumPy reads None as NaN
    return at, np.where(np.isfinite(values), values, np.nan)


def _null(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Where a key is recorded but not a finite number: how a step that was skipped shows."""
    return np.array([key in record and not _finite(record[key]) for record in records])


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean of the finite values in a window, which is cut at both ends; NaN where it holds none."""
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    place = np.arange(len(values))
    low, high = np.maximum(place - width // 2, 0), np.minimum(place + width // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def thin(
    at: np.ndarray, values: np.ndarray, points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean step, and mean, least and largest value, of at most so many runs of neighbouring records."""
    if len(at) <= points:
        return at, values, values, values
    starts = np.linspace(0, len(at), points, endpoint=False).astype(np.int64)
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    mean = np.where(count > 0, np.add.reduceat(np.where(finite, values, 0.0), starts) / np.maximum(count, 1), np.nan)
    low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)  # both pass over NaN
    lengths = np.diff(np.append(starts, len(at)))
    return np.add.reduceat(at, starts) / lengths, mean, low, high


def save(figure: Any, path: str | Path) -> None:
    """Write a PNG, whole or not at all: a page may be made of the folder meanwhile."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_whole(Path(path)) as file:
        figure.savefig(file, format="png")
