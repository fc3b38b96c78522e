"""Estimates of a program's true score from noisy measurements on rows: paired differences, shrinkage, and the posterior of a lineage.

The true score of a program is its score on all rows that there could be. A measurement on n rows is the true score plus noise. Programs
that are measured on the same rows share most of their noise, so the difference of a child and its parent is more precise than their scores.

All scores are higher-is-better: negate losses first. Everything is float64 on the host. Functions take arrays elementwise where the
docstring says "broadcast".

The model is normal-normal empirical Bayes (Robbins 1956; Efron and Morris 1973): true scores of programs without a parent come from one
normal distribution, true steps from parent to child from another, and both are estimated from the measurements of the run.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from discover_jax.exceptions import RunError

Values = npt.ArrayLike

Z95 = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""

_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation in units of its median absolute deviation."""


class Normal(NamedTuple):
    """A normal distribution, or arrays of them.

    Attributes:
      mean: float64.
      variance: float64, at least 0.
    """

    mean: np.ndarray
    variance: np.ndarray


def difference_of_counts(only_child: Values, only_parent: Values, rows: Values) -> Normal:
    """The difference child - parent of two shares of the same rows, with its sampling variance. Arguments broadcast.

    (b - c) / n, with variance (b + c - (b - c)^2 / n) / n^2 (McNemar 1947). The variance is 0 if the rows do not differ. With only a few
    rows that differ, it is itself uncertain.

    Args:
      only_child, only_parent: b and c, the number of rows that only one of the two programs gets right.
      rows: n, the number of all rows.

    Raises:
      RunError: a count is negative, or b + c is larger than n.
    """
    b, c, n = _variance(only_child, "only_child"), _variance(only_parent, "only_parent"), _variance(rows, "rows")
    if (b + c > n).any() or (n < 2).any():
        raise RunError("Counts of a paired difference must fit the rows: b + c at most n, and n at least 2. Measure on more rows.")
    difference = (b - c) / n
    return Normal(difference, (b + c - (b - c) * difference) / n**2)


def shrink(mean: Values, variance: Values, prior_mean: Values, prior_variance: Values) -> Normal:
    """The posterior of a true value with the prior N(m, t^2), after a measurement x with variance s^2.

    Mean (m / t^2 + x / s^2) / (1 / t^2 + 1 / s^2), variance 1 / (1 / t^2 + 1 / s^2), computed with the weight w = t^2 / (t^2 + s^2) as
    m + w (x - m) and w s^2, which also holds for variances of 0. If both are 0, the measurement counts. All arguments broadcast.

    Raises:
      RunError: a variance is negative, or a value is not finite.
    """
    x, m = _finite(mean, "mean"), _finite(prior_mean, "prior_mean")
    s2, t2 = _variance(variance, "variance"), _variance(prior_variance, "prior_variance")
    weight = _ratio(t2, t2 + s2)
    return Normal(m + weight * (x - m), weight * s2)


def estimate_prior(differences_N: Values, variances_N: Values, *, reach: float = 4.0) -> Normal:
    """The distribution of the true values behind measurements with known variances: empirical Bayes by the method of moments.

    With d_i = true_i + noise_i, the mean is m = mean d, and the variance is t^2 = max(0, sum_i (d_i - m)^2 / (n - 1) - mean v): the spread
    of the measurements less that of their noise (Hedges 1983).

    Two kinds of measurements are left out. Those with variance 0 come from programs that give the same results on all rows: such copies
    say nothing about the effect of a change. Those further from the median than `reach` robust standard deviations (1.4826 x the
    median absolute deviation, but at least the median noise) come from broken programs, which would make every change look large.

    Args:
      differences_N: measurements, such as the paired differences of the children in a run, or the scores of its programs without a parent.
      variances_N: their sampling variances.
      reach: number of robust standard deviations; infinite to keep all.

    Returns:
      The prior. With fewer than two usable measurements, the variance is 0, since nothing shows that programs differ, and the mean is the
      usable measurement or 0.

    Raises:
      RunError: the lengths differ, a variance is negative, or a value is not finite.
    """
    d, v = _finite(differences_N, "differences").ravel(), _variance(variances_N, "variances").ravel()
    if d.size != v.size:
        raise RunError(f"estimate_prior needs one variance per difference; got {d.size} differences and {v.size} variances.")
    used = (v > 0) & _near(d, v, reach)
    d, v = d[used], v[used]
    if d.size < 2:
        return Normal(np.asarray(d.mean() if d.size else 0.0), np.asarray(0.0))
    return Normal(d.mean(), np.maximum(0.0, d.var(ddof=1) - v.mean()))


def priors_of_steps(differences_N: Values, variances_N: Values, *, reach: float = 4.0) -> Normal:
    """The prior of each true step from parent to child, arrays [N]: `estimate_prior`, but a broad one for outliers.

    A broken program comes from another distribution than an edit that works. Under the prior of the latter, a difference of -0.3 would be
    evidence that the parent's score was too high by many standard deviations. So a measurement d beyond the reach of `estimate_prior` gets
    the variance (d - m)^2. It then says next to nothing about the parent, and is hardly shrunk itself.

    Args:
      differences_N, variances_N, reach: see `estimate_prior`.

    Raises:
      RunError: see `estimate_prior`.
    """
    prior = estimate_prior(differences_N, variances_N, reach=reach)
    d, v = np.asarray(differences_N, np.float64), np.asarray(variances_N, np.float64)
    return Normal(np.full(d.shape, prior.mean), np.where(_near(d, v, reach), prior.variance, (d - prior.mean) ** 2))


def _near(d: np.ndarray, v: np.ndarray, reach: float) -> np.ndarray:
    """Which measurements are within the reach of `estimate_prior`; copies are, unless they are far from the rest."""
    if not (v > 0).any():
        return np.ones(d.shape, bool)
    middle = np.median(d[v > 0])
    scale = max(_TO_DEVIATION * np.median(np.abs(d[v > 0] - middle)), math.sqrt(np.median(v[v > 0])))
    return (np.abs(d - middle) <= reach * scale) | (v == 0)


def child_posterior(parent: Normal, parent_score: Normal, child_score: Normal, difference_variance: Values, step: Normal) -> Normal:
    """The posterior of a child's true score, from its parent's posterior and the scores of both on the same rows.

    The model: the child's true score is the parent's plus a step from N(m, t^2). The noises of both scores have the variances s_p^2 and
    s_c^2, and their difference has the variance v, so their covariance is (s_p^2 + s_c^2 - v) / 2. Given the parent's noise e_p, the
    child's is rho e_p + xi with rho = (s_p^2 + s_c^2 - v) / (2 s_p^2) and Var xi = q = s_c^2 - rho^2 s_p^2. With the parent's posterior
    N(a, A), the measurement y = x_c - rho x_p = (1 - rho) true_p + step + xi gives, as in a Kalman filter (Kalman 1960),

      gain = ((1 - rho) A + t^2) / ((1 - rho)^2 A + t^2 + q)
      mean = a + m + gain (y - (1 - rho) a - m)
      variance = A + t^2 - gain ((1 - rho) A + t^2)

    If the noise of the difference is independent of the parent's (rho = 1, q = v), this is the parent's estimate plus the shrunken paired
    difference: a + shrink(x_c - x_p, v, m, t^2). On the same rows it is not independent: the children of a lucky parent lose its luck on
    the rows where they differ from it. If the child has rows of its own (rho = 0), this is `shrink` of its score towards a + m.

    Args:
      parent: posterior of the parent's true score.
      parent_score, child_score: measurements, with their sampling variances.
      difference_variance: sampling variance of their difference (`row_results.difference_variance`). The sum of both variances if
        the rows differ.
      step: prior of the true step; see `estimate_prior`.
      All of them broadcast.

    Raises:
      RunError: a variance is negative, or a value is not finite.
    """
    a, spread = _finite(parent.mean, "mean of the parent"), _variance(parent.variance, "variance of the parent")
    x_p, s2_p = _finite(parent_score.mean, "parent's score"), _variance(parent_score.variance, "variance of the parent's score")
    x_c, s2_c = _finite(child_score.mean, "child's score"), _variance(child_score.variance, "variance of the child's score")
    v = _variance(difference_variance, "difference_variance")
    m, t2 = _finite(step.mean, "mean of the step"), _variance(step.variance, "variance of the step")
    rho, q = _shared_noise(s2_p, s2_c, v)
    covariance = (1.0 - rho) * spread + t2
    gain = _ratio(covariance, (1.0 - rho) ** 2 * spread + t2 + q)
    mean = a + m + gain * (x_c - rho * x_p - (1.0 - rho) * a - m)
    return Normal(mean, np.maximum(spread + t2 - gain * covariance, 0.0))


def _shared_noise(s2_p: np.ndarray, s2_c: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """rho and q of `child_posterior`."""
    # The cap keeps q at least 0: no correlation exceeds 1. A parent's score without noise says nothing about the child's noise.
    limit = np.sqrt(_ratio(s2_c, s2_p, of_zero=0.0))
    rho = np.clip(_ratio(s2_p + s2_c - v, 2.0 * s2_p, of_zero=0.0), 0.0, limit)
    return rho, np.maximum(s2_c - rho**2 * s2_p, 0.0)


def lineage_posterior(
    parents_N: Sequence[int] | np.ndarray, scores: Normal, difference_variances_N: Values, *, root: Normal, step: Normal
) -> Normal:
    """The posterior of the true score of every program of a run, given the scores of all of them.

    The model is that of `child_posterior`, with N(root) for the true scores of programs without a parent. Conditioning is exact (belief
    propagation on the tree, Pearl 1988): a program's posterior uses the scores of its ancestors, its own, and those of its descendants. The
    latter matter: a parent whose children all score less was probably lucky. Without them, the posterior of a parent that stayed the best
    for long would be too high, since it stayed the best because of its luck.

    Given the parent's true score T, a child's measurement is y - m = (1 - rho) T + N(0, t^2 + q), and its true score is A T + B +
    N(0, tau), with w = t^2 / (t^2 + q), A = 1 - w (1 - rho), B = m + w (y - m) and tau = w q. Upwards, the descendants of a child say
    exp(h x - p x^2 / 2) about its true score x. Through the child, they say the same about T with the precision (1 - rho)^2 / (t^2 + q) +
    A^2 p / (1 + p tau) and the shift (1 - rho) (y - m) / (t^2 + q) + A (h - p B) / (1 + p tau). Downwards, `child_posterior` starts from
    the parent's posterior without this child's message.

    Args:
      parents_N: position of each program's parent, or -1 if it has none. Parents come before their children.
      scores: mean and sampling variance of each program's score, arrays [N].
      difference_variances_N: sampling variance of each program's paired difference to its parent; ignored for programs without a parent.
      root, step: priors; see `estimate_prior` and `priors_of_steps`. Each is one distribution, or one for each program.

    Raises:
      RunError: the lengths differ, a parent does not come before its child, a variance is negative, or a value is not finite.
    """
    parents = np.asarray(parents_N, np.int64)
    x, s2 = _finite(scores.mean, "scores"), _variance(scores.variance, "variances of the scores")
    given = np.asarray(difference_variances_N, np.float64)
    if not parents.shape == x.shape == s2.shape == given.shape == (parents.size,):
        raise RunError(
            f"lineage_posterior needs arrays of one length; got shapes {parents.shape} of parents, {x.shape} of scores, {s2.shape} of"
            f" variances and {given.shape} of difference variances."
        )
    late = np.flatnonzero((parents >= np.arange(parents.size)) | (parents < -1))
    if late.size:
        raise RunError(
            f"Parents must come before their children, or be -1; programs at {late[:5].tolist()} have {parents[late[:5]].tolist()}."
        )
    v = _variance(np.where(parents < 0, 0.0, given), "difference_variances")
    m, t2 = (np.broadcast_to(np.asarray(values, np.float64), x.shape) for values in step)
    generations = _generations(parents)
    precision, shift = np.zeros(x.shape), np.zeros(x.shape)  # what the descendants say
    to_parent = np.zeros(x.shape), np.zeros(x.shape)
    for own in generations[:0:-1]:
        of = parents[own]
        child = x[of], s2[of], x[own], s2[own], v[own], m[own], t2[own], precision[own], shift[own]
        for sums, messages, message in zip((precision, shift), to_parent, _message_to_parent(*child), strict=True):
            messages[own] = message
            np.add.at(sums, of, message)
    mean, variance = (np.array(values) for values in shrink(x, s2, root.mean, root.variance))
    for own in generations[1:]:
        of = parents[own]
        others = precision[of] - to_parent[0][own], shift[of] - to_parent[1][own]
        mean[own], variance[own] = child_posterior(
            _informed(mean[of], variance[of], *others),
            Normal(x[of], s2[of]),
            Normal(x[own], s2[own]),
            v[own],
            Normal(m[own], t2[own]),
        )
    return _informed(mean, variance, precision, shift)


def _message_to_parent(
    x_p: np.ndarray,
    s2_p: np.ndarray,
    x_c: np.ndarray,
    s2_c: np.ndarray,
    v: np.ndarray,
    m: np.ndarray,
    t2: np.ndarray,
    precision: np.ndarray,
    shift: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and shift of what a child and its descendants say about the parent's true score; see `lineage_posterior`."""
    rho, q = _shared_noise(s2_p, s2_c, v)
    surprise = x_c - rho * x_p - m
    weight = _ratio(t2, t2 + q)
    slope, offset, tau = 1.0 - weight * (1.0 - rho), m + weight * surprise, weight * q
    own = _ratio(1.0 - rho, t2 + q, of_zero=0.0)
    through = slope / (1.0 + precision * tau)
    return own * (1.0 - rho) + slope * through * precision, own * surprise + through * (shift - precision * offset)


def _informed(mean: np.ndarray, variance: np.ndarray, precision: np.ndarray, shift: np.ndarray) -> Normal:
    """N(mean, variance) times exp(shift x - precision x^2 / 2)."""
    scale = 1.0 + variance * np.maximum(precision, 0.0)
    return Normal((mean + variance * shift) / scale, variance / scale)


def _generations(parents_N: np.ndarray) -> list[np.ndarray]:
    """The programs without a parent, their children, the children of these, and so on. Each group depends only on earlier ones."""
    groups = [np.flatnonzero(parents_N < 0)]
    seen = parents_N < 0
    while not seen.all():
        own = np.flatnonzero(~seen & seen[parents_N])
        seen[own] = True
        groups.append(own)
    return groups


def is_tie(difference: Values, variance: Values, *, z: float = Z95) -> np.ndarray:
    """Whether a difference is within noise: |difference| <= z sqrt(variance), so that its interval includes 0. Arguments broadcast.

    A difference of 0 is a tie whatever its variance.

    Raises:
      RunError: a variance is negative, or a value is not finite.
    """
    return np.abs(_finite(difference, "difference")) <= z * np.sqrt(_variance(variance, "variance"))


def lower_bound(estimate: Normal, *, z: float = Z95) -> np.ndarray:
    """mean - z sqrt(variance): the lower end of the interval of each estimate, 95% two-sided with the default z.

    Raises:
      RunError: a variance is negative, or a value is not finite.
    """
    return _finite(estimate.mean, "mean") - z * np.sqrt(_variance(estimate.variance, "variance"))


def _finite(values: Values, what: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise RunError(f"{what} must be finite; got {array[~np.isfinite(array)][:3].tolist()}. Leave failed programs out.")
    return array


def _variance(values: Values, what: str) -> np.ndarray:
    array = _finite(values, what)
    if (array < 0).any():
        raise RunError(f"{what} must be at least 0; got {array[array < 0][:3].tolist()}.")
    return array


def _ratio(numerator: np.ndarray, denominator: np.ndarray, *, of_zero: float = 1.0) -> np.ndarray:
    """numerator / denominator; `of_zero` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, of_zero), where=denominator > 0)
