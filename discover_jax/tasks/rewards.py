"""How a score becomes a reward, and the rewards of a group what advantages use."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from discover_jax.exceptions import ConfigError


@dataclasses.dataclass(frozen=True)
class Score:
    """What a score is: its name, as prompts and summaries show it, its direction, and whether it is the share of correct rows."""

    name: str
    higher_is_better: bool
    proportion: bool = False


@dataclasses.dataclass(frozen=True)
class Transform:
    """Turns a score into a reward; a higher reward is better.

    Attributes:
      function: (score, higher_is_better) -> reward; a better score gives a higher reward.
      directions: allowed values of Metric.higher_is_better.
      at_least: lowest allowed score.
      in_group: whether advantages use the ranks of rewards in their group instead of the rewards.
    """

    function: Callable[[float, bool], float]
    directions: tuple[bool, ...]
    at_least: float = -math.inf
    in_group: bool = False


_SMALLEST = 1e-12
"""`log` raises lower scores to this, so that a perfect error of 0 has a finite reward."""


def _signed(score: float, higher: bool) -> float:
    return score if higher else -score


def _log(score: float, higher: bool) -> float:
    return _signed(math.log(max(score, _SMALLEST)), higher)


TRANSFORMS: Mapping[str, Transform] = {
    "identity": Transform(_signed, (True,)),
    "negate": Transform(_signed, (False,)),
    "inverse": Transform(lambda score, _: 1.0 / (1.0 + score), (False,), at_least=0.0),
    "log": Transform(_log, (True, False), at_least=0.0),
    "rank_in_group": Transform(_signed, (True, False), in_group=True),
}
"""By the name in Competition.transform. `identity` is the report's reward. `inverse`, 1 / (1 + score), is in (0, 1]. `log`, with the sign
of the direction, turns equal ratios of scores into equal differences of rewards, whatever the metric's scale. `rank_in_group` removes the
scale from the update."""


def ranks(rewards_K: Sequence[float]) -> list[float]:
    """Ranks of a group's rewards, from 0 for the lowest to 1 for the highest. Equal rewards share their mean rank; a group of one has 0."""
    others = max(len(rewards_K) - 1, 1)
    return [(sum(r < mine for r in rewards_K) + (sum(r == mine for r in rewards_K) - 1) / 2) / others for mine in rewards_K]


def check_rewards(refuse: Callable[[str], ConfigError], transform: str, name: str, higher_is_better: bool, failure_reward: float) -> None:
    """Checks that a transform is known and fits the direction of the score `name`, and that the reward of a failure is finite.

    Raises:
      ConfigError: made by `refuse` from the reason.
    """
    if transform not in TRANSFORMS:
        raise refuse(f"transform must be one of {', '.join(TRANSFORMS)}; got {transform!r}.")
    if higher_is_better not in TRANSFORMS[transform].directions:
        fits = [other for other, its in TRANSFORMS.items() if higher_is_better in its.directions]
        raise refuse(
            f"transform = {transform!r} does not fit {name}, where {direction_of(higher_is_better)} is better: a higher reward must be"
            f" better. Use {' or '.join(map(repr, fits))}."
        )
    if not math.isfinite(failure_reward):
        raise refuse(f"failure_reward must be finite, since advantages use it; got {failure_reward!r}.")


def direction_of(higher_is_better: bool) -> str:
    """ "higher" or "lower": which scores are better."""
    return "higher" if higher_is_better else "lower"


def reward_of(score: float, transform: str, higher_is_better: bool, failure_reward: float) -> float:
    """The reward of a score, at least that of a failure; higher is better.

    Raises:
      ConfigError: the transform is not defined for the score.
    """
    its = TRANSFORMS[transform]
    if score < its.at_least:
        raise ConfigError(
            f"{score} has no reward, since the transform {transform!r} takes scores of at least {its.at_least:g}. Use another transform."
        )
    return max(its.function(score, higher_is_better), failure_reward)


def signals_of(rewards_K: Sequence[float], transform: str) -> list[float]:
    """What advantages use: the rewards of a group, or their ranks if the transform says so."""
    return ranks(rewards_K) if TRANSFORMS[transform].in_group else list(rewards_K)
