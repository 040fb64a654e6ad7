"""Accuracies of an evaluation: along a setting, and where the worst classes go wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.visualize.curves import BLUE, GREEN, GREY, ORANGE, save

WORST = 12  # classes shown, and as many that they are taken for


def draw_accuracies(
    path: Path,
    title: str,
    along: str,
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    chance: float | None,
) -> None:
    """Write a PNG of lines of points (setting, percent right, standard error), the setting in a logarithmic scale.

    series: a line's name -> its points. along: what the setting is, in words. chance: percent right without looking.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.6), dpi=120, facecolor="white", layout="constrained")
    axis = figure.subplots()
    highest = max(chance or 0.0, 1.0)
    for (name, points), colour in zip(series.items(), (BLUE, ORANGE, GREEN), strict=False):
        at, values, errors = np.array(sorted(points)).T
        highest = max(highest, *(values + errors))
        axis.errorbar(at, values, yerr=errors, marker="o", capsize=3, color=colour, label=name)
        above: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        for x, value, error in zip(at, values, errors, strict=True):
            axis.annotate(f"{value:.1f}", (x, value + error), (0, 3), **above)
    if chance is not None:
        axis.axhline(chance, color=GREY, linestyle="dashed", linewidth=1, label=f"chance {chance:.1f}")
    axis.legend(frameon=False, fontsize=8)
    axis.set_xscale("log")
    ticks = sorted({x for points in series.values() for x, _, _ in points})
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.set_xlabel(along)
    axis.set_ylabel("top-1 accuracy (%)")
    axis.set_ylim(0, 1.15 * highest)
    axis.set_title(title, fontsize=10, parse_math=False)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_confusions(path: Path, title: str, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> None:
    """Write a PNG of the classes that are recognised least, and what their images are taken for, in percent.

    labels, predicted: (n,) int64, into names.
    """
    from matplotlib.figure import Figure

    rows, columns, shares = confusions(labels, predicted)
    size = (2.5 + 0.55 * len(columns), 1.8 + 0.4 * len(rows))
    figure = Figure(figsize=size, dpi=120, facecolor="white", layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=shares.max(), aspect="auto")
    for row, column in np.ndindex(shares.shape):
        if shares[row, column] >= 0.5:
            colour = "white" if shares[row, column] > 0.6 * shares.max() else "black"
            weight = "bold" if rows[row] == columns[column] else "normal"
            words = f"{shares[row, column]:.0f}"
            axis.text(column, row, words, ha="center", va="center", fontsize=7, color=colour, fontweight=weight)
    axis.set_yticks(range(len(rows)), [names[row][:24] for row in rows], fontsize=8, parse_math=False)
    rotated = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(columns)), [names[column][:24] for column in columns], fontsize=8, parse_math=False)
    for label in axis.get_xticklabels():
        label.set(**rotated)
    axis.set_xlabel("taken for (%)")
    axis.set_ylabel("least recognised classes")
    axis.set_title(title, fontsize=10, parse_math=False)
    save(figure, path)


def confusions(labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(classes recognised least, classes that they are taken for, percent of the one that is taken for the other)."""
    number = int(max(labels.max(), predicted.max())) + 1
    counts = np.zeros((number, number))
    np.add.at(counts, (labels, predicted), 1.0)
    present = np.flatnonzero(counts.sum(axis=1))
    shares = 100.0 * counts[present] / counts[present].sum(axis=1, keepdims=True)
    right = shares[np.arange(len(present)), present]
    worst = np.argsort(right, kind="stable")[:WORST]
    rows = present[worst]
    taken = shares[worst].sum(axis=0)
    others = [column for column in np.argsort(-taken, kind="stable") if taken[column] > 0.0 and column not in rows]
    columns = np.array([*rows, *others[:WORST]])
    return rows, columns, shares[worst][:, columns]
