"""The advantages of a step: the signals of each group, then the estimator, then one advantage for each rollout in the update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from discover_jax.learning.advantages import LEAST_ROLLOUTS, advantage_metrics, estimate_groups, is_constant
from discover_jax.learning.signals import Diversity, Signals, diversity_metrics, group_signals
from discover_jax.types import Attempt, RolloutKey


@dataclasses.dataclass(frozen=True)
class Estimates:
    """The advantages of a step.

    Attributes:
      advantages: of the rollouts in the update. Dropped duplicates and rollouts of groups without a signal are absent.
      too_few: number of groups whose rewards differ, but that have too few rollouts for the estimator after duplicates were dropped.
      metrics: see `metrics.SCHEMA`.
    """

    advantages: Mapping[RolloutKey, float]
    too_few: int
    metrics: dict[str, float | None]


def estimate_step(
    attempts_GK: Sequence[Sequence[Attempt]],
    transforms_G: Sequence[Callable[[Sequence[float]], list[float]]],
    *,
    estimator: str,
    beta: float,
    diversity: Diversity,
) -> Estimates:
    """Computes the advantages of a step.

    Args:
      attempts_GK: attempts by group, in order.
      transforms_G: for each group, the function from its rewards to signals; see `Task.signals`.
      estimator: a name in `advantages.ESTIMATORS`.
      beta: inverse temperature, for estimators that have one.
      diversity: novelty bonus and duplicates.

    Raises:
      ConfigError, LearningError: see `estimate_groups`.
    """
    signals_G = [group_signals(attempts_K, to_signal, diversity) for attempts_K, to_signal in zip(attempts_GK, transforms_G, strict=True)]
    estimated_G = estimate_groups([_included(signals) for signals in signals_G], estimator, beta=beta)
    advantages = {
        (group, int(index)): float(value)
        for group, (signals, estimated) in enumerate(zip(signals_G, estimated_G, strict=True))
        if estimated is not None
        for index, value in zip(np.flatnonzero(signals.included_K), estimated.values_K, strict=True)
    }
    return Estimates(advantages, groups_with_too_few(signals_G, estimator), advantage_metrics(estimated_G) | diversity_metrics(attempts_GK))


def groups_with_too_few(signals_G: Sequence[Signals], estimator: str) -> int:
    """Number of groups whose rewards differ, but that have fewer included rollouts than the estimator needs."""
    included_G = [_included(signals) for signals in signals_G]
    return sum(not is_constant(values_K) and len(values_K) < LEAST_ROLLOUTS[estimator] for values_K in included_G)


def _included(signals: Signals) -> np.ndarray:
    return signals.values_K[signals.included_K]
