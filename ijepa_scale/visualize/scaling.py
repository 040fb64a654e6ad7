"""How a recipe scales over GPUs: images a second, and how many of them each GPU still makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ijepa_scale.visualize.curves import BLUE, GREY, ORANGE, save


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A curve, a value a number of GPUs. efficiencies: percent of the first's images a second and GPU."""

    name: str
    gpus: Sequence[int]
    images_per_second: Sequence[float]
    efficiencies: Sequence[float]


def draw_scaling(path: str | Path, title: str, curves: Sequence[Scaling]) -> None:
    """Write a PNG of two panels along the number of GPUs: images a second beside a perfect scaling, and efficiency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), dpi=120, facecolor="white", layout="constrained")
    rates, shares = figure.subplots(1, 2)
    for curve, colour, marker in zip(curves, (BLUE, ORANGE), ("o", "s"), strict=False):
        rates.plot(curve.gpus, curve.images_per_second, color=colour, marker=marker, label=curve.name)
        shares.plot(curve.gpus, curve.efficiencies, color=colour, marker=marker, label=curve.name)
    longest = max(curves, key=lambda curve: len(curve.gpus))
    first = longest.images_per_second[0] / longest.gpus[0]
    perfect = [first * gpus for gpus in longest.gpus]
    rates.plot(longest.gpus, perfect, color=GREY, linestyle="dashed", linewidth=1, label="perfect")
    for axis, words in ((rates, "images/s"), (shares, "efficiency (%)")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(longest.gpus, [f"{gpus:,}" for gpus in longest.gpus])
        axis.minorticks_off()
        axis.set_xlabel("GPUs")
        axis.set_ylabel(words)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    rates.set_yscale("log")
    shares.set_ylim(0, 105)
    rates.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save(figure, path)
