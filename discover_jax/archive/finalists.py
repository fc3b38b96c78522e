"""The choice of the best program by retests: the top programs run again on rows that no reward depended on, half of them in each round.

Successive halving (Jamieson and Talwalkar, 2016): each round measures the finalists that are left once more and keeps the better half. The
winner has the highest lower confidence bound of those that took part in all rounds.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from discover_jax.archive.posterior import Normal, lower_bound
from discover_jax.types import State

LAST = 2
"""Finalists of the last round: a single one would need no further retest."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A score of a program in one retest.

    Attributes:
      score: in the metric's own direction and unit.
      rows: number of rows behind it; 1 for an evaluation without rows.
      variance: of the score, from the sampling of its rows; None if the metric has no results of single rows.
    """

    score: float
    rows: int
    variance: float | None


@dataclasses.dataclass(frozen=True)
class Finalist:
    """A program and its retests.

    Attributes:
      state: of the program, with the score that made it a finalist.
      measurements: in order. Programs that were left out early have fewer.
      failure: why it has no score in its last run; empty if it has one.
    """

    state: State
    measurements: tuple[Measurement, ...] = ()
    failure: str = ""

    @property
    def degrees(self) -> int | None:
        """Degrees of freedom if the variance of the estimate comes from the spread of scores; None if it comes from rows."""
        return None if all(each.variance is not None for each in self.measurements) else len(self.measurements) - 1

    @property
    def estimate(self) -> Normal | None:
        """The score over all retests with its variance, infinite if unknown; None without a retest.

        The mean of the scores, weighted by rows. Its variance is sum_k n_k^2 v_k / (sum_k n_k)^2, as the retests have different rows. If
        a variance is unknown, it comes from the spread of at least two scores: their sample variance over their number.
        """
        if not self.measurements:
            return None
        scores, rows = (np.array([getattr(each, name) for each in self.measurements], np.float64) for name in ("score", "rows"))
        mean = np.asarray(np.average(scores, weights=rows))
        known = [each.variance for each in self.measurements if each.variance is not None]
        if len(known) == len(scores):
            return Normal(mean, np.asarray(np.sum(rows**2 * np.array(known)) / rows.sum() ** 2))
        return Normal(mean, np.asarray(scores.var(ddof=1) / len(scores) if len(scores) > 1 else math.inf))


def first_finalists(states: Iterable[State], count: int) -> list[Finalist]:
    """The best programs, no two with the same text or with the same results in all rows: such copies would leave no choice.

    Args:
      states: best first.
      count: number of finalists; fewer if there are fewer programs.
    """
    unlike: dict[str, State] = {}
    for state in states:
        unlike.setdefault(state.rows or state.code, state)
    return [Finalist(state) for state in list(unlike.values())[:count]]


def rounds(count: int, retests: int) -> list[int]:
    """Number of finalists in each round: all, then half of those before, rounded up, but at least `LAST`."""
    return [max(min(LAST, count), math.ceil(count / 2**number)) for number in range(retests)]


def best_first(finalists: Sequence[Finalist], *, higher_is_better: bool) -> list[Finalist]:
    """The finalists in the order of their results: those with more retests first, since they won the earlier rounds; then by the lower
    confidence bound of the score (the upper one if a lower score is better). The spread of a few scores is too uncertain for a bound, so
    without row results the score decides. Failures come last.

    Among equals the order stays, so that a program of an earlier rank wins.
    """
    sign = 1.0 if higher_is_better else -1.0

    def key(finalist: Finalist) -> tuple[bool, int, float, float]:
        estimate = finalist.estimate
        if finalist.failure or estimate is None:
            return True, -len(finalist.measurements), 0.0, 0.0
        score = sign * float(estimate.mean)
        bound = float(lower_bound(Normal(np.asarray(score), estimate.variance))) if finalist.degrees is None else score
        return False, -len(finalist.measurements), -bound, -score

    return sorted(finalists, key=key)
