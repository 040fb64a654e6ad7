"""Curves of one run or more beside one another: each panel an inline SVG for a page, or all of them one PNG.

An SVG takes its colours from the page's style sheet, by names: so it is sharp at any size, and right on light and dark.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ijepa_scale.evals.scores import Score
from ijepa_scale.visualize.curves import BLUE, GREY, moving_average, save, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A run's colour and dashes: told apart by any eyes, and on paper. page.html has a light and a dark one of each colour.
COLOURS = (BLUE, "#D55E00", "#00805E", "#B0508A", "#8A6100", "#6A3D9A", "#5F6B76")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
STYLE_NAMES = {colour: f"var(--run-{number})" for number, colour in enumerate(COLOURS)} | {
    GREY: "var(--muted)",
    "#000000": "currentColor",
    "#ffffff": "none",
}
POINTS = 300  # drawn of one curve: as many as a panel has pixels
SMOOTHING = 0.04  # width of the moving average, as a share of the run
PANEL = (4.0, 2.3)  # inches


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one run recorded. run: its number, which is its colour. at, values: (P,) float64, NaN is a gap.

    errors: (P,) standard errors, NaN where not known.
    """

    run: int
    at: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity of all runs that have it. along: what the horizontal axis is. noisy: a moving average is shown."""

    title: str
    unit: str
    along: str
    curves: Sequence[Curve]
    noisy: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


def draw_panels(path: str | Path, panels: Sequence[Panel], names: Sequence[str]) -> None:
    """Write a PNG of all panels, with a legend below them. names: of the runs, by their numbers."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not panels:
        raise ValueError("no curves to draw: no record has a value; train at least one step")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (PANEL[0] * columns, (PANEL[1] + 0.3) * rows + 0.3 + 0.2 * len(names))
    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel)
        axis.set_title(panel.heading, fontsize=10)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=colour_of(run), linestyle=dashes_of(run)) for run in range(len(names))]
    legend = figure.legend(handles, ["-"] * len(names), loc="outside lower left", fontsize=9, frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    save(figure, path)


def panel_svg(panel: Panel) -> str:
    """A panel as an SVG for a page, without its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL)
    axis = figure.add_axes((0.15, 0.2, 0.83, 0.7))  # by hand: a layout would draw it twice
    _draw(axis, panel)
    return themed_svg(figure, f"{panel.heading}. {described(panel)}")


def themed_svg(figure: Any, words: str) -> str:
    """A figure as an SVG that stands in a page: in the page's colours and font. words: what it shows."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": words}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue().decode()
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]  # without the prolog, which names a DTD
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(font: [^;\"]*?\d+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    for colour, name in STYLE_NAMES.items():
        svg = re.sub(colour, name, svg, flags=re.IGNORECASE)
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    alt = words.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">{svg.strip()}'


def described(panel: Panel) -> str:
    """In words, for those who do not see it: where each curve starts, ends and lies."""
    parts = []
    for curve in panel.curves:
        finite = np.isfinite(curve.values)
        at, values = curve.at[finite], curve.values[finite]
        which = f"run {curve.run + 1}: " if len(panel.curves) > 1 else ""
        span = f"{values[0]:.4g} at {at[0]:,.4g}, {values[-1]:.4g} at {at[-1]:,.4g} {panel.along}"
        parts.append(f"{which}{span}; least {values.min():.4g}, most {values.max():.4g}")
    return ". ".join(parts)


def colour_of(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def dashes_of(run: int) -> Any:
    return DASHES[run % len(DASHES)]


def legend_mark(run: int) -> tuple[str, str]:
    """A run's colour in the page's style sheet, and its dashes as SVG has them."""
    dashes = dashes_of(run)
    return f"var(--run-{run % len(COLOURS)})", "" if dashes == "solid" else " ".join(f"{3 * d:g}" for d in dashes[1])


def _draw(axis: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for curve in panel.curves:
        style: dict[str, Any] = {"color": colour_of(curve.run), "linestyle": dashes_of(curve.run)}
        if curve.errors is not None:
            low, high = curve.values - curve.errors, curve.values + curve.errors
            axis.fill_between(curve.at, low, high, color=style["color"], alpha=0.15, linewidth=0)
        smooth = panel.noisy and np.isfinite(curve.values).sum() > 10
        x, mean, low, high = thin(curve.at, curve.values, POINTS)
        if not smooth:
            axis.plot(x, mean, **style, linewidth=1.5, marker="o" if len(x) <= 30 else None, markersize=3)
        elif len(panel.curves) == 1:  # of several the scatter would hide them
            axis.plot(x, mean, color=style["color"], linewidth=0.8, alpha=0.4)
            if len(x) < len(curve.at):
                axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if smooth:
            width = max(3, round(SMOOTHING * len(curve.values)))
            axis.plot(*thin(curve.at, moving_average(curve.values, width), POINTS)[:2], **style, linewidth=1.8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=panel.along in ("steps", "images")))
    thousands = EngFormatter(sep="")  # 150k; of an hour's parts it would make 600m
    axis.xaxis.set_major_formatter(lambda value, at: thousands(value, None) if abs(value) >= 1000 else f"{value:g}")
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axis.set_xlabel(panel.along)


def scores_svg(scores: Sequence[Score]) -> str:
    """Each probe's accuracy before and after training, with standard errors and chance, as an SVG for a page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL[0], 0.75 + 0.42 * len(scores)))
    axis = figure.add_axes((0.03, 0.4 / figure.get_figheight(), 0.94, 1 - 0.75 / figure.get_figheight()))
    places = -np.arange(len(scores), dtype=float)
    marks = (("initial", GREY, "s", "before"), ("trained", BLUE, "o", "trained"))
    for which, colour, marker, label in marks:
        values, errors = ([getattr(score, which + end) for score in scores] for end in ("", "_error"))
        axis.errorbar(values, places, xerr=errors, fmt=marker, color=colour, capsize=3, markersize=6, label=label)
    chances = [score.chance for score in scores]
    axis.plot(chances, places, "|", color="black", markersize=12, label="chance")
    for score, place in zip(scores, places, strict=True):
        axis.text(0.0, place + 0.28, score.probe, fontsize=9, parse_math=False)
    axis.set_xlim(0, 1.1 * max(1.0, *chances, *(max(score.initial, score.trained) for score in scores)))
    axis.set_ylim(places[-1] - 0.4, 0.75)
    axis.set_yticks([])
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("%")
    figure.legend(loc="upper center", ncols=3, fontsize=9, frameon=False)
    words = (
        f"{one.probe}: {one.initial:.1f} before, {one.trained:.1f} trained, chance {one.chance:.1f}" for one in scores
    )
    return themed_svg(figure, "Top-1 accuracy in percent. " + ". ".join(words))
