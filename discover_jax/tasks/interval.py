"""How far a score can be trusted: confidence intervals for summaries."""

import math

from discover_jax.tasks.competition import Metric

# 97.5th percentile of the normal distribution: two-sided 95%.
_Z95 = 1.959963984540054


def wilson_interval(proportion: float, rows: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion, 95% unless `z` says otherwise (E. B. Wilson 1927).

    Bounds are (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n).

    Args:
      proportion: share of rows that were right, in [0, 1].
      rows: number of rows, at least 1.
      z: quantile of the normal distribution.

    Raises:
      ValueError: a value is out of its range.
    """
    if rows < 1 or not 0.0 <= proportion <= 1.0:
        raise ValueError(f"A proportion lies in [0, 1] and counts at least one row; given {proportion!r} of {rows!r} rows.")
    spread = z * math.sqrt(proportion * (1.0 - proportion) / rows + z * z / (4.0 * rows * rows))
    middle = proportion + z * z / (2.0 * rows)
    scale = 1.0 + z * z / rows
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def score_interval(metric: Metric, score: float, rows: int) -> tuple[float, float] | None:
    """95% interval of a score on `rows` rows; None where the score alone does not determine one (it is no proportion of rows)."""
    return wilson_interval(score, rows) if metric.proportion else None
