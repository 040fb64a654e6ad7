"""Accuracy against what was spent: means over seeds, values read off, and how many times more compute one needs.

S seeds, P probed points of a run, the first of which is the untrained encoder's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The runs of a recipe that are equal in something, one a seed.

    spent: by what is spent (images, seconds, ...), (S, P), growing along a row from 0. scores: by the probe's name,
    (S, P) percent.
    """

    recipe: str
    equal: str
    spent: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]

    def mean(self, probe: str, along: str) -> tuple[np.ndarray, np.ndarray]:
        """(P,) spent and (P,) scores, means over the seeds."""
        return self.spent[along].mean(axis=0), self.scores[probe].mean(axis=0)

    def ends(self, along: str) -> np.ndarray:
        """(S,): what each seed's run has spent in all."""
        return self.spent[along][:, -1]


def spread(values: np.ndarray) -> float:
    """Standard deviation over the seeds (n - 1); 0 of a single one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def reached_by_all(curves: Sequence[Curve], along: str) -> float:
    """The most that every seed of every recipe has spent, in the longest of its runs."""
    longest: dict[str, float] = {}
    for curve in curves:
        longest[curve.recipe] = max(longest.get(curve.recipe, 0.0), float(curve.ends(along).min()))
    return min(longest.values())


def shortest_run(curves: Sequence[Curve], along: str, amount: float) -> Curve:
    """Of a recipe's runs, the shortest that goes as far as the amount: the one whose schedules end next to it."""
    reaching = [curve for curve in curves if curve.ends(along).min() >= amount * (1 - 1e-9)]
    return min(reaching, key=lambda curve: curve.ends(along).mean())


def read_off(curve: Curve, along: str, amount: float, wanted: np.ndarray) -> np.ndarray:
    """(S,) values at an amount spent, linear between points. wanted: (S, P), such as scores or another of spent."""
    rows = zip(curve.spent[along], wanted, strict=True)
    return np.array([np.interp(amount, spent_P, wanted_P) for spent_P, wanted_P in rows])


def first_reach(spent_P: np.ndarray, scores_P: np.ndarray, score: float) -> float | None:
    """The least that is spent where a curve, linear between its points, is at the score; None where it never is."""
    at = int(np.argmax(scores_P >= score))
    if scores_P[at] < score:
        return None
    if at == 0:
        return float(spent_P[0])
    share = (score - scores_P[at - 1]) / (scores_P[at] - scores_P[at - 1])
    return float(spent_P[at - 1] + share * (spent_P[at] - spent_P[at - 1]))


@dataclass(frozen=True)
class Times:
    """How many times as much one recipe spends for the score that another ends with.

    times: None where it never gets there; then more_than is how many times as much it has spent in vain. Both are None
    where the other one ends no better than the untrained encoder, which costs nothing.
    """

    score: float
    times: float | None
    more_than: float | None = None

    @property
    def words(self) -> str:
        if self.times is not None:
            return f"{self.times:.2f}"
        return "no gain to match" if self.more_than is None else f"not reached (> {self.more_than:.2f})"


def times_more(ours: Sequence[Curve], theirs: Sequence[Curve], probe: str, along: str) -> Times:
    """How many times as much is spent on ours for the score that theirs ends with at equal images; of means over seeds.

    ours, theirs: all curves of a recipe. Both sides count what it takes until the score is first reached.
    """
    (other,) = (curve for curve in theirs if curve.equal == "images")
    spent_P, scores_P = other.mean(probe, along)
    score = float(scores_P[-1])
    cost = first_reach(spent_P, scores_P, score)
    assert cost is not None
    if cost == 0.0:
        return Times(score, None)
    reached = [first_reach(*curve.mean(probe, along), score) for curve in ours]
    found = [amount for amount in reached if amount is not None]
    if found:
        return Times(score, min(found) / cost)
    return Times(score, None, max(float(curve.ends(along).mean()) for curve in ours) / cost)
