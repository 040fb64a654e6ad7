"""Tables and the plot of curves made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from ijepa_scale.compare import results
from ijepa_scale.compare.curves import Curve
from ijepa_scale.compare.probing import write_probes
from ijepa_scale.compare.results import equal_rows, flop_unit, markdown, tables, terminal_table, times_rows

LABELS, PROBES = ["count", "distance"], ["k-NN", "linear"]


def curve(recipe, equal, images, seconds, flops, scores):
    """Two seeds, one a point better than the other in all scores, of 10 times as many FLOPs as the model's."""
    spent = {"images": images, "seconds": seconds, "model_flops": flops, "hardware_flops": 10 * np.array(flops)}
    found = {"count": np.array(scores), "distance": np.array(scores) + 10}
    found["mean"] = (found["count"] + found["distance"]) / 2
    named = {f"{probe} {label}": found[label] for probe in PROBES for label in LABELS}
    named |= {probe: found["mean"] for probe in PROBES}
    return Curve(
        recipe=recipe,
        equal=equal,
        spent={key: np.array([values, values], dtype=float) for key, values in spent.items()},
        scores={key: np.stack([values - 0.5, values + 0.5]) for key, values in named.items()},
    )


SLOW = curve("slow", "images", [0, 64, 128], [0, 20, 40], [0, 1e13, 2e13], [20.0, 24.0, 30.0])
FAST = curve("fast", "images", [0, 64, 128], [0, 10, 20], [0, 2e13, 4e13], [20.0, 22.0, 24.0])
LONG = curve("fast", "seconds", [0, 128, 256], [0, 20, 40], [0, 4e13, 8e13], [20.0, 23.0, 26.0])
CURVES = [SLOW, FAST, LONG]


def test_a_curve_has_the_probes_that_are_asked_for_of_more(tmp_path, monkeypatch):
    asked, probed = {"labels": ["count"]}, {2: 30.0, 4: 40.0, 6: 50.0, 8: 60.0}
    of = {step: {"k-NN count": {"value": value}} for step, value in probed.items()}
    write_probes(tmp_path / "probes.jsonl", asked, of)
    one = SimpleNamespace(seed=0, folder=tmp_path, probed=[4, 8], equal="images", recipe=SimpleNamespace(name="a"))
    monkeypatch.setattr(results, "spent", lambda training: np.zeros((3, 4)))
    found = results._curve([one], asked, {0: {"k-NN count": {"value": 14.0}}}, ["k-NN"])
    np.testing.assert_array_equal(found.scores["k-NN"], [[14.0, 40.0, 60.0]])


def test_each_row_is_read_where_all_recipes_have_been():
    rows = equal_rows(CURVES, LABELS, PROBES)
    assert [(row["equal"], row["amount"]) for row in rows[::2]] == [
        ("images", 128),
        ("seconds", 40),
        ("model_flops", 2e13),
    ]
    found = [(row["recipe"], row["of_run"], row["images"], row["seconds"], row["model_flops"]) for row in rows]
    assert found == [
        ("slow", "equal images", 128, 40, 2e13),
        ("fast", "equal images", 128, 20, 4e13),
        ("slow", "equal images", 128, 40, 2e13),
        ("fast", "equal seconds", 256, 40, 8e13),
        ("slow", "equal images", 128, 40, 2e13),
        ("fast", "equal images", 64, 10, 2e13),
    ]
    assert [row["scores"]["linear count"]["mean"] for row in rows] == pytest.approx([30, 24, 30, 26, 30, 22])
    assert [row["scores"]["k-NN distance"]["mean"] for row in rows] == pytest.approx([40, 34, 40, 36, 40, 32])
    assert {round(row["scores"]["linear count"]["std"], 6) for row in rows} == {round(0.5**0.5, 6)}


def test_each_two_recipes_have_their_times_in_seconds_and_in_flops():
    rows = times_rows(CURVES, PROBES)
    words = {(row["recipe"], row["for_the_accuracy_of"], row["probe"], row["of"]): row["words"] for row in rows}
    assert len(rows) == len(words) == 2 * 2 * 2
    assert words["slow", "fast", "linear", "seconds"] == "1.00"  # 24 after 20 seconds, both
    assert words["slow", "fast", "linear", "model_flops"] == "0.25"
    assert words["fast", "slow", "k-NN", "seconds"] == "not reached (> 1.00)"
    assert words["fast", "slow", "k-NN", "model_flops"] == "not reached (> 4.00)"


def test_the_tables_say_amounts_in_units_that_are_read_well():
    plan = SimpleNamespace(config=SimpleNamespace(seeds=(0, 1)))
    initial = {
        seed: {f"{probe} {label}": {"value": 20.0 + seed} for probe in PROBES for label in LABELS} for seed in (0, 1)
    }
    parts = tables(plan, equal_rows(CURVES, LABELS, PROBES), times_rows(CURVES, PROBES), initial)
    page = markdown(parts)
    assert page.startswith(
        "Top-1 accuracy (%) of frozen features, 2 seeds, ± one standard deviation:\n\n| at | recipe |"
    )
    assert "| at | recipe | images | seconds | TFLOP | k-NN count | k-NN distance | linear count |" in page
    assert "| the start | all | 0 | 0 | 0 | 20.5 ± 0.7 |" in page
    assert "| 40 seconds | fast | 256 | 40 | 80 | 26.0 ± 0.7 | 36.0 ± 0.7 |" in page
    assert "| 20 TFLOP | fast | 64 | 10 | 20 |" in page
    assert "| fast | slow | not reached (> 1.00) |" in page
    table = terminal_table(*parts[0])
    assert table.row_count == 7 and len(table.columns) == 9


@pytest.mark.parametrize("flops, unit", [(3e18, "EFLOP"), (2e15, "PFLOP"), (9e14, "TFLOP"), (5e6, "GFLOP")])
def test_units_of_flops(flops, unit):
    assert flop_unit(flops)[0] == unit
