import json
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.visualize.sheet import MARK, Bar, Cell, describe, draw_sheet

GREEN = np.broadcast_to(np.array([0, 200, 0], np.uint8), (8, 8, 3))


def has(picture, colour):
    return (np.abs(picture.astype(int) - colour).max(axis=-1) <= 2).any()


@pytest.mark.parametrize("grid", [PatchGrid(4, 4), PatchGrid(2, 5)])
def test_no_text_meets_another_and_all_are_on_the_page(tmp_path, monkeypatch, grid):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: (figures.append(self), save(self, *a, **o)))
    heat = np.linspace(0, 1, grid.num_patches).reshape(grid.shape)
    cells = [[Cell(GREEN, text="query"), Cell(GREEN, heat, (0, 0, 1, 2), "mean 0.87"), Cell(heat=heat)]] * 3
    headings = {0: "box that is\nnot seen", 1: "cosine of the\nprediction", 2: "trained, step 300"}
    labels = ["image", "block 11", "head 3"]
    bar = Bar("cosine with the true target features", -1, 1)
    draw_sheet(tmp_path / "a.png", cells, grid, headings=headings, labels=labels, gap_before=1, bar=bar)
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [*figure.texts, *(axis.xaxis.label for axis in figure.axes), *figure.axes[-1].get_xticklabels()]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert len(boxes) >= 3 + 3 + 6 + 1 + 3
    width, height = figure.bbox.size
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
    assert not [1 for one, other in combinations(boxes, 2) if one.overlaps(other)]


def test_a_heat_map_covers_what_is_known_and_the_image_shows_grey_elsewhere(tmp_path):
    heat = np.full((2, 2), np.nan)
    heat[0, 0] = 1.0
    bar = Bar("share", 0, 1)
    for name, cell in (("image", Cell(GREEN)), ("heat", Cell(GREEN, heat, (1, 1, 1, 1)))):
        draw_sheet(tmp_path / f"{name}.png", [[cell]], PatchGrid(2, 2), headings={}, bar=bar)
    plain, mapped = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("image", "heat"))
    mark = [int(MARK[i : i + 2], 16) for i in (1, 3, 5)]
    green, yellow = [0, 200, 0], [253, 231, 37]  # viridis at 1
    assert has(plain, green) and not has(mapped, green)
    assert has(mapped, yellow) and not has(plain, yellow)
    assert has(mapped, mark) and not has(plain, mark)


def test_words_stand_beside_a_picture(tmp_path):
    words = {"title": "a", "caption": "b ±0.1", "alt": "c", "section": "features", "step": None}
    describe(tmp_path / "one.png", **words)
    assert json.loads((tmp_path / "one.json").read_text()) == words
