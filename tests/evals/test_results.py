import io
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from ijepa_scale.evals.evaluation import Measure, Outcome, accuracy, commonest_share
from ijepa_scale.evals.results import RESULTS, read_results, results_table, write_results

FACTS = {"checkpoint": "/runs/a", "sha256": "ab", "network": "target", "image_size": 16, "data": "set:train"}


@dataclass(frozen=True)
class Settings:
    k: tuple[int, ...] = (5, 10)


def outcome_of(*values, **facts):
    measures = [Measure(name=f"k = {i}", value=v, error=1.5, count=24, settings={"k": i}) for i, v in enumerate(values)]
    return Outcome.best_of(measures, [np.array([i]) for i in range(len(values))], np.array([7]), **facts)


def printed(task, measures, width=80):
    file = io.StringIO()
    Console(file=file, emoji=False, width=width).print(
        results_table(task, measures, "9 images to fit on, 4 to judge by")
    )
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_best_is_the_result_the_first_of_equals():
    outcome = outcome_of(40.0, 62.5, 62.5, facts_too=3)
    assert [measure.chosen for measure in outcome.measures] == [False, True, False]
    assert outcome.predicted.tolist() == [1] and outcome.labels.tolist() == [7] and outcome.facts == {"facts_too": 3}


def test_accuracies_have_their_binomial_standard_error():
    predicted, labels = np.array([0, 1, 1, 2, 2, 0, 1, 1]), np.array([0, 1, 1, 2, 0, 1, 2, 1])
    measure = accuracy("k-NN", predicted, labels, chance=commonest_share(labels), settings={"k": 1})
    hits = predicted == labels
    assert measure.value == 100 * hits.mean() == 62.5 and measure.count == 8 and measure.chance == 50.0
    assert measure.error == pytest.approx(100 * hits.std() / math.sqrt(8))


def test_tasks_stand_beside_each_other_and_a_second_time_replaces_the_first(tmp_path):
    out = tmp_path / "new" / "folder"
    assert read_results(out, FACTS) == {**FACTS, "tasks": {}}
    write_results(out, FACTS, "knn", Settings(), outcome_of(40.0, 50.0), 1.234)
    write_results(out, FACTS, "logistic", Settings(), outcome_of(70.0, train_images=9), 2.0)
    write_results(out, FACTS, "knn", Settings(k=(3,)), outcome_of(60.0, 45.0), 3.0)
    results = json.loads((out / RESULTS).read_text())
    assert {name: results[name] for name in FACTS} == FACTS
    knn, logistic = results["tasks"]["knn"], results["tasks"]["logistic"]
    assert (knn["result"], knn["seconds"], knn["settings"]) == (60.0, 3.0, {"k": [3]})
    assert knn["measures"][1] == {
        "name": "k = 1",
        "value": 45.0,
        "error": 1.5,
        "count": 24,
        "chance": None,
        "unit": "%",
        "chosen": False,
        "settings": {"k": 1},
    }
    assert (logistic["result"], logistic["train_images"]) == (70.0, 9)
    assert [path.name for path in out.iterdir()] == [RESULTS]


@pytest.mark.parametrize(
    "key, value", [("sha256", "cd"), ("data", "other:train"), ("network", "context"), ("image_size", 32)]
)
def test_results_of_another_network_or_data_never_mix(tmp_path, key, value):
    write_results(tmp_path, FACTS, "knn", Settings(), outcome_of(40.0), 1.0)
    before = (tmp_path / RESULTS).read_text()
    message = rf"results\.json is of another evaluation: its {key} is .*, not {value!r}; give another --out, or "
    for call in (
        lambda facts: read_results(tmp_path, facts),
        lambda facts: write_results(tmp_path, facts, "linear", Settings(), outcome_of(40.0), 1.0),
    ):
        with pytest.raises(ValueError, match=message):
            call({**FACTS, key: value})
    assert (tmp_path / RESULTS).read_text() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"a": 1}', '{"tasks": 3}', '{"tasks": "knn"}', "\0\xff"])
def test_a_file_that_holds_no_results_is_named(tmp_path, content):
    (tmp_path / RESULTS).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"results\.json is no file of results: .*; remove it, or give another --out"):
        read_results(tmp_path, FACTS)


def test_what_json_lacks_is_not_written(tmp_path):
    write_results(tmp_path, FACTS, "knn", Settings(), outcome_of(40.0), 1.0)
    before = (tmp_path / RESULTS).read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_results(tmp_path, FACTS, "linear", Settings(), outcome_of(math.nan), 1.0)
    assert (tmp_path / RESULTS).read_text() == before and "NaN" not in before


def test_the_table_says_what_was_measured_and_which_is_the_result():
    measures = [
        Measure(name="last 4 blocks, BatchNorm, lr 0.01", value=45.25, error=0.74, count=10_000, chance=1.0),
        Measure(name="[red]output, [b]lr[/b] :smile:", value=100.0, error=0.0, count=10_000, chance=1.0, chosen=True),
        Measure(name="ridge", value=0.73449, error=0.0071, count=9000, chance=1.25, unit="of distance"),
    ]
    lines = printed("linear", measures)
    assert lines[0] == "linear: 9 images to fit on, 4 to judge by"
    assert lines[1].split() == ["measure", "value", "±", "chance", "images"]
    assert [line.split("  ")[0] for line in lines[3:6]] == [
        "last 4 blocks, BatchNorm, lr 0.01",
        "[red]output, [b]lr[/b] :smile: *",
        "ridge",
    ]
    values = [line.split()[-5:] if "distance" not in line else line.split()[-6:] for line in lines[3:6]]
    assert [row[-4:] for row in values[:2]] == [["45.2%", "0.7", "1.0", "10,000"], ["100.0%", "0.0", "1.0", "10,000"]]
    assert values[2] == ["0.734", "of", "distance", "0.007", "1.250", "9,000"]
    assert lines[6:] == ["± one standard error, of the choice of test images alone; *: the result"]


def test_a_single_measure_needs_no_mark():
    lines = printed("logistic", [Measure(name="logistic regression", value=62.5, error=17.1, count=8, chosen=True)])
    assert lines[0] == "logistic: 9 images to fit on, 4 to judge by" and len(lines) == 5
    assert lines[3].split() == ["logistic", "regression", "62.5%", "17.1", "8"]
    assert lines[4] == "± one standard error, of the choice of test images alone"
