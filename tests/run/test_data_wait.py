import re

import pytest

from ijepa_scale.run.data_wait import WARM_UP, WINDOW, DataWait


def watch(steps, **options):
    """(step, warning) of the warnings that a list of (wait, step) seconds gives."""
    data_wait = DataWait(**{"workers": 2, "ranks": 1, "cores": 8, **options})
    said = [(number, data_wait.update(*step)) for number, step in enumerate(steps, start=1)]
    return [(number, text) for number, text in said if text]


def test_nothing_is_said_up_to_two_percent_nor_of_the_first_steps():
    assert watch([(9.0, 10.0)] * WARM_UP + [(0.0199, 1.0)] * 500) == []
    assert watch([(9.0, 10.0)] * (WARM_UP + WINDOW - 1)) == []


def test_it_is_said_once_with_the_numbers():
    ((number, text),) = watch([(0.0, 1.0)] * WARM_UP + [(0.03, 0.25)] * 500)
    assert number == WARM_UP + WINDOW
    assert "data is the bottleneck: 12.0% of the last 50 steps' time" in text and "(30 of 250 ms a step" in text


def test_it_is_said_again_when_it_has_doubled():
    steps = [(0.03, 1.0)] * 200 + [(0.055, 1.0)] * 200 + [(0.08, 1.0)] * 200 + [(0.15, 1.0)] * 200
    shares = [float(re.search(r"([\d.]+)% of", text)[1]) for _, text in watch(steps)]
    assert shares[0] == 3.0 and len(shares) == 3 and all(6 <= share <= 15 for share in shares[1:])


def test_a_short_stall_is_no_bottleneck():
    steps = [(0.0, 1.0)] * 100 + [(0.9, 1.0)] + [(0.0, 1.0)] * 100
    assert watch(steps) == []


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"workers": 2, "ranks": 1, "cores": 8},
            "Raise data.workers from 2, to 7 at most on 8 cores; or: images",
        ),
        ({"workers": 0, "ranks": 2, "cores": 4}, "Raise data.workers from 0, to 1 at most on 4 cores"),
        (
            {"workers": 8, "ranks": 8, "cores": 64},
            "data.workers=8 for each rank leaves no core of 64 unused, so: ",
        ),
        ({"workers": 1, "ranks": 2, "cores": 2}, "data.workers=1 for each rank leaves no core of 2 unused"),
    ],
)
def test_the_remedy_fits_the_cores(options, words):
    ((_, text),) = watch([(0.5, 1.0)] * 100, **options)
    assert words in text and "ijepa-scale prepare" in text


def test_cores_of_a_node_are_counted_once():
    # Two nodes of two ranks: once all may use the same four cores, once each rank is bound to two of its own.
    for cores in ([{0, 1, 2, 3}, {0, 1, 2, 3}], [{0, 1}, {2, 3}]):
        ranks = [(local, frozenset(own)) for _ in range(2) for local, own in enumerate(cores)]
        data_wait = DataWait.of_ranks(ranks, workers=0)
        texts = [data_wait.update(0.5, 1.0) for _ in range(100)]
        assert "Raise data.workers from 0, to 1 at most on 4 cores" in "".join(texts)
