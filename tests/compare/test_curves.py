"""The arithmetic of a comparison, against curves drawn by hand."""

import numpy as np
import pytest

from ijepa_scale.compare.curves import (
    Curve,
    first_reach,
    reached_by_all,
    read_off,
    shortest_run,
    spread,
    times_more,
)


def curve(recipe, seconds, scores, equal="images"):
    """Of one list of seconds and of scores for each seed."""
    return Curve(recipe=recipe, equal=equal, spent={"seconds": np.array(seconds)}, scores={"linear": np.array(scores)})


def alone(recipe, seconds, scores, equal="images"):
    return curve(recipe, [seconds], [scores], equal)


SLOW = alone("slow", [0.0, 100.0, 200.0], [10.0, 20.0, 40.0])
FAST = alone("fast", [0.0, 20.0, 40.0], [10.0, 15.0, 20.0])
LONGER = alone("fast", [0.0, 100.0, 200.0], [10.0, 16.0, 30.0], equal="seconds")


def test_the_first_reach_is_linear_between_points():
    spent, scores = np.array([0.0, 10.0, 20.0, 30.0]), np.array([5.0, 15.0, 12.0, 35.0])
    assert first_reach(spent, scores, 5.0) == first_reach(spent, scores, 1.0) == 0.0
    assert first_reach(spent, scores, 10.0) == 5.0
    assert first_reach(spent, scores, 15.0) == 10.0
    assert first_reach(spent, scores, 14.0) == 9.0  # before it falls again
    assert first_reach(spent, scores, 23.5) == 25.0
    assert first_reach(spent, scores, 35.1) is None


def test_times_more_of_two_curves():
    """FAST ends with 20, which SLOW has after 100 seconds, against 40. SLOW ends with 40, which FAST never has."""
    found = times_more([SLOW], [FAST], "linear", "seconds")
    assert (found.times, found.score, found.more_than, found.words) == (2.5, 20.0, None, "2.50")
    missed = times_more([FAST], [SLOW], "linear", "seconds")
    assert missed.times is None and missed.more_than == pytest.approx(40 / 200)
    assert missed.words == "not reached (> 0.20)"
    assert times_more([SLOW], [SLOW], "linear", "seconds").times == 1.0


def test_all_runs_of_a_recipe_count_and_the_cheapest_is_taken():
    """The longer run of the fast recipe has 20 after 128.6 seconds; its short one after 40."""
    missed = times_more([FAST, LONGER], [SLOW], "linear", "seconds")
    assert missed.times is None and missed.more_than == pytest.approx(1.0) and missed.words == "not reached (> 1.00)"
    reached = alone("other", [0.0, 50.0, 100.0], [10.0, 25.0, 25.0])
    assert times_more([FAST, LONGER], [reached], "linear", "seconds").times == pytest.approx((100 + 100 * 9 / 14) / 50)
    assert times_more([FAST, LONGER], [FAST], "linear", "seconds").times == 1.0


def test_what_is_no_better_than_the_untrained_encoder_has_no_price():
    worse = alone("worse", [0.0, 10.0, 20.0], [10.0, 14.0, 9.0])
    found = times_more([SLOW], [worse], "linear", "seconds")
    assert (found.times, found.more_than, found.words) == (None, None, "no gain to match")


def test_times_are_of_the_means_over_seeds():
    ours = curve("ours", [[0.0, 8.0, 16.0], [0.0, 12.0, 24.0]], [[8.0, 12.0, 16.0], [12.0, 18.0, 24.0]])
    theirs = curve("theirs", [[0.0, 4.0], [0.0, 6.0]], [[8.0, 17.5], [12.0, 12.5]])
    assert times_more([ours], [theirs], "linear", "seconds").times == pytest.approx(10.0 / 5.0)


def test_the_common_amount_is_what_the_longest_run_of_each_recipe_reaches_with_every_seed():
    two = curve("two", [[0.0, 90.0], [0.0, 70.0]], [[1.0, 2.0], [1.0, 2.0]])
    assert reached_by_all([SLOW, FAST], "seconds") == 40.0
    assert reached_by_all([SLOW, FAST, LONGER], "seconds") == 200.0
    assert reached_by_all([SLOW, FAST, LONGER, two], "seconds") == 70.0


def test_a_value_is_read_off_the_shortest_run_that_goes_as_far():
    assert shortest_run([FAST, LONGER], "seconds", 40.0) is FAST
    assert shortest_run([LONGER, FAST], "seconds", 41.0) is LONGER
    two = curve("two", [[0.0, 80.0], [0.0, 100.0]], [[10.0, 20.0], [0.0, 50.0]])
    np.testing.assert_allclose(read_off(two, "seconds", 40.0, two.scores["linear"]), [15.0, 20.0])


def test_the_spread_is_over_seeds():
    assert spread(np.array([1.0, 3.0])) == pytest.approx(2**0.5) and spread(np.array([4.0])) == 0.0
