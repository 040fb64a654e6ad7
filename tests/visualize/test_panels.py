import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.visualize.panels import COLOURS, Curve, Panel, draw_panels, panel_svg, scores_svg
from tests.evals.test_scores import scores


def panel(runs=1, points=40, **fields):
    at = np.arange(points, dtype=float)
    curves = [Curve(run=run, at=at, values=np.where(at == 3, np.nan, at + run)) for run in range(runs)]
    return Panel(**{"title": "loss", "unit": "", "along": "steps", "curves": curves} | fields)


def test_an_svg_has_the_page_s_colours_and_no_other():
    many = panel_svg(panel(runs=len(COLOURS) + 1)) + scores_svg(scores())
    for svg in (panel_svg(panel()), many):
        assert not re.search(r"#0{6}|#f{6}", svg, re.IGNORECASE) and "http" not in re.sub(r'xmlns\S*="[^"]+"', "", svg)
    assert all(f"var(--run-{number})" in many for number in range(len(COLOURS)))
    assert "currentColor" in many and "var(--muted)" in many


def test_svgs_of_a_page_are_whole_and_share_no_id():
    titles = {"loss": False, "loss of others": True, "<b>&\"'$": False}
    found = [panel_svg(panel(title=title, noisy=noisy)) for title, noisy in titles.items()]
    found.append(scores_svg(scores()))
    ids = []
    for svg in found:
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img"
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(ids)) == len(ids) > 0
    assert "loss. 0 at 0, 39 at 39 steps; least 0, most 39" in found[0]


@pytest.mark.parametrize("along, last", [("steps", 3.0), ("hours in training steps", 2.4), ("images", 150_000.0)])
def test_no_axis_counts_in_thousandths(along, last):
    curve = Curve(run=0, at=np.linspace(0, last, 4), values=np.arange(4.0))
    root = ElementTree.fromstring(panel_svg(panel(curves=[curve], along=along)))
    ticks = [one.text.strip() for one in root.iter() if one.text]
    assert not [word for word in ticks if re.fullmatch(r"[\d.]+m", word)]
    assert {"steps": "3", "images": "120k"}.get(along, "1.8") in ticks
    assert along != "steps" or "0.5" not in ticks


def test_long_curves_are_small():
    assert len(panel_svg(panel(points=100_000, noisy=True))) < 60_000


@pytest.mark.parametrize("names", [["_hidden $1_$2"], ["a", "b", "c" * 80]])
def test_a_png_has_all_panels_and_a_legend(tmp_path, names):
    panels = [panel(len(names), noisy=noisy) for noisy in (False, True)]
    draw_panels(tmp_path / "curves.png", panels, names)
    assert min(Image.open(tmp_path / "curves.png").size) > 250
    with pytest.raises(ValueError, match="no curves to draw"):
        draw_panels(tmp_path / "none.png", [], names)
