"""How parameters are cut into buckets."""

import random

from ijepa_scale.engine.buckets import ALIGNMENT, runs, share_of


def test_runs_hold_everything_once_and_no_more_than_the_size():
    draw = random.Random(0)
    for _ in range(200):
        numels = [draw.randint(1, 40) for _ in range(draw.randint(0, 12))]
        found = runs(numels, 30)
        assert [at for first, last in found for at in range(first, last)] == list(range(len(numels)))
        for first, last in found:
            held = sum(numels[first:last])
            assert held <= 30 or last - first == 1
            assert last == len(numels) or held + numels[last] > 30, "the next would have found room"


def test_shares_hold_everything_and_are_aligned():
    for used in (1, 127, 128, 129, 1000, 4097):
        for ranks in (1, 2, 3, 8):
            share = share_of(used, ranks)
            assert share % ALIGNMENT == 0 and used <= ranks * share < used + ranks * ALIGNMENT
