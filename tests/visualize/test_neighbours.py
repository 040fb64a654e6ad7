import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ijepa_scale.visualize.neighbours import draw_neighbours, nearest_patches

NAMES = ["$1_$2.jpg", "$", r"\\frac$a$", "{x}$^$", "[red].png", "a_b^c.png", "_" * 30 + "$1$.png"]


def test_names_are_drawn_as_they_are(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )
    image = np.zeros((3, 8, 8), np.uint8)
    draw_neighbours(tmp_path / "new" / "a.png", [(image, name, [(image, name), (image, "0.98")]) for name in NAMES])
    titles = [axis.title for axis in figures[0].axes]
    shown = [name if len(name) <= 20 else f"{name[:8]}...{name[-9:]}" for name in NAMES]
    assert [title.get_text() for title in titles] == [text for name in shown for text in (name, name, "0.98")]
    assert not any(title.get_parse_math() for title in titles)
    assert Image.open(tmp_path / "new" / "a.png").size > (300, 300)


def test_nearest_patches_are_those_of_a_plain_loop():
    """By the cosine less the mean, none of the query's own image; a query of no image may find all."""
    rng = np.random.default_rng(0)
    features, queries, own = rng.normal(2, 1, (4, 6, 5)), rng.normal(2, 1, (3, 5)), np.array([2, -1, 0])
    found, cosines = nearest_patches(queries, own, features, 4)
    mean = features.reshape(-1, 5).mean(axis=0)
    for query in range(3):
        listed = []
        for image, patch in np.ndindex(4, 6):
            if image != own[query]:
                one, other = queries[query] - mean, features[image, patch] - mean
                listed.append((one @ other / np.linalg.norm(one) / np.linalg.norm(other), image * 6 + patch))
        expected = sorted(listed, reverse=True)[:4]
        assert found[query].tolist() == [patch for _, patch in expected]
        np.testing.assert_allclose(cosines[query], [cosine for cosine, _ in expected])
