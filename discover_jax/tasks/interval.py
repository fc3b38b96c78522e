"""Confidence intervals of scores, for summaries.

They cover only the sampling of rows: how far the score of one given program may be from its score on all such rows. They do not account for
the search, which selected the program as the best of many on the same rows.
"""

import dataclasses
import math

import numpy as np

from discover_jax.tasks.competition import Metric

# 97.5th percentile of the normal distribution: two-sided 95%.
_Z95 = 1.959963984540054


def wilson_interval(proportion: float, rows: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion (E. B. Wilson 1927); 95% with the default `z`.

    Bounds are (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n).

    Args:
      proportion: share of correct rows, in [0, 1].
      rows: number of rows, at least 1.
      z: quantile of the normal distribution.

    Raises:
      ValueError: a value is out of its range.
    """
    if rows < 1 or not 0.0 <= proportion <= 1.0:
        raise ValueError(f"proportion must be in [0, 1] and rows at least 1; got {proportion!r} of {rows!r} rows.")
    spread = z * math.sqrt(proportion * (1.0 - proportion) / rows + z * z / (4.0 * rows * rows))
    middle = proportion + z * z / (2.0 * rows)
    scale = 1.0 + z * z / rows
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A 95% interval of a score, or the reason why there is none.

    Attributes:
      bounds: lower and upper bound; None if there is no interval.
      method: how the bounds were computed, or why they could not be.
    """

    bounds: tuple[float, float] | None
    method: str

    @property
    def text(self) -> str:
        """The text for summaries."""
        return f"95% interval {self.bounds[0]:.4f} to {self.bounds[1]:.4f}" if self.bounds else f"no interval: {self.method}"

    def to_json(self, name: str) -> dict[str, list[float] | str | None]:
        """Entries `name` and `name_method`, for best/grade.json."""
        return {name: list(self.bounds) if self.bounds else None, f"{name}_method": self.method if self.bounds else self.text}


def no_interval(reason: str) -> Interval:
    return Interval(None, reason)


def binomial_interval(score: float, rows: int) -> Interval:
    """The interval of a score that is a share of rows."""
    return Interval(wilson_interval(score, rows), "Wilson's score interval of a proportion")


RESAMPLES = 1000
_MIN_RESAMPLES = 200
_MOST_ROWS = 20_000_000
"""Total rows of all resamples if each needs a call of the metric: a few seconds with scikit-learn's metrics."""
_CHUNK = 4_000_000
"""Number of counts in memory at once."""
_FEWEST_SCORED = 0.95


def bootstrap_interval(metric: Metric, answers_R: np.ndarray, predictions_R: np.ndarray, *, seed: int = 0) -> Interval:
    """The percentile bootstrap (Efron and Tibshirani 1993, chapter 13): the middle 95% of the scores of resampled tables. A resample has as
    many rows, drawn with replacement.

    Deterministic for the same arguments. Resamples without a score, such as those with a single class, are left out. If these are more than
    one in twenty, there is no interval.

    Args:
      answers_R, predictions_R: arguments of `metric.function`.
      seed: of the draws.
    """
    rows = len(answers_R)
    if rows < 2:
        return no_interval(f"{rows} row cannot be resampled")
    scores_B = (_scores_by_counts if metric.resampled is not None else _scores_by_calls)(metric, answers_R, predictions_R, seed)
    scored_B = scores_B[np.isfinite(scores_B)]
    if len(scored_B) < _FEWEST_SCORED * len(scores_B):
        return no_interval(f"{metric.name} could be computed for only {len(scored_B):,} of {len(scores_B):,} resamples of the rows")
    low, high = np.quantile(scored_B, (0.025, 0.975)).tolist()
    return Interval((low, high), f"percentile bootstrap over rows, {len(scores_B):,} resamples")


def _scores_by_counts(metric: Metric, answers_R: np.ndarray, predictions_R: np.ndarray, seed: int) -> np.ndarray:
    assert metric.resampled is not None
    rows, rng = len(answers_R), np.random.default_rng(seed)
    parts, left = [], RESAMPLES
    while left:
        size = min(left, max(1, _CHUNK // rows))
        drawn_BR = rng.integers(0, rows, (size, rows)) + rows * np.arange(size)[:, None]
        counts_BR = np.bincount(drawn_BR.ravel(), minlength=size * rows).reshape(size, rows)
        parts.append(metric.resampled(answers_R, predictions_R, counts_BR))
        left -= size
    return np.concatenate(parts)


def _scores_by_calls(metric: Metric, answers_R: np.ndarray, predictions_R: np.ndarray, seed: int) -> np.ndarray:
    rows, rng = len(answers_R), np.random.default_rng(seed)
    scores = []
    for _ in range(min(RESAMPLES, max(_MIN_RESAMPLES, _MOST_ROWS // rows))):
        drawn_R = rng.integers(0, rows, rows)
        try:
            scores.append(float(metric.function(answers_R[drawn_R], predictions_R[drawn_R])))
        except Exception:  # a metric may reject a resample; it then has no score: see `bootstrap_interval`
            scores.append(math.nan)
    return np.array(scores)
