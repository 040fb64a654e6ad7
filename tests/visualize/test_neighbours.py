import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ijepa_scale.visualize.neighbours import draw_neighbours

NAMES = ["$1_$2.jpg", "$", r"\\frac$a$", "{x}$^$", "[red].png", "a_b^c.png", "_" * 30 + "$1$.png"]


def test_names_are_drawn_as_they_are(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )
    image = np.zeros((3, 8, 8), np.uint8)
    draw_neighbours(tmp_path / "a.png", [(image, name, [(image, name), (image, "0.98")]) for name in NAMES])
    titles = [axis.title for axis in figures[0].axes]
    shown = [name if len(name) <= 20 else f"{name[:8]}...{name[-9:]}" for name in NAMES]
    assert [title.get_text() for title in titles] == [text for name in shown for text in (name, name, "0.98")]
    assert not any(title.get_parse_math() for title in titles)
    assert Image.open(tmp_path / "a.png").size > (300, 300)
