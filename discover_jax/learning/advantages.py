"""Advantages of the rollouts of one group, computed from their rewards on the host in float64.

Estimators:

- `mean_baseline`: the plain mean baseline with which the report compares.
- `entropic`: the report's default, with beta = 2 (section 3.3).
- `entropic_loo`: the baseline excludes the rollout's own weight. From *Learning to Discover at Test Time* (arXiv 2601.16175) and its
  reference code.
- `entropic_adaptive`: the paper's default, `entropic_loo` with a beta found for each group.
- `max_at_k`: the gradient of the expected best of k rollouts (PKPO, arXiv 2505.15201).
- `frontier`: moves from the standardised mean baseline to what a rollout adds to the best so far (PACEvolve++, arXiv 2605.07039).

The report's worked example for beta = 2 (section 3.3: -0.5, +4.2 and -0.6 for attempts 1, 3 and 6, "14x more than GRPO") does not follow
from its own formula. For its eight scores, the formula with beta = 2 gives -0.0852, +0.7349 and -0.1385, which is 2.5 times the mean
baseline's +0.29. Numbers like the printed ones need beta near 7.8. This module implements the formula.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.learning.best_of_k import best_with_minus_without, contributions
from discover_jax.learning.tables import Table


@dataclasses.dataclass(frozen=True)
class Advantages:
    """The advantages of one group.

    Attributes:
      values_K: float64, one advantage per rollout.
      beta: inverse temperature that was used; None if the estimator has none.
      saturated: whether a numerical limit determined the result; see each estimator.
      ties: number of rollouts that share the best reward; None for estimators that do not depend on it.
      empty: whether no rollout is better or worse than another for the estimator, although rewards differ. The update skips such a group.
    """

    values_K: np.ndarray
    beta: float | None
    saturated: bool
    ties: int | None = None
    empty: bool = False


class Estimator(Protocol):
    """Rewards of one group -> advantages. Every estimator takes all keywords, so that the table's entries are exchangeable.

    Args:
      rewards_K: one reward per rollout.
      beta: inverse temperature, for `entropic` and `entropic_loo`.
      k: size of the subsets, for `max_at_k` and `frontier`.
      best: the best reward so far, for `frontier`; None if there is none, or if only the group counts.
      weight: weight of the frontier in `frontier`, from 0 to 1.
    """

    def __call__(
        self, rewards_K: npt.ArrayLike, *, beta: float = 2.0, k: int = 1, best: float | None = None, weight: float = 1.0
    ) -> Advantages: ...


KL_TARGET = math.log(2.0)
"""KL between the weights of `entropic_adaptive` and uniform weights, in nats (paper)."""

_BETA_BOUND = 1e6  # doubling from 1 stops at 2^20, the first power of two above this bound
_BISECTIONS = 60
_KL_TOLERANCE = 1e-9
_LOO_FLOOR = 1e-12


def _finite_rewards(rewards_K: npt.ArrayLike) -> np.ndarray:
    rewards = np.asarray(rewards_K, dtype=np.float64)
    if rewards.ndim != 1 or rewards.size == 0:
        raise LearningError(
            f"Rewards of a group must have one axis, with one reward per rollout and at least one rollout; got shape {rewards.shape}."
        )
    if not np.isfinite(rewards).all():
        at = np.flatnonzero(~np.isfinite(rewards)).tolist()
        raise LearningError(
            f"Rewards must be finite; got {rewards[at].tolist()} at positions {at} of a group of {rewards.size}. Make the task's reward()"
            " return its failure reward for such scores."
        )
    return rewards


def is_constant(rewards_K: npt.ArrayLike) -> bool:
    """Whether all rewards of a group are equal, so that it carries no signal. A group of one is always constant.

    Equality is exact: equal programs get equal scores to the last bit, and the estimators weigh every other difference.

    Raises:
      LearningError: the rewards are empty, not one-dimensional, or not finite.
    """
    rewards = _finite_rewards(rewards_K)
    return bool((rewards == rewards[0]).all())


def mean_baseline(rewards_K: npt.ArrayLike, *, beta: float = 2.0, k: int = 1, best: float | None = None, weight: float = 1.0) -> Advantages:
    """A_i = r_i - mean(r), without division by the standard deviation.

    Raises:
      LearningError: the rewards are empty, not one-dimensional, not finite, or so far apart that their difference overflows float64.
    """
    del beta, k, best, weight
    rewards = _finite_rewards(rewards_K)
    with np.errstate(over="ignore"):
        values = rewards - np.sum(rewards / rewards.size)  # divided first, so that the sum cannot overflow
    if not np.isfinite(values).all():
        raise LearningError(
            f"Rewards from {rewards.min()} to {rewards.max()} are too far apart for mean_baseline: their difference overflows float64."
            " Use a reward with bounded values."
        )
    return Advantages(values, beta=None, saturated=False)


def entropic(rewards_K: npt.ArrayLike, *, beta: float = 2.0, k: int = 1, best: float | None = None, weight: float = 1.0) -> Advantages:
    """w_i = exp(beta r_i) / mean_j exp(beta r_j); A_i = w_i - 1 (report, section 3.3). The sum is 0, and each A_i is in [-1, K - 1].

    The largest reward is subtracted first. This changes no weight, and no finite reward overflows.

    Raises:
      ConfigError: `beta` is negative or not finite.
      LearningError: the rewards are empty, not one-dimensional, or not finite.
    """
    del k, best, weight
    _check_beta(beta)
    weights = np.exp(_exponents(_finite_rewards(rewards_K), beta))
    return Advantages(weights / weights.mean() - 1.0, beta=float(beta), saturated=False)


def entropic_loo(rewards_K: npt.ArrayLike, *, beta: float = 2.0, k: int = 1, best: float | None = None, weight: float = 1.0) -> Advantages:
    """e_i = exp(beta (r_i - max r)); Z_i = mean of the other rollouts' e; A_i = e_i / (Z_i + 1e-12) - 1 (reference code of the paper).

    The sum is not 0 in general. A group of one gets 0. No finite reward overflows. If Z of the best rollout is less than 1e-12, its
    advantage is of the order of 1e12 and comes from that constant; the result is then marked as saturated.

    Raises:
      ConfigError: `beta` is negative or not finite.
      LearningError: the rewards are empty, not one-dimensional, or not finite.
    """
    del k, best, weight
    _check_beta(beta)
    rewards = _finite_rewards(rewards_K)
    values, floored = _leave_one_out(rewards, beta)
    return Advantages(values, beta=float(beta), saturated=floored, ties=_ties(rewards))


def entropic_adaptive(
    rewards_K: npt.ArrayLike, *, beta: float = 2.0, k: int = 1, best: float | None = None, weight: float = 1.0
) -> Advantages:
    """`entropic_loo` with the beta that solves KL(q || uniform) = ln 2, where q_i = exp(beta r_i) / sum_j exp(beta r_j) (paper's default).

    The search for beta follows the reference code. It doubles hi = 1 until its KL is at least ln 2 or hi exceeds 1e6. Then it halves the
    interval from 0 to hi 60 times.

    There is no solution if at least half of the group shares the best reward: the KL then stays below ln 2 for every beta. Such a group
    gets beta = 2^20. Counting the ties decides this, because at exactly half the KL is within rounding of ln 2.

    `saturated` is True if there is no solution, or if the rewards are so close together or so far apart that the KL at the end of the
    search differs from ln 2 by more than 1e-9.

    In a group of two, the better rollout is half of the group, so it always gets the 1e12 of `entropic_loo`. `estimate_groups` therefore
    excludes groups of fewer than `least_rollouts`.

    `Advantages.beta` is the solution; 0 for a group of one.

    Raises:
      LearningError: the rewards are empty, not one-dimensional, or not finite.
    """
    del beta, k, best, weight
    rewards = _finite_rewards(rewards_K)
    ties = _ties(rewards)
    if rewards.size == 1:
        return Advantages(np.zeros(1), beta=0.0, saturated=False, ties=ties)
    high = 1.0
    unsolvable = 2 * ties >= rewards.size
    while high < _BETA_BOUND and (unsolvable or _kl_to_uniform(rewards, high) < KL_TARGET):
        high *= 2.0
    if not unsolvable and _kl_to_uniform(rewards, high) >= KL_TARGET:
        low = 0.0
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if _kl_to_uniform(rewards, middle) < KL_TARGET else (low, middle)
    saturated = unsolvable or abs(_kl_to_uniform(rewards, high) - KL_TARGET) > _KL_TOLERANCE
    return Advantages(_leave_one_out(rewards, high)[0], beta=high, saturated=saturated, ties=ties)


def max_at_k(rewards_K: npt.ArrayLike, *, beta: float = 2.0, k: int = 1, best: float | None = None, weight: float = 1.0) -> Advantages:
    """A_i = k (mean best of the subsets of k rollouts with i - mean best of those without i); see `best_of_k.best_with_minus_without`.

    The mean of A_i x grad log p_i over a group is an unbiased estimate of the gradient of E[best of k rollouts] (PKPO, arXiv 2505.15201,
    with a leave-one-out baseline; RSPO, arXiv 2508.01174, has the same objective). k = 1 is r_i minus the mean of the others. The sum is
    0, and a larger k gives more weight to the best rollouts. A group of one gets 0.

    Raises:
      LearningError: see `mean_baseline`; or k is not between 1 and the number of rollouts less one.
    """
    del beta, best, weight
    rewards = _finite_rewards(rewards_K)
    values = np.zeros(1) if rewards.size == 1 and k == 1 else best_with_minus_without(rewards, k)
    return Advantages(values, beta=None, saturated=False)


def frontier(rewards_K: npt.ArrayLike, *, beta: float = 2.0, k: int = 1, best: float | None = None, weight: float = 1.0) -> Advantages:
    """A_i = (1 - weight) z(r)_i + weight z(c)_i, where c_i is what rollout i adds to the best of `best` and k - 1 other rollouts.

    c_i = mean over subsets S of k - 1 others of max(best, S, r_i) - max(best, S); see `best_of_k.contributions`. With k = 1 it is
    max(0, r_i - best). z(x) = (x - mean x) / sd x with the population's sd, and 0 if x is constant. Rewards count only relative to their
    range, so the unit of the reward has no effect.

    PACEvolve++ (arXiv 2605.07039) moves from a group-relative advantage early to the contribution to the best of k late. This formula is
    our reading of its abstract; the linear mix of standardised parts follows a public reimplementation, and `best` is our addition. Without
    `best`, c is n / k times PKPO's weight with the baseline "the same subset without i".

    Raises:
      ConfigError: `weight` is not from 0 to 1, or `best` is not finite.
      LearningError: see `mean_baseline`; or k is not between 1 and the number of rollouts.
    """
    del beta
    if not 0.0 <= weight <= 1.0 or not (best is None or math.isfinite(best)):
        raise ConfigError(f"weight must be from 0 to 1, and best finite or None; got weight = {weight!r}, best = {best!r}.")
    rewards = _finite_rewards(rewards_K)
    lowest = rewards.min()
    with np.errstate(over="ignore"):
        spread = rewards.max() - lowest
        above = rewards - lowest
        base = 0.0 if best is None else max(best - lowest, 0.0)
    if not np.isfinite(spread):
        raise LearningError(f"Rewards from {lowest} to {rewards.max()} are too far apart for frontier: their difference overflows float64.")
    if spread == 0.0:
        return Advantages(np.zeros(rewards.size), beta=None, saturated=False, empty=True)
    relative = above / spread
    added = contributions(relative, k, min(base / spread, 1.0))  # a base above the best reward: nobody adds anything
    values = (1.0 - weight) * _standardised(relative) + weight * _standardised(added)
    return Advantages(values, beta=None, saturated=False, empty=not values.any())


def _standardised(values: np.ndarray) -> np.ndarray:
    """(x - mean) / population sd; 0 if all are equal."""
    if (values == values[0]).all():
        return np.zeros(values.size)
    largest = np.abs(values).max()  # scaled first: squares of tiny contributions would be 0
    scaled = values / largest
    centred = scaled - scaled.mean()
    return centred / math.sqrt(np.mean(centred**2))


def _check_beta(beta: float) -> None:
    if not (np.isfinite(beta) and beta >= 0):
        raise ConfigError(f"beta must be finite and at least 0; got {beta!r}.")


def _ties(rewards: np.ndarray) -> int:
    return int(np.count_nonzero(rewards == rewards.max()))


def _exponents(rewards: np.ndarray, beta: float) -> np.ndarray:
    """beta (r - max r): at most 0, finite or -inf, never NaN."""
    with np.errstate(over="ignore"):
        # With a finite floor, beta = 0 gives 0 instead of 0 * -inf = NaN.
        return beta * np.maximum(rewards - rewards.max(), -np.finfo(np.float64).max)


def _kl_to_uniform(rewards: np.ndarray, beta: float) -> float:
    """KL(q || uniform) in nats: log K - log sum e + sum q log e."""
    exponents = np.maximum(_exponents(rewards, beta), -1000.0)  # exp(-1000) is 0 already, and 0 * -inf would be NaN
    weights = np.exp(exponents)
    return float(math.log(rewards.size) - math.log(weights.sum()) + (weights * exponents).sum() / weights.sum())


def _leave_one_out(rewards: np.ndarray, beta: float) -> tuple[np.ndarray, bool]:
    """The advantages of `entropic_loo`, and whether Z of the best rollout is below 1e-12."""
    if rewards.size == 1:
        return np.zeros(1), False
    weights = np.exp(_exponents(rewards, beta))
    # Sum the weights before and after each rollout. The total minus the own weight would lose all digits if that weight dominates.
    before = np.concatenate([[0.0], np.cumsum(weights[:-1])])
    after = np.concatenate([np.cumsum(weights[:0:-1])[::-1], [0.0]])
    others = (before + after) / (rewards.size - 1)
    return weights / (others + _LOO_FLOOR) - 1.0, bool(others[rewards.argmax()] < _LOO_FLOOR)


ESTIMATORS: Table[Estimator] = Table(
    "advantage estimator",
    {
        "mean_baseline": mean_baseline,
        "entropic": entropic,
        "entropic_loo": entropic_loo,
        "entropic_adaptive": entropic_adaptive,
        "max_at_k": max_at_k,
        "frontier": frontier,
    },
)

SCALE_FREE = ("entropic_adaptive", "frontier")
"""Estimators whose advantages do not depend on the unit of the rewards."""


def least_rollouts(estimator: str, k: int = 1) -> int:
    """Fewest rollouts of a group for an estimator; smaller groups carry no signal.

    A single rollout cannot be compared with others. With two, `entropic_adaptive` has no solution and gives an advantage of 1e12.
    `max_at_k` needs subsets of k without the rollout, and `frontier` subsets of k with it.
    """
    return {"entropic_adaptive": 3, "max_at_k": k + 1, "frontier": max(k, 2)}.get(estimator, 2)


def estimate_groups(
    rewards_GK: Sequence[npt.ArrayLike],
    estimator: str,
    *,
    beta: float = 2.0,
    k: int = 1,
    bests_G: Sequence[float | None] | None = None,
    weight: float = 1.0,
) -> list[Advantages | None]:
    """Advantages of each group of a step; None for a group without a signal, which the update must skip.

    A group has no signal if it is constant, if it has fewer rollouts than the estimator needs (`least_rollouts`), which happens when
    duplicates were dropped, or if its advantages are empty (`Advantages.empty`).

    Args:
      rewards_GK: the rewards of each group's rollouts; groups may differ in size.
      estimator: a name in ESTIMATORS.
      beta, k, weight: see `Estimator`.
      bests_G: `best` of each group; None: no group has one.

    Raises:
      ConfigError: the estimator is unknown, or `beta` or `weight` is out of range.
      LearningError: see `is_constant`.
    """
    estimate, least = ESTIMATORS[estimator], least_rollouts(estimator, k)
    groups: list[Advantages | None] = []
    for rewards_K, best in zip(rewards_GK, bests_G or [None] * len(rewards_GK), strict=True):
        if is_constant(rewards_K) or np.size(rewards_K) < least:
            groups.append(None)
            continue
        advantages = estimate(rewards_K, beta=beta, k=k, best=best, weight=weight)
        groups.append(None if advantages.empty else advantages)
    return groups


def advantage_metrics(groups: Sequence[Advantages | None]) -> dict[str, float]:
    """Metrics of the result of `estimate_groups`.

    Returns:
      - `groups/unused_frac`: fraction of groups without a signal. The other metrics are over the groups with a signal, if there are any.
      - `advantage/mean`, `advantage/min`, `advantage/max`: over rollouts.
      - `advantage/beta` (mean over groups), `advantage/saturated_frac`: only for estimators with a beta.
      - `advantage/tied_frac`: fraction of a group that shares its best reward (mean over groups); only for estimators that count ties.
    """
    kept = [group for group in groups if group is not None]
    metrics = {"groups/unused_frac": 1.0 - len(kept) / len(groups) if groups else 0.0}
    if kept:
        values = np.concatenate([group.values_K for group in kept])
        metrics |= {"advantage/mean": float(values.mean()), "advantage/min": float(values.min()), "advantage/max": float(values.max())}
    betas = [group.beta for group in kept if group.beta is not None]
    if betas:
        metrics["advantage/beta"] = float(np.mean(betas))
        metrics["advantage/saturated_frac"] = float(np.mean([group.saturated for group in kept]))
    tied = [group.ties / group.values_K.size for group in kept if group.ties is not None]
    if tied:
        metrics["advantage/tied_frac"] = float(np.mean(tied))
    return metrics
