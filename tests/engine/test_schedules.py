import itertools
import math

import numpy as np
import pytest

from ijepa_scale.engine.schedules import cosine, ema_momentum, learning_rate

PAPER = {"warmup_steps": 40, "start": 2e-4, "peak": 1e-3, "final": 1e-6}


def naive_learning_rate(step, total, warmup_steps, start, peak, final):
    """Warm-up by interpolation in a table; the cosine as the real part of a rotating number, from 1 to -1."""
    if step <= warmup_steps:
        return float(np.interp(step, [0, warmup_steps], [start, peak])) if warmup_steps else peak
    turned = complex(-1) ** ((step - warmup_steps) / (total - warmup_steps))
    return (peak + final) / 2 + turned.real * (peak - final) / 2


@pytest.mark.parametrize("total, warmup_steps", [(300, 40), (300, 0), (7, 3), (1, 0), (2, 1)])
def test_learning_rate_matches_the_formula(total, warmup_steps):
    options = {**PAPER, "warmup_steps": warmup_steps}
    for step in range(total + 1):
        expected = naive_learning_rate(step, total, **options)
        assert learning_rate(step, total, **options) == pytest.approx(expected, rel=1e-12, abs=1e-17)


def test_learning_rate_end_points():
    assert learning_rate(0, 300, **PAPER) == 2e-4
    assert learning_rate(20, 300, **PAPER) == pytest.approx(6e-4)
    assert learning_rate(40, 300, **PAPER) == 1e-3
    assert learning_rate(170, 300, **PAPER) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(300, 300, **PAPER) == pytest.approx(1e-6)
    assert learning_rate(999, 300, **PAPER) == learning_rate(300, 300, **PAPER)  # a run never turns round
    values = [learning_rate(step, 300, **PAPER) for step in range(301)]
    assert all(a < b for a, b in itertools.pairwise(values[:41]))
    assert all(a > b for a, b in itertools.pairwise(values[40:]))


@pytest.mark.parametrize("total", [1, 5, 50])
def test_a_warmup_of_the_whole_run(total):
    values = [learning_rate(step, total, **{**PAPER, "warmup_steps": total}) for step in range(total + 1)]
    assert values == pytest.approx(np.linspace(2e-4, 1e-3, total + 1).tolist())


@pytest.mark.parametrize("start, end", [(0.04, 0.4), (1.0, 0.0), (0.05, 0.05)])
def test_cosine(start, end):
    """Weight decay: sin^2 goes from 0 to 1 as half a cosine does."""
    for step in range(101):
        expected = start + (end - start) * math.sin(math.pi * step / 200) ** 2
        assert cosine(step, 100, start, end) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert cosine(0, 100, start, end) == pytest.approx(start, rel=1e-12)
    assert cosine(100, 100, start, end) == cosine(1000, 100, start, end) == end


def test_ema_momentum():
    values = [ema_momentum(step, 1000, 0.996, 1.0) for step in range(1001)]
    assert values == pytest.approx(np.linspace(0.996, 1.0, 1001).tolist(), rel=1e-14)
    assert values[0] == 0.996 and values[-1] == ema_momentum(5000, 1000, 0.996, 1.0) == 1.0
    assert ema_momentum(3, 10, 0.9, 0.9) == 0.9
