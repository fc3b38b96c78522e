"""The expected best of k rollouts: what each rollout of a group contributes to it, and the schedules of k and of the frontier's weight.

Notation: a group has n rewards, sorted r_1 <= ... <= r_n, with the gaps g_m = r_(m+1) - r_m. A random subset of k rollouts has its best
among the first m with probability F(m) = C(m, k) / C(n, k). F follows from F(n) = 1 and F(m - 1) = F(m) (m - k) / m, without large
binomials, so groups of any size are safe. The expected best is r_n - sum_m g_m F(m). All sums are over gaps, so a shift of all rewards does
not change their rounding.
"""

import numpy as np
import numpy.typing as npt

from discover_jax.exceptions import LearningError


def best_with_minus_without(rewards_K: npt.ArrayLike, k: int) -> np.ndarray:
    """k times the difference: expected best of the subsets of k with rollout i, less that of the subsets of k without it. float64 [K].

    The expected best is the mean, over all subsets of k rollouts, of the best reward: sum_i r_i C(i - 1, k - 1) / C(n, k) over sorted
    rewards (Chen et al., arXiv 2107.03374, for binary rewards). With J = E[max of k rollouts], the mean of max(subset) x sum of grad log p
    over its members, over all subsets of k, is an unbiased estimate of grad J (PKPO, arXiv 2505.15201). Rollout i then has the weight
    (k / n) E[best | i is in]. A baseline that does not depend on rollout i keeps the estimate unbiased; leaving i out gives
    (k / n) E[best | i is out]. Times n, so that k = 1 is r_i minus the mean of the others:

      A_i = k (E[best | i in] - E[best | i out])
          = n k / (n - k) (sum_{m < i} g_m F(m) - sum_{m >= i} g_m F(m) (n - m) / m)

    The sum over a group is 0. (PKPO's own leave-one-out baseline is (k / (n - 1)) E[best | i out]; it changes with a shift of all rewards.)

    Raises:
      LearningError: k is not between 1 and the number of rewards less one, or a difference of rewards overflows float64.
    """
    rewards = np.asarray(rewards_K, np.float64)
    n = rewards.size
    _check_k(k, n, n - 1)
    ordered, gaps = _sorted_gaps(rewards)
    m = np.arange(1, n)
    steps = gaps * _best_within(n, k)[1:-1]
    below = np.concatenate([[0.0], np.cumsum(steps)])
    above = np.concatenate([np.cumsum((steps * (n - m) / m)[::-1])[::-1], [0.0]])
    return _of_rewards(rewards, ordered, n * k / (n - k) * (below - above))


def contributions(rewards_K: npt.ArrayLike, k: int, base: float) -> np.ndarray:
    """What each rollout adds to the best of `base` and k - 1 other rollouts, in the mean over the others. float64 [K], at least 0.

    c_i = mean over subsets S of k - 1 others of max(base, S, r_i) - max(base, S). With k = 1 this is max(0, r_i - base). With a base that
    is at most the lowest reward, it is the weight with the baseline "the same subset without i" of PKPO (arXiv 2505.15201), times n / k.

    Raises:
      LearningError: k is not between 1 and the number of rewards, or a difference of rewards overflows float64.
    """
    rewards = np.maximum(np.asarray(rewards_K, np.float64), base)
    n = rewards.size
    _check_k(k, n, n)
    ordered, gaps = _sorted_gaps(rewards)
    # The best of k - 1 others is among the first m of them with probability C(m, k - 1) / C(n - 1, k - 1). With k = 1, that is 1.
    rises = np.cumsum(gaps * _best_within(n - 1, k - 1)[1:])
    first = ordered[0] - base if k == 1 else 0.0
    return _of_rewards(rewards, ordered, first + np.concatenate([[0.0], rises]))


def k_of_step(step: int, *, first: int, last: int, steps: int) -> int:
    """k in a step of the run: from `first` to `last` in equal parts over `steps` steps, rounded half up, then `last`.

    Args:
      step: number of the step in this run, from 0.
      first, last: k of step 0, and k of step `steps` - 1 and of all later ones.
      steps: length of the schedule; 1 uses `last` from the start.
    """
    parts = steps - 1
    return last if step >= parts else first + (2 * (last - first) * step + parts) // (2 * parts)


def weight_of_step(step: int, *, start: int, steps: int) -> float:
    """Weight of the frontier in a step of the run: 0 until step `start`, then linearly to 1 in step `start` + `steps` - 1, then 1.

    Args:
      step: number of the step in this run, from 0.
      start: step in which the rise begins.
      steps: length of the rise; 1 switches from 0 to 1 in step `start`.
    """
    if steps == 1:
        return float(step >= start)
    return min(max((step - start) / (steps - 1), 0.0), 1.0)


def _check_k(k: int, size: int, most: int) -> None:
    if not 1 <= k <= most:
        raise LearningError(
            f"k = {k} does not fit a group of {size} rollouts: it must be from 1 to {most}. Lower config.train.max_at_k, or raise"
            " config.group_size."
        )


def _best_within(n: int, k: int) -> np.ndarray:
    """F(0), ..., F(n): the probability that the best of k of n is among the first m. All 1 for k = 0."""
    m = np.arange(n, 0, -1)
    return np.concatenate([[1.0], np.cumprod(np.maximum(m - k, 0) / m)])[::-1]


def _sorted_gaps(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered = np.sort(rewards)
    with np.errstate(over="ignore"):
        span = ordered[-1] - ordered[0]
    if not np.isfinite(span):
        raise LearningError(
            f"Rewards from {ordered[0]} to {ordered[-1]} are too far apart: their difference overflows float64. Use a reward with bounded"
            " values."
        )
    return ordered, np.diff(ordered)


def _of_rewards(rewards: np.ndarray, ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values by position in the order -> values by rollout. Equal rewards get the same value to the last bit."""
    return values[np.searchsorted(ordered, rewards)]
