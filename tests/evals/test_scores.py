import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from ijepa_scale.evals.scores import Score, report_table, write_report


def scores():
    numbers = (("k-NN count", 28.1, 41.2), ("linear count", 36.0, 36.5), ("linear distance", 40.0, 33.0))
    return [Score(probe=p, initial=i, trained=t, chance=12.5, num_test=2000) for p, i, t in numbers]


def test_errors_are_binomial_and_the_verdict_is_against_two_of_them():
    score = Score(probe="k-NN", initial=30.0, trained=36.0, chance=10.0, num_test=500)
    draws = np.random.default_rng(0).binomial(500, [[0.3], [0.36]], size=(2, 50_000)) / 5
    assert score.initial_error == pytest.approx(draws[0].std(), rel=0.02)
    assert score.trained_error == pytest.approx(draws[1].std(), rel=0.02)
    assert score.difference_error == pytest.approx((draws[1] - draws[0]).std(), rel=0.02)
    assert score.verdict == "better"  # 6.0 against 2 x 2.97
    for trained, verdict in ((35.9, "no clear difference"), (30.0, "no clear difference"), (24.0, "worse")):
        assert Score(probe="k-NN", initial=30.0, trained=trained, chance=10.0, num_test=500).verdict == verdict
    extremes = Score(probe="k-NN", initial=100.0, trained=100.0, chance=10.0, num_test=500)
    assert extremes.verdict == "no clear difference"


def test_table_fits_a_log_file_and_says_all():
    stream = io.StringIO()
    Console(file=stream, width=80).print(report_table(scores()))
    lines = stream.getvalue().splitlines()
    line = next(line for line in lines if line.startswith("k-NN count"))
    assert line.split() == ["k-NN", "count", "12.5", "28.1", "±1.0", "41.2", "±1.1", "+13.1", "±1.5", "better"]
    assert any(line.rstrip().endswith("no clear difference") for line in lines)
    assert any(line.startswith("linear distance") and line.rstrip().endswith("worse") for line in lines)
    assert max(map(len, lines)) <= 80 and "…" not in stream.getvalue()


def test_names_of_labels_are_no_markup():
    names = ["[red]x", "[/]", "$1_$2", "$"]
    odd = [Score(probe=f"k-NN {name}", initial=1.0, trained=2.0, chance=1.0, num_test=9) for name in names]
    stream = io.StringIO()
    Console(file=stream, width=80).print(report_table(odd))
    assert all(f"k-NN {name} " in stream.getvalue() for name in names)


def test_report_file_holds_the_scores_and_the_facts(tmp_path):
    path = tmp_path / "new folder" / "report.json"
    write_report(path, scores(), step=300, seed=0)
    written = json.loads(path.read_text())
    assert written["step"] == 300 and written["seed"] == 0
    first = written["scores"][0]
    assert first["probe"] == "k-NN count" and first["num_test"] == 2000 and first["verdict"] == "better"
    assert first["difference"] == pytest.approx(13.1)
    assert first["difference_error"] == pytest.approx(math.hypot(first["initial_error"], first["trained_error"]))
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
