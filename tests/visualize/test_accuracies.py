from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.visualize import accuracies
from ijepa_scale.visualize.accuracies import WORST, confusions, draw_accuracies, draw_confusions


def naive(labels, predicted):
    """class -> {class that it is taken for: percent}, of those that there are."""
    counts = {}
    for label, taken in zip(labels.tolist(), predicted.tolist(), strict=True):
        counts.setdefault(label, Counter())[taken] += 1
    return {label: {k: 100.0 * n / sum(c.values()) for k, n in c.items()} for label, c in counts.items()}


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("seed", range(3))
def test_confusions_are_those_of_a_dict(classes, seed):
    """Of classes of which some have no test image, and of predictions that no label has."""
    rng = np.random.default_rng(seed)
    labels = 2 * rng.integers(0, classes, 50 * classes)
    predicted = np.where(rng.random(len(labels)) < 0.4, labels, rng.integers(0, 2 * classes + 5, len(labels)))
    known = naive(labels, predicted)
    rows, columns, shares = confusions(labels, predicted)
    by_accuracy = sorted(known, key=lambda label: (known[label].get(label, 0.0), label))
    assert rows.tolist() == by_accuracy[:WORST] and len(rows) == min(classes, WORST)
    assert columns[: len(rows)].tolist() == rows.tolist() and len(set(columns.tolist())) == len(columns)
    taken = Counter()
    for row in rows.tolist():
        taken.update({column: share for column, share in known[row].items() if column not in rows})
    others = columns[len(rows) :].tolist()
    assert len(others) == min(len(taken), WORST)
    assert sorted(taken.values())[-len(others) :] == pytest.approx(sorted(taken[column] for column in others))
    expected = [[known[row].get(column, 0.0) for column in columns.tolist()] for row in rows.tolist()]
    np.testing.assert_allclose(shares, expected)


def test_classes_that_are_all_recognised():
    rows, columns, shares = confusions(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 2]))
    assert rows.tolist() == columns.tolist() == [0, 1, 2]
    assert np.array_equal(shares, 100.0 * np.eye(3))


def decoded(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("classes", [3, 30])
def test_a_picture_of_confusions_with_names_that_are_no_formulas(tmp_path, classes):
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, classes, (2, 300))
    names = ["$1_$2", "[red]x", "a name that is far too long to stand beside a row of a picture", *map(str, range(27))]
    draw_confusions(tmp_path / "new" / "confusions.png", "k-NN on $x_^$", labels, predicted, names)
    pixels = decoded(tmp_path / "new" / "confusions.png")
    assert pixels.shape[0] > 200 and pixels.shape[1] > 300 and len(np.unique(pixels)) > 20


def test_points_are_at_their_settings_and_chance_is_a_line(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(accuracies, "save", lambda figure, path: figures.append(figure))
    series = {"linear": [(100, 61.0, 1.0), (10, 40.0, 2.0)], "fine-tuned": [(10, 35.0, 2.0), (100, 70.5, 0.5)]}
    draw_accuracies(tmp_path / "a.png", "lowshot", "labelled images", series, 25.0)
    (axis,) = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert [[0.0, 25.0], [1.0, 25.0]] in lines.values()
    drawn = [container.lines[0].get_xydata().tolist() for container in axis.containers]
    assert drawn == [[[10.0, 40.0], [100.0, 61.0]], [[10.0, 35.0], [100.0, 70.5]]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["chance 25.0", "linear", "fine-tuned"]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["10", "100"] and axis.get_xscale() == "log"
    assert axis.get_ylim()[0] == 0.0 and axis.get_ylim()[1] > 71.0
    assert {text.get_text() for text in axis.texts} == {"40.0", "61.0", "35.0", "70.5"}


@pytest.mark.parametrize("chance", [None, 10.0])
def test_a_picture_of_accuracies_is_written(tmp_path, chance):
    draw_accuracies(
        tmp_path / "new" / "knn.png", "knn on $set$", "k", {"k-NN": [(5, 0.0, 0.0), (10, 0.0, 0.0)]}, chance
    )
    pixels = decoded(tmp_path / "new" / "knn.png")
    assert pixels.shape == (432, 600, 3) and len(np.unique(pixels)) > 20
