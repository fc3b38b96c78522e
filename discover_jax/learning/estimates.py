"""The advantages of a step: the signals of each group, then the estimator, then one advantage for each rollout in the update."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from discover_jax.learning.advantages import Advantages, advantage_metrics, estimate_groups, is_constant, least_rollouts
from discover_jax.learning.signals import Diversity, FailureHandling, Results, Signals, diversity_metrics, group_signals, place_failures
from discover_jax.types import Attempt, RolloutKey


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step's advantages aim at; see `advantages.Estimator`.

    Attributes:
      estimator: a name in `advantages.ESTIMATORS`.
      beta: inverse temperature, for estimators that have one.
      k: size of the subsets, for `max_at_k` and `frontier`.
      weight: weight of the frontier, for `frontier`.
      failures: signals of failed attempts.
    """

    estimator: str
    beta: float = 2.0
    k: int = 1
    weight: float = 1.0
    failures: FailureHandling = dataclasses.field(default_factory=FailureHandling)

    def metrics(self) -> dict[str, float | None]:
        """The scheduled values of the step, for the estimators that use them."""
        scheduled: dict[str, float | None] = {}
        if self.estimator in ("max_at_k", "frontier"):
            scheduled["advantage/k"] = float(self.k)
        if self.estimator == "frontier":
            scheduled["advantage/frontier_weight"] = self.weight
        return scheduled


@dataclasses.dataclass(frozen=True)
class GradedGroup:
    """The attempts of a group, with what their signals depend on.

    Attributes:
      attempts_K: in order.
      to_signals: from their rewards to signals; see `Task.signals`.
      known: results of the task's archived programs and of its seed program, for copies.
      failure_reward: the task's reward of a failure.
      best: best signal before the step, for `frontier`; None: there is none.
    """

    attempts_K: Sequence[Attempt]
    to_signals: Callable[[Sequence[float]], list[float]] = list
    known: Collection[Results] = ()
    failure_reward: float = 0.0
    best: float | None = None


@dataclasses.dataclass(frozen=True)
class Estimates:
    """The advantages of a step, or of one of its waves.

    Attributes:
      advantages: of the rollouts in the update. Dropped duplicates and rollouts of groups without a signal are absent.
      too_few: number of groups whose rewards differ, but that have too few rollouts for the estimator after duplicates were dropped.
      groups: from which they were estimated.
      estimated_G: result of `estimate_groups`.
      objective, diversity: see `estimate_step`.
    """

    advantages: Mapping[RolloutKey, float]
    too_few: int
    groups: Sequence[GradedGroup]
    estimated_G: Sequence[Advantages | None]
    objective: Objective
    diversity: Diversity

    @property
    def metrics(self) -> dict[str, float | None]:
        """See `metrics.SCHEMA`."""
        attempts_GK, known_G = [group.attempts_K for group in self.groups], [group.known for group in self.groups]
        measured = diversity_metrics(attempts_GK, known_G, copy_tolerance=self.diversity.copy_tolerance)
        return advantage_metrics(self.estimated_G) | self.objective.metrics() | measured

    @classmethod
    def joined(cls, waves: "Sequence[Estimates]") -> "Estimates":
        """The estimates of a step from those of its waves, in order."""
        return cls(
            {key: value for wave in waves for key, value in wave.advantages.items()},
            sum(wave.too_few for wave in waves),
            [group for wave in waves for group in wave.groups],
            [estimated for wave in waves for estimated in wave.estimated_G],
            waves[0].objective,
            waves[0].diversity,
        )


def estimate_step(groups: Sequence[GradedGroup], *, objective: Objective, diversity: Diversity, first: int = 0) -> Estimates:
    """Computes the advantages of a step, or of one of its waves.

    Only `FailureHandling.kind` "spread" depends on the other groups of a step; the advantages of a group are otherwise its own.

    Args:
      groups: in order.
      objective: estimator, its parameters in this step, and the signals of failures.
      diversity: novelty bonus, duplicates and copies.
      first: number of the first group.

    Raises:
      ConfigError, LearningError: see `estimate_groups`.
    """
    attempts_GK = [group.attempts_K for group in groups]
    signals_G = [
        group_signals(group.attempts_K, group.to_signals, diversity, known=group.known, failure_reward=group.failure_reward)
        for group in groups
    ]
    signals_G = place_failures(signals_G, attempts_GK, objective.failures)
    estimated_G = estimate_groups(
        [_included(signals) for signals in signals_G],
        objective.estimator,
        beta=objective.beta,
        k=objective.k,
        bests_G=[group.best for group in groups],
        weight=objective.weight,
    )
    advantages = {
        (group, int(index)): float(value)
        for group, (signals, estimated) in enumerate(zip(signals_G, estimated_G, strict=True), first)
        if estimated is not None
        for index, value in zip(np.flatnonzero(signals.included_K), estimated.values_K, strict=True)
    }
    too_few = groups_with_too_few(signals_G, objective.estimator, objective.k)
    return Estimates(advantages, too_few, groups, estimated_G, objective, diversity)


def groups_with_too_few(signals_G: Sequence[Signals], estimator: str, k: int = 1) -> int:
    """Number of groups whose rewards differ, but that have fewer included rollouts than the estimator needs."""
    included_G = [_included(signals) for signals in signals_G]
    return sum(not is_constant(values_K) and len(values_K) < least_rollouts(estimator, k) for values_K in included_G)


def _included(signals: Signals) -> np.ndarray:
    return signals.values_K[signals.included_K]
