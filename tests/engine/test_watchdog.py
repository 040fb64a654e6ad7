"""Whom a rank names when a step takes too long, and outside of steps; with runs: tests/soak."""

import dataclasses
import os
import time

import pytest

from ijepa_scale.engine import distributed, watchdog
from ijepa_scale.engine.watchdog import STEP, Sign, Watchdog, explained
from tests.processes import assert_all, run_ranks


def signs(*doing, steps=None, silent=()):
    """Twice of each rank, a beat apart, those of silent ranks unchanged."""
    steps = steps or [40] * len(doing)
    first = [Sign(rank, 7, steps[rank], what, 30.4, f"node{rank}", 100 + rank) for rank, what in enumerate(doing)]
    return [first, [sign if sign.rank in silent else dataclasses.replace(sign, count=8) for sign in first]]


WAITING = "waiting for the images of step"


@pytest.mark.parametrize(
    "heard, words",
    [
        (signs(STEP, STEP, STEP, silent=(1,)), "rank 1 (node1, pid 101) gives no sign any more: it is stopped"),
        (signs(STEP, WAITING, STEP), "rank 1 (node1, pid 101) has been waiting for the images of step 41 for 30 s"),
        (signs(STEP, STEP, STEP, steps=[41, 40, 41]), "rank 1 (node1, pid 101) has been in step 41 for 30 s"),
        (signs(WAITING, STEP, steps=[41, 40]), "rank 1 (node1, pid 101) has been in step 41 for 30 s"),
        (signs(STEP, STEP), "all ranks live and are within the step"),
        (signs(STEP), "the stack below"),
        ([], "the first rank gives no sign any more"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(heard, words):
    own = Sign(0, 8, 40, STEP, 30.0, "node0", 100)
    said = explained(own, heard, len(heard[0]) if heard else 2)
    assert words in said
    assert all(f"rank {rank} (" not in said for rank in range(3) if f"rank {rank} (" not in words)


def test_several_are_all_named():
    said = explained(Sign(3, 8, 40, STEP, 30.0, "node3", 103), signs(STEP, STEP, STEP, STEP, silent=(0, 2)), 4)
    assert "rank 0 (node0, pid 100) gives no sign" in said and "rank 2 (node2, pid 102) gives no sign" in said


def test_a_rank_that_has_never_given_a_sign_is_named():
    said = explained(Sign(0, 8, 40, STEP, 30.0, "node0", 100), signs(STEP), 2)
    assert said == "rank 1 gives no sign any more: it is stopped, or its machine is gone"


def outside_of_steps(how: str) -> None:
    """Of two ranks the second, or the first, does not come to where the other waits."""
    watchdog.BEAT_SECONDS, watchdog.LEAST_SILENCE = 0.05, 2.0
    ranks = distributed.start()
    dog = Watchdog(ranks, 1.0)
    late = ranks.rank == (how == "the second")
    dog.outside("the report")
    if how == "slow":  # the threads live: it may take any time
        time.sleep(5 * late)
    elif how == "done":
        if ranks.first:
            time.sleep(5)
    elif late:
        dog._closed.set()  # no more signs, as of a process that is stopped
        time.sleep(8)
        os._exit(0)
    else:
        ranks.barrier()
    dog.close()
    ranks.close()


@pytest.mark.parametrize("how", ["slow", "done"])
def test_outside_of_steps_a_rank_may_take_its_time_or_be_done(tmp_path, how):
    assert_all(run_ranks(outside_of_steps, 2, tmp_path, how))


@pytest.mark.parametrize("how, silent", [("the second", 1), ("the first", 0)])
def test_outside_of_steps_a_rank_that_gives_no_sign_ends_the_others(tmp_path, how, silent):
    ends = run_ranks(outside_of_steps, 2, tmp_path, how)
    assert [end.code for end in ends] == [int(rank != silent) for rank in (0, 1)], [end.output for end in ends]
    said = ends[1 - silent].output
    assert f"error: rank {1 - silent} (" in said and "ends, in the report: rank" in said
    assert f"rank {silent} (" in said and "has given no sign for 2 seconds: it is stopped" in said
