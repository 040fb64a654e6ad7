import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from ijepa_scale.data.images import open_images
from ijepa_scale.evals import clevr
from ijepa_scale.evals.features import features_of
from ijepa_scale.evals.tasks import askable, settled
from tests.data.small_sources import IMAGE
from tests.evals.labelled import COLOURS
from tests.evals.small import evaluation_of

SETTINGS = {"count": replace(clevr.COUNT, epochs=12, features=True, batch_size=16)}
SETTINGS["distance"] = replace(clevr.DISTANCE, epochs=12, features=True, batch_size=16)
DISTANCES = np.array([7.5, 8.2, 9.7, 12.0])  # of the four colours


def coloured(number, rng):
    pixels = np.array(COLOURS[number % 4]) + rng.integers(-20, 21, (18, 22, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def scenes(root, **columns):
    """A source of 48 and 24 pictures in four colours. columns: name -> their values from the pictures' numbers."""
    (root / "set").mkdir()
    for split, count in (("train", 48), ("validation", 24)):
        rng, numbers = np.random.default_rng(count), np.arange(count)
        pictures = pa.array([coloured(number, rng) for number in numbers], IMAGE)
        table = {name: pa.array(values(numbers), from_pandas=True) for name, values in columns.items()}
        pq.write_table(pa.table({"image": pictures, **table}), root / "set" / f"{split}.parquet")
    return tuple(
        open_images(str(root / "set"), split=split, cache_dir=str(root / "cache")) for split in ("train", "validation")
    )


def run(root, name, pair, label=""):
    train, test, task = settled(name, *pair, label)
    evaluation = evaluation_of(root, train=train, test=test)
    return evaluation, task(evaluation, SETTINGS[name])


def test_ridge_is_scikit_learns_of_standardised_features():
    """alpha is of the sum of squares, not of their mean; the held-out fifth chooses as a search by hand does."""
    rng = np.random.default_rng(0)
    train, test = (rng.normal(3.0, rng.uniform(0.1, 9.0, 12), (n, 12)).astype(np.float32) for n in (45, 20))
    values = (train[:, :4].sum(axis=1) + rng.normal(0, 8.0, 45)).astype(np.float64)
    predicted, strength = clevr.ridge_predictions(*map(torch.from_numpy, (train, values, test)))
    scaler = StandardScaler().fit(train.astype(np.float64))
    rows, held_out = scaler.transform(train), np.arange(45) % 5 == 4

    def error(l2):
        ridge = Ridge(alpha=l2 * 36).fit(rows[~held_out], values[~held_out])
        return np.square(ridge.predict(rows[held_out]) - values[held_out]).mean()

    assert strength == min((1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0), key=error) and 1e-4 < strength < 100.0
    expected = Ridge(alpha=strength * 45).fit(rows, values).predict(scaler.transform(test.astype(np.float64)))
    np.testing.assert_allclose(predicted.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - Ridge(alpha=strength).fit(rows, values).predict(scaler.transform(test))).max() > 0.1


def test_more_features_than_images_and_constant_ones():
    rng = np.random.default_rng(1)
    train, test = (torch.from_numpy(rng.normal(size=(n, 40))) for n in (12, 6))
    train[:, 3] = test[:, 3] = 5.0
    predicted, _ = clevr.ridge_predictions(train, train[:, 0], test)
    assert torch.isfinite(predicted).all() and predicted.std() > 0.01


def test_distances_at_an_edge_are_of_the_nearer_class_and_nan_of_none():
    distances = np.array([0.0, 7.99, 8.0, 8.01, 8.5, 9.0, 9.25, 9.5, 10.0, 10.01, np.inf, np.nan])
    by_hand = [-1 if np.isnan(d) else sum(d > edge for edge in (8.0, 8.5, 9.0, 9.5, 10.0)) for d in distances]
    assert clevr.distance_classes(distances).tolist() == by_hand == [0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, -1]


def test_counts_and_distances_of_a_source_that_has_them(tmp_path):
    pair = scenes(
        tmp_path,
        count=lambda numbers: numbers % 4 + 3,
        distance=lambda numbers: np.array(["near", "nearer", "far", "farther"])[numbers % 4],
        nearest_distance=lambda numbers: (DISTANCES[numbers % 4] + 0.01 * (numbers % 7)).astype(np.float32),
    )
    for name, names in (("count", ["3", "4", "5", "6"]), ("distance", ["far", "farther", "near", "nearer"])):
        evaluation, outcome = run(tmp_path, name, pair)
        chosen = [measure for measure in outcome.measures if measure.chosen]
        assert [measure.value for measure in chosen] == [100.0] and chosen[0].chance == 25.0
        assert evaluation.test.names == names
    train, test = (features_of(evaluation, part, stretch=True) for part in (evaluation.train, evaluation.test))
    error, explained = outcome.measures[-2:]
    assert (error.unit, explained.unit, error.chosen, explained.chosen) == ("of distance", "%", False, False)
    numbers = np.arange(48)
    fit, judged = (DISTANCES[n % 4] + 0.01 * (n % 7) for n in (numbers, numbers[:24]))
    scaler = StandardScaler().fit(train.last)
    ridge = Ridge(alpha=48 * error.settings["l2"]).fit(scaler.transform(train.last), fit)
    off = np.abs(ridge.predict(scaler.transform(test.last)) - judged)
    assert error.value == pytest.approx(off.mean(), rel=1e-3)
    assert error.error == pytest.approx(off.std() / np.sqrt(24), rel=1e-3)
    assert error.chance == pytest.approx(np.abs(judged - fit.mean()).mean(), rel=1e-6)
    assert explained.value == pytest.approx(100 * (1 - np.square(off).mean() / judged.var()), abs=0.01)
    spread = 100 * np.square(off).std() / np.sqrt(24) / judged.var()
    assert explained.value > 95.0 and explained.error == pytest.approx(spread, rel=1e-3)
    assert error.count == explained.count == 24


def test_a_source_with_distances_as_numbers_alone(tmp_path):
    def distances(numbers):
        values = DISTANCES[numbers % 4]
        values[5] = np.nan
        return values

    pair = scenes(tmp_path, distance=distances)
    evaluation, outcome = run(tmp_path, "distance", pair)
    assert len(evaluation.train) == 47 and 5 not in evaluation.train.indices and len(evaluation.test) == 23
    names = [evaluation.test.names[label] for label in evaluation.test.labels[:4]]
    assert names == ["to 8", "8 to 8.5", "9.5 to 10", "over 10"] and len(evaluation.test.names) == 6
    assert max(measure.value for measure in outcome.measures if measure.chosen) == 100.0
    assert outcome.measures[-1].value > 95.0 and outcome.measures[-1].count == 23
    names, reasons = askable(*pair, "")
    assert names == ["distance"]
    assert "has no column of classes: give --label COLUMN; its columns are: distance (float64)" in reasons["knn"]
    assert "has no column 'count'; it has: distance (float64)" in reasons["count"]


def test_images_with_a_class_but_no_number_are_left_out_of_the_regression(tmp_path):
    def numbers_of(numbers):
        return np.where(numbers % 9 == 2, np.nan, DISTANCES[numbers % 4])

    _, outcome = run(tmp_path, "distance", scenes(tmp_path, distance=lambda n: n % 4, nearest_distance=numbers_of))
    assert outcome.measures[0].count == 24 and outcome.measures[-2].count == 24 - 3
    assert outcome.measures[-1].value > 95.0


def test_numbers_that_are_too_few_are_not_regressed(tmp_path):
    pair = scenes(
        tmp_path, distance=lambda n: n % 4, nearest_distance=lambda n: np.where(n < 4, DISTANCES[n % 4], np.nan)
    )
    _, outcome = run(tmp_path, "distance", pair)
    assert {measure.unit for measure in outcome.measures} == {"%"} and len(outcome.measures) == 4


def test_test_images_that_are_all_as_far_away_have_no_variance(tmp_path):
    pair = scenes(
        tmp_path,
        distance=lambda n: n % 4,
        nearest_distance=lambda n: DISTANCES[n % 4] if len(n) == 48 else np.full(len(n), 9.0),
    )
    _, outcome = run(tmp_path, "distance", pair)
    assert [measure.unit for measure in outcome.measures].count("of distance") == 1
    assert np.isfinite([[measure.value, measure.error] for measure in outcome.measures]).all()


@pytest.mark.parametrize("name", ["count", "distance"])
def test_what_a_source_lacks_is_said_with_what_it_has(tmp_path, name):
    pair = scenes(tmp_path, breed=lambda n: n % 2, size=lambda n: n / 3)
    with pytest.raises(ValueError, match=rf"has no column '{name}'; it has: breed \(int64\), size \(float64\)"):
        settled(name, *pair, "")


def test_the_defaults_are_those_of_clevr():
    """Images whole, and a cosine."""
    for settings in (clevr.COUNT, clevr.DISTANCE):
        assert settings.crop == "stretched" and settings.drops == ()
