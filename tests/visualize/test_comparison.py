import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from ijepa_scale.visualize.comparison import STYLES, Line, draw_comparison


def line(name, kind, level):
    spent = [np.array([0.0, 10.0, 20.0]), np.array([0.0, 1.0, 2.0])]
    return Line(name=name, kind=kind, spent=spent, scores=level + np.arange(3.0), spreads=np.array([0.0, 0.5, 1.0]))


def test_a_panel_for_each_probe_and_each_cost_with_every_recipe_told_apart(tmp_path, monkeypatch):
    lines = [line("ijepa", "equal images", 20), line("mae", "equal images", 18), line("mae", "equal seconds", 19)]
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, file, **_: (drawn.append(self), Image.new("L", (1, 1)).save(file, "PNG")),
    )
    draw_comparison(tmp_path / "a.png", "title", ["seconds", "FLOPs"], [("k-NN", lines), ("linear", lines[:2])])
    (figure,) = drawn
    assert len(figure.axes) == 4
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "seconds", "FLOPs"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["k-NN (%)", "", "linear (%)", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "ijepa, equal images",
        "mae, equal images",
        "mae, equal seconds",
    ]
    bars = figure.axes[1].containers
    styles = [(bar[0].get_color(), bar[0].get_marker(), bar[0].get_linestyle()) for bar in bars]
    assert styles == [(*STYLES[0], "-"), (*STYLES[1], "-"), (*STYLES[1], "--")]
    assert bars[1][0].get_xdata().tolist() == [0.0, 1.0, 2.0] and bars[1][0].get_ydata().tolist() == [18.0, 19.0, 20.0]


def test_a_single_seed_has_no_error_bars_and_the_file_is_a_picture(tmp_path):
    alone = Line(name="a", kind="k", spent=[np.arange(3.0)], scores=np.arange(3.0), spreads=np.zeros(3))
    draw_comparison(tmp_path / "a.png", "title", ["seconds"], [("k-NN", [alone])])
    assert min(Image.open(tmp_path / "a.png").size) > 300


def luminance(colour):
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def test_every_style_has_a_marker_of_its_own_and_is_seen_on_white():
    assert len({marker for _, marker in STYLES}) == len({colour for colour, _ in STYLES}) == len(STYLES)
    assert all(luminance(colour) < 0.5 for colour, _ in STYLES)
    assert pytest.approx(0.0) == luminance("#000000")
