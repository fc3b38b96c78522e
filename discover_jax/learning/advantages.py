"""Advantages of the rollouts of one group, from their rewards; and which groups carry no signal at all.

Formulas are those of the report, section 3.3 (`entropic`, its default with beta = 2) and the plain mean baseline that it
compares with. Everything is computed on the host in float64.

A warning for readers of the report: its worked numbers for beta = 2 (section 3.3: -0.5, +4.2 and -0.6 for attempts 1, 3 and 6,
"14x more than GRPO") do not follow from the formula printed above them. With its eight scores and beta = 2 the formula gives
-0.0852, +0.7349 and -0.1385, which is 2.5 times the mean baseline's +0.29; numbers like the printed ones need beta near 7.8.
Here the formula counts.
"""

import dataclasses
from collections.abc import Sequence
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
      saturated: True when an estimator that solves for beta hit its upper bound; never for a fixed beta.
    """

    values_K: np.ndarray
    beta: float | None
    saturated: bool


class Estimator(Protocol):
    """Rewards of one group -> advantages. Every estimator takes `beta`, so that the table's entries can be exchanged."""

    def __call__(self, rewards_K: npt.ArrayLike, *, beta: float = 2.0) -> Advantages: ...


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
    if not (np.isfinite(beta) and beta >= 0):
        raise ConfigError(f"beta = {beta!r} cannot be used; the entropic estimator needs a finite number of at least 0.")
    rewards = _finite_rewards(rewards_K)
    with np.errstate(over="ignore"):
        # The floor keeps -inf away from beta = 0; exp of either is 0 or, for beta = 0, 1.
        below_best = np.maximum(rewards - rewards.max(), -np.finfo(np.float64).max)
        weights = np.exp(beta * below_best)
    return Advantages(weights / weights.mean() - 1.0, beta=float(beta), saturated=False)


ESTIMATORS: Table[Estimator] = Table("advantage estimator", {"mean_baseline": mean_baseline, "entropic": entropic})


def estimate_groups(rewards_GK: Sequence[npt.ArrayLike], estimator: str, *, beta: float = 2.0) -> list[Advantages | None]:
    """Advantages of each group of a step; None for a constant group, which is to be left out of the update.

    Args:
      rewards_GK: for each group the rewards of its rollouts; groups may differ in size.
      estimator: a name in ESTIMATORS.
      beta: inverse temperature, for estimators that have one.

    Raises:
      ConfigError: unknown estimator or impossible `beta`.
      LearningError: see `is_constant`.
    """
    estimate = ESTIMATORS[estimator]
    return [None if is_constant(rewards_K) else estimate(rewards_K, beta=beta) for rewards_K in rewards_GK]


def advantage_metrics(groups: Sequence[Advantages | None]) -> dict[str, float]:
    """Numbers to log for the result of `estimate_groups`.

    Returns:
      `groups/constant_frac` always (of all groups); `advantage/mean`, `/min`, `/max` over the rollouts of the other groups when there
      is one; `advantage/beta` (mean over groups) and `advantage/saturated_frac` when the estimator has a beta.
    """
    kept = [group for group in groups if group is not None]
    metrics = {"groups/constant_frac": 1.0 - len(kept) / len(groups) if groups else 0.0}
    if kept:
        values = np.concatenate([group.values_K for group in kept])
        metrics |= {"advantage/mean": float(values.mean()), "advantage/min": float(values.min()), "advantage/max": float(values.max())}
    betas = [group.beta for group in kept if group.beta is not None]
    if betas:
        metrics["advantage/beta"] = float(np.mean(betas))
        metrics["advantage/saturated_frac"] = float(np.mean([group.saturated for group in kept]))
    return metrics
