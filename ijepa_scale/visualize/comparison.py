"""Recipes beside one another: accuracy against what was spent, with the spread over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ijepa_scale.visualize.curves import save

# Told apart with any colour vision (Okabe and Ito), and by their markers on paper.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
DASHES = ("solid", "dashed", "dotted")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve of one row of panels. name: of the recipe, which is its colour. kind: of the run, which is its dashes.

    spent: one (P,) for each panel of the row. scores, spreads: (P,) percent, mean and standard deviation over seeds.
    """

    name: str
    kind: str
    spent: Sequence[np.ndarray]
    scores: np.ndarray
    spreads: np.ndarray


def draw_comparison(path: Path, title: str, along: Sequence[str], rows: Sequence[tuple[str, Sequence[Line]]]) -> None:
    """Write a PNG: a row of panels for each probe, a panel for each thing that was spent.

    along: names of the x axes. rows: (a probe's name, its lines).
    """
    from matplotlib.figure import Figure

    size = (5.4 * len(along), 1.2 + 2.9 * len(rows))
    figure = Figure(figsize=size, dpi=120, facecolor="white", layout="constrained")
    panels = figure.subplots(len(rows), len(along), squeeze=False)
    names, kinds = (list(dict.fromkeys(getattr(line, key) for line in rows[0][1])) for key in ("name", "kind"))
    for row, (probe, lines) in enumerate(rows):
        for column, words in enumerate(along):
            axis = panels[row, column]
            for line in lines:
                colour, marker = STYLES[names.index(line.name) % len(STYLES)]
                kind = kinds.index(line.kind)
                axis.errorbar(
                    line.spent[column],
                    line.scores,
                    yerr=line.spreads if line.spreads.any() else None,
                    color=colour,
                    marker=marker,
                    markerfacecolor="white" if kind else colour,
                    markersize=5,
                    linestyle=DASHES[kind],
                    linewidth=1.4,
                    elinewidth=1,
                    capsize=2,
                    label=f"{line.name}, {line.kind}",
                )
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if row == len(rows) - 1:
                axis.set_xlabel(words)
        panels[row, 0].set_ylabel(f"{probe} (%)")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.suptitle(title, fontsize=10)
    save(figure, path)
