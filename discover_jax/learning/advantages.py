"""Advantages of the rollouts of one group, from their rewards; and which groups carry no signal at all.

Formulas are those of the report, section 3.3 (`entropic`, its default with beta = 2), the plain mean baseline that it compares with, and
the two of *Learning to Discover at Test Time* (arXiv 2601.16175) and its reference code: `entropic_loo`, whose baseline leaves a rollout's
own weight out, and `entropic_adaptive` (the paper's default), which besides finds a beta for each group. Everything is computed on the host
in float64.

A warning for readers of the report: its worked numbers for beta = 2 (section 3.3: -0.5, +4.2 and -0.6 for attempts 1, 3 and 6,
"14x more than GRPO") do not follow from the formula printed above them. With its eight scores and beta = 2 the formula gives
-0.0852, +0.7349 and -0.1385, which is 2.5 times the mean baseline's +0.29; numbers like the printed ones need beta near 7.8.
Here the formula counts.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.learning.tables import Table


@dataclasses.dataclass(frozen=True)
class Advantages:
    """What an estimator makes of one group's rewards.

    Attributes:
      values_K: float64, one advantage a rollout.
      beta: inverse temperature that was used; None if the estimator has none.
      saturated: True when a numerical limit decided: see each estimator.
      ties: how many rollouts share the best reward, for the estimators that saturate by them; None for the others.
    """

    values_K: np.ndarray
    beta: float | None
    saturated: bool
    ties: int | None = None


class Estimator(Protocol):
    """Rewards of one group -> advantages. Every estimator takes `beta`, so that the table's entries can be exchanged."""

    def __call__(self, rewards_K: npt.ArrayLike, *, beta: float = 2.0) -> Advantages: ...


KL_TARGET = math.log(2.0)
"""Nats between the weights of `entropic_adaptive` and the uniform ones (paper)."""

_BETA_BOUND = 1e6  # doubling from 1 stops at 2^20, the first power of two above it
_BISECTIONS = 60
_KL_TOLERANCE = 1e-9
_LOO_FLOOR = 1e-12


def _finite_rewards(rewards_K: npt.ArrayLike) -> np.ndarray:
    rewards = np.asarray(rewards_K, dtype=np.float64)
    if rewards.ndim != 1 or rewards.size == 0:
        raise LearningError(
            f"Rewards of a group have shape {rewards.shape}; they must be one axis with a reward for each of at least one rollout."
        )
    if not np.isfinite(rewards).all():
        at = np.flatnonzero(~np.isfinite(rewards)).tolist()
        raise LearningError(
            f"Rewards {rewards[at].tolist()} at positions {at} of a group of {rewards.size} are not finite. Advantages need finite"
            " rewards: let the task's reward() map such scores to its failure reward."
        )
    return rewards


def is_constant(rewards_K: npt.ArrayLike) -> bool:
    """True when all rewards of a group are equal, so that no estimator finds a signal in it. A group of one always is.

    Equality is exact: the same program gets the same score to the last bit, and any other difference is the estimators' to weigh.

    Raises:
      LearningError: the rewards are empty, not one-dimensional, or not finite.
    """
    rewards = _finite_rewards(rewards_K)
    return bool((rewards == rewards[0]).all())


def mean_baseline(rewards_K: npt.ArrayLike, *, beta: float = 2.0) -> Advantages:
    """A_i = r_i - mean(r), without division by the standard deviation. There is no temperature, so `beta` has no effect.

    Raises:
      LearningError: the rewards are empty, not one-dimensional, not finite, or so far apart that a difference overflows float64.
    """
    del beta
    rewards = _finite_rewards(rewards_K)
    with np.errstate(over="ignore"):
        values = rewards - np.sum(rewards / rewards.size)  # the sum of the quotients cannot overflow where the sum could
    if not np.isfinite(values).all():
        raise LearningError(
            f"Rewards from {rewards.min()} to {rewards.max()} are too far apart for mean_baseline: a difference overflows float64."
            " Use a reward transform that bounds them."
        )
    return Advantages(values, beta=None, saturated=False)


def entropic(rewards_K: npt.ArrayLike, *, beta: float = 2.0) -> Advantages:
    """w_i = exp(beta r_i) / mean_j exp(beta r_j); A_i = w_i - 1 (report, section 3.3). Sums to zero; lies in [-1, K - 1].

    The largest reward is subtracted first, which changes no weight, so no finite reward overflows.

    Raises:
      ConfigError: `beta` is negative or not finite.
      LearningError: the rewards are empty, not one-dimensional, or not finite.
    """
    _check_beta(beta)
    weights = np.exp(_exponents(_finite_rewards(rewards_K), beta))
    return Advantages(weights / weights.mean() - 1.0, beta=float(beta), saturated=False)


def entropic_loo(rewards_K: npt.ArrayLike, *, beta: float = 2.0) -> Advantages:
    """e_i = exp(beta (r_i - max r)); Z_i = mean of the other rollouts' e; A_i = e_i / (Z_i + 1e-12) - 1 (reference code of the paper).

    Does not sum to zero. A group of one gets 0. No finite reward overflows, but a best rollout whose others all weigh less than the 1e-12
    gets an advantage of the order of 1e12, which is then the constant's doing: that is reported as saturated.

    Raises:
      ConfigError: `beta` is negative or not finite.
      LearningError: the rewards are empty, not one-dimensional, or not finite.
    """
    _check_beta(beta)
    rewards = _finite_rewards(rewards_K)
    values, floored = _leave_one_out(rewards, beta)
    return Advantages(values, beta=float(beta), saturated=floored, ties=_ties(rewards))


def entropic_adaptive(rewards_K: npt.ArrayLike, *, beta: float = 2.0) -> Advantages:
    """`entropic_loo` with the beta for which KL(q || uniform) = ln 2, q being the weights exp(beta r) scaled to sum 1 (paper's default).

    The search for beta is the reference code's: hi = 1 is doubled until its KL is at least ln 2 or it has passed 1e6, then the interval
    from 0 to hi is halved 60 times. There is no solution when at least half of the group shares the best reward, since the KL then stays
    below ln 2 for every beta: such a group takes 2^20 (by that rule, since at exactly half rounding would decide). `saturated` says so, and
    also that rewards lie so close together or so far apart that the search ended with a KL off ln 2 by more than 1e-9.

    Beware of groups of two: one of them is half of the group, so the better one always gets the 1e12 of `entropic_loo`. `estimate_groups`
    therefore leaves groups of fewer than `LEAST_ROLLOUTS` out.

    Args:
      rewards_K: as for the others.
      beta: not used, since it is solved for. `Advantages.beta` has what was found; 0 for a group of one.

    Raises:
      LearningError: the rewards are empty, not one-dimensional, or not finite.
    """
    del beta
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


def _check_beta(beta: float) -> None:
    if not (np.isfinite(beta) and beta >= 0):
        raise ConfigError(f"beta = {beta!r} cannot be used; the entropic estimators need a finite number of at least 0.")


def _ties(rewards: np.ndarray) -> int:
    return int(np.count_nonzero(rewards == rewards.max()))


def _exponents(rewards: np.ndarray, beta: float) -> np.ndarray:
    """beta (r - max r): at most 0, and finite or -inf, never NaN."""
    with np.errstate(over="ignore"):
        # The floor keeps -inf away from beta = 0; exp of either is 0 or, for beta = 0, 1.
        return beta * np.maximum(rewards - rewards.max(), -np.finfo(np.float64).max)


def _kl_to_uniform(rewards: np.ndarray, beta: float) -> float:
    """KL(q || uniform) in nats: log K - log sum e + sum q log e."""
    exponents = np.maximum(_exponents(rewards, beta), -1000.0)  # exp is 0 long before, and 0 * -inf would be NaN
    weights = np.exp(exponents)
    return float(math.log(rewards.size) - math.log(weights.sum()) + (weights * exponents).sum() / weights.sum())


def _leave_one_out(rewards: np.ndarray, beta: float) -> tuple[np.ndarray, bool]:
    """The advantages of `entropic_loo`, and whether 1e-12 outweighs the others of the best."""
    if rewards.size == 1:
        return np.zeros(1), False
    weights = np.exp(_exponents(rewards, beta))
    # Sums before and after each place: the total minus one's own weight would lose all digits where that weight dominates.
    before = np.concatenate([[0.0], np.cumsum(weights[:-1])])
    after = np.concatenate([np.cumsum(weights[:0:-1])[::-1], [0.0]])
    others = (before + after) / (rewards.size - 1)
    return weights / (others + _LOO_FLOOR) - 1.0, bool(others[rewards.argmax()] < _LOO_FLOOR)


ESTIMATORS: Table[Estimator] = Table(
    "advantage estimator",
    {"mean_baseline": mean_baseline, "entropic": entropic, "entropic_loo": entropic_loo, "entropic_adaptive": entropic_adaptive},
)

LEAST_ROLLOUTS: Mapping[str, int] = {"mean_baseline": 2, "entropic": 2, "entropic_loo": 2, "entropic_adaptive": 3}
"""By the estimator: groups of fewer rollouts carry no signal for it. One alone has nothing to be compared with; of two the better one is
half of the group, for which no beta solves `entropic_adaptive`'s equation, and what it does then is an advantage of 1e12."""


def estimate_groups(rewards_GK: Sequence[npt.ArrayLike], estimator: str, *, beta: float = 2.0) -> list[Advantages | None]:
    """Advantages of each group of a step; None for one without a signal, which is to be left out of the update.

    Such a group is constant, or has fewer rollouts than the estimator needs (`LEAST_ROLLOUTS`), as one may have whose copies were dropped.

    Args:
      rewards_GK: for each group the rewards of its rollouts; groups may differ in size.
      estimator: a name in ESTIMATORS.
      beta: inverse temperature, for estimators that have one.

    Raises:
      ConfigError: unknown estimator or impossible `beta`.
      LearningError: see `is_constant`.
    """
    estimate = ESTIMATORS[estimator]
    return [
        None if is_constant(rewards_K) or np.size(rewards_K) < LEAST_ROLLOUTS[estimator] else estimate(rewards_K, beta=beta)
        for rewards_K in rewards_GK
    ]


def advantage_metrics(groups: Sequence[Advantages | None]) -> dict[str, float]:
    """Numbers to log for the result of `estimate_groups`.

    Returns:
      `groups/unused_frac` always (of all groups); `advantage/mean`, `/min`, `/max` over the rollouts of the other groups when there
      is one; `advantage/beta` (mean over groups) and `advantage/saturated_frac` when the estimator has a beta; `advantage/tied_frac`, the
      part of a group that shares its best reward (mean over groups), when the estimator counts ties.
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
