"""The rules that are compared: how parents are selected during a search, and how its program is chosen at the end.

Every rule sees only what a run can measure. `truth` is the exception: it shows the best that any rule could do.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from landscape import FAILED, SETS, Landscape, Runs, Selector, posterior

from discover_jax.archive.posterior import Z95, Normal, difference_of_counts, estimate_prior, lower_bound, shrink

EPSILON = 0.125
FINALISTS = 16
"""Programs that run again on one further set of rows, then half of them on a second one, and so on: 16 + 8 + 4 + 2 runs."""

Values = Callable[[Runs, Landscape], np.ndarray]
"""(runs, landscape) -> what a rule takes for the score of each program [R, N]; `FAILED` for failures."""


def raw(found: Runs, landscape: Landscape) -> np.ndarray:
    """The score."""
    return found.scores(landscape.rows)[..., 0]


def shrunk(found: Runs, landscape: Landscape) -> np.ndarray:
    """The posterior mean."""
    return posterior(found, landscape.rows).mean


def truth(found: Runs, landscape: Landscape) -> np.ndarray:
    """The true score, which no run knows."""
    return np.where(found.valid_RN, landscape.truth(found.easy_RN, found.open_RN), FAILED)


def along_lineage(found: Runs, landscape: Landscape, step_of: Callable[[Normal, np.ndarray], np.ndarray]) -> np.ndarray:
    """The parent's value plus `step_of` the paired difference; programs without a parent have their score."""
    difference = difference_of_counts(found.gained_RN, found.lost_RN, landscape.rows)
    steps_RN = step_of(difference, found.parents_RN >= 0)
    values_RN, all_R = raw(found, landscape), np.arange(len(found.parents_RN))
    for i in range(values_RN.shape[1]):
        parents_R = found.parents_RN[:, i]
        child_R = (parents_R >= 0) & found.valid_RN[:, i]
        values_RN[:, i] = np.where(child_R, values_RN[all_R, parents_R] + steps_RN[:, i], values_RN[:, i])
    return values_RN


def ties(found: Runs, landscape: Landscape) -> np.ndarray:
    """The parent's value plus the paired difference if it is beyond noise; within noise, the parent's value."""
    return along_lineage(
        found, landscape, lambda difference, _: np.where(np.abs(difference.mean) > Z95 * np.sqrt(difference.variance), difference.mean, 0.0)
    )


def shrunk_steps(found: Runs, landscape: Landscape) -> np.ndarray:
    """The parent's value plus the shrunken paired difference, as if its noise were independent of the parent's."""

    def step_of(difference: Normal, child_RN: np.ndarray) -> np.ndarray:
        use = child_RN & found.valid_RN
        priors = [estimate_prior(d[of], v[of]) for d, v, of in zip(*difference, use, strict=True)]
        m, t2 = (np.array([getattr(prior, name) for prior in priors])[:, None] for name in ("mean", "variance"))
        return shrink(*difference, m, t2).mean

    return along_lineage(found, landscape, step_of)


def greedy(values: Values, landscape: Landscape) -> Selector:
    """The program with the highest value; with probability `EPSILON`, a random distinct one instead (the report's rule)."""

    def select(found: Runs, groups: int, rng: np.random.Generator) -> np.ndarray:
        runs = len(found.parents_RN)
        explore_RG, draws_RG = rng.random((runs, groups)) < EPSILON, rng.random((runs, groups))
        kept_RN = found.valid_RN & ~found.copy_RN
        best_R = np.where(kept_RN, values(found, landscape), -np.inf).argmax(axis=1)
        order_RN = np.argsort(~kept_RN, axis=1, kind="stable")  # the distinct valid programs first
        random_RG = np.take_along_axis(order_RN, (draws_RG * kept_RN.sum(axis=1, keepdims=True)).astype(int), axis=1)
        return np.where(explore_RG, random_RG, best_R[:, None])

    return select


def puct(values: Values, landscape: Landscape) -> Selector:
    """The programs with the highest PUCT scores (docs/algorithm.md), different ones for the groups of a step; ancestors are not blocked."""

    def select(found: Runs, groups: int, rng: np.random.Generator) -> np.ndarray:
        del rng
        kept_RN = found.valid_RN & ~found.copy_RN
        value_RN = np.where(kept_RN, values(found, landscape), -np.inf)
        runs, programs = value_RN.shape
        all_R, size = np.arange(runs), landscape.group_size
        best_child_RN, uses_RN = np.full(value_RN.shape, -np.inf), np.zeros(value_RN.shape)
        for i in range(programs - 1, -1, -1):  # children come after their parents
            parents_R = found.parents_RN[:, i]
            child_R = parents_R >= 0
            at = all_R[child_R], parents_R[child_R]
            best_child_RN[at] = np.maximum(best_child_RN[at], value_RN[child_R, i])
            uses_RN[at] += uses_RN[child_R, i] + 1.0 / size  # each group of a program, and of its descendants
        ranks_RN = np.argsort(np.argsort(-value_RN, axis=1, kind="stable"), axis=1)
        count_R1 = kept_RN.sum(axis=1, keepdims=True)
        prior_RN = np.where(kept_RN, count_R1 - ranks_RN, 0) / (count_R1 * (count_R1 + 1) / 2)
        low_R1 = np.where(kept_RN, value_RN, np.inf).min(axis=1, keepdims=True)
        scale_R1 = np.maximum(value_RN.max(axis=1, keepdims=True) - low_R1, 1e-6)
        quality_RN = np.where(np.isfinite(best_child_RN), best_child_RN, value_RN)
        total = programs / size
        score_RN = quality_RN + scale_R1 * prior_RN * np.sqrt(1 + total) / (1 + uses_RN)
        return np.argsort(np.where(kept_RN, -score_RN, np.inf), axis=1, kind="stable")[:, :groups]

    return select


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen program of each run, and what the rule takes for its score.

    Attributes:
      position_R: of the program.
      estimate_R: of its score.
    """

    position_R: np.ndarray
    estimate_R: np.ndarray


def highest(value_RN: np.ndarray) -> Choice:
    """The program with the highest value."""
    position_R = value_RN.argmax(axis=1)
    return Choice(position_R, value_RN[np.arange(len(value_RN)), position_R])


def finalists(found: Runs, landscape: Landscape, start: Normal | None) -> Choice:
    """Successive halving: in each round, all that are left run on one more set of rows, and the better half stays.

    Args:
      found, landscape: the search.
      start: posterior of all programs. It chooses the finalists, and their further scores are shrunk towards it. None: the raw score
        chooses them, and then only further scores count.

    Returns:
      The finalist of the last round with the highest lower bound (95%). The estimate is its mean.
    """
    kept_RN = found.valid_RN & ~found.copy_RN
    first_RN = np.where(kept_RN, raw(found, landscape) if start is None else start.mean, -np.inf)
    left_RM = np.argsort(-first_RN, axis=1, kind="stable")[:, :FINALISTS]
    scores_RNS = found.scores(landscape.rows)
    for number in range(1, SETS):
        mean_RM = np.take_along_axis(scores_RNS[..., 1 : number + 1].mean(axis=-1), left_RM, axis=1)
        estimate = Normal(mean_RM, mean_RM * (1.0 - mean_RM) / (landscape.rows * number))
        if start is not None:
            estimate = shrink(*estimate, *(np.take_along_axis(values, left_RM, axis=1) for values in start))
        last = number == SETS - 1
        by = lower_bound(estimate) if last else estimate.mean
        order_RM = np.argsort(-by, axis=1, kind="stable")[:, : 1 if last else left_RM.shape[1] // 2]
        left_RM, mean_RM = (np.take_along_axis(values, order_RM, axis=1) for values in (left_RM, estimate.mean))
    return Choice(left_RM[:, 0], mean_RM[:, 0])
