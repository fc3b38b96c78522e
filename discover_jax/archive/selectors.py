"""Parent selectors: which states the groups of a step build on."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from discover_jax.archive.archive import Archive
from discover_jax.archive.expansions import NO_EXPANSIONS, Expansions
from discover_jax.archive.frontier import Frontier
from discover_jax.exceptions import RunError
from discover_jax.types import SEED, State


class ParentSelector(Protocol):
    """(archive, groups, rng) -> one parent for each group. Every selector takes all keywords, so that the table's entries are exchangeable.

    Args:
      archive: the states that may become parents, in addition to the seed.
      groups: number of groups in the step.
      rng: generator of the step, see `step_rng`.
      epsilon: for greedy.
      exploration: c of puct.
      expansions: of all earlier steps, for puct.
      seed: where the search starts: with nothing, or with a seed program.
    """

    def __call__(
        self,
        archive: Archive,
        groups: int,
        rng: np.random.Generator,
        *,
        epsilon: float = 0.125,
        exploration: float = 1.0,
        expansions: Expansions = NO_EXPANSIONS,
        seed: State = SEED,
    ) -> list[State]: ...


# Keeps these draws apart from every other use of the run's seed.
_STREAM = 0x5A3B1E

_LEAST_SCALE = 1e-6


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one step's draws. It depends only on seed and step, so a resumed run makes the same draws."""
    return np.random.default_rng([_STREAM, seed, step])


def greedy(
    archive: Archive,
    groups: int,
    rng: np.random.Generator,
    *,
    epsilon: float = 0.125,
    exploration: float = 1.0,
    expansions: Expansions = NO_EXPANSIONS,
    seed: State = SEED,
) -> list[State]:
    """The best state with probability 1 - epsilon, else a uniformly random one of the kept (the best among them); each group by itself.

    The report's default, with epsilon 0.125. An empty archive gives the seed. A seed program counts as a kept state.
    """
    del exploration, expansions
    states = _ranked(archive, seed)
    # Every group takes the same number of draws in either case, so that epsilon changes no other group's choice.
    explore_G = rng.random(groups) < epsilon
    choice_G = rng.integers(max(len(states), 1), size=groups)
    if not states:
        return [seed] * groups
    return [states[choice if explore else 0] for explore, choice in zip(explore_G, choice_G, strict=True)]


def fixed(
    archive: Archive,
    groups: int,
    rng: np.random.Generator,
    *,
    epsilon: float = 0.125,
    exploration: float = 1.0,
    expansions: Expansions = NO_EXPANSIONS,
    seed: State = SEED,
) -> list[State]:
    """Always the seed, i.e. no reuse; with a search this is best-of-N."""
    del archive, rng, epsilon, exploration, expansions
    return [seed] * groups


def puct(
    archive: Archive,
    groups: int,
    rng: np.random.Generator,
    *,
    epsilon: float = 0.125,
    exploration: float = 1.0,
    expansions: Expansions = NO_EXPANSIONS,
    seed: State = SEED,
) -> list[State]:
    """The states of the highest `puct_scores`, no two of them ancestor and descendant while there are others (paper's default, c = 1).

    A pick blocks its ancestors and descendants. When all that is left is blocked, the best of it is unblocked and a new round begins, in
    which only new picks block; and when everything was picked, the picks are repeated in their order. So the batch is always full, and
    the first step's groups all get the seed. Equal scores go to the higher value, then to the state found earlier; nothing is random.

    Its archive is filled by `Archive.add_group` with `children=2`, unless another number is asked for: see `kept_children`.

    Raises:
      RunError: `expansions` does not know a state of the archive.
    """
    del rng, epsilon
    candidates = _candidates(archive, seed)
    scores = puct_scores(archive, expansions, exploration, seed)
    # The order of candidates breaks what is left of ties; a seed without a value comes last in it.
    values = [-np.inf if state.value is None else state.value for state in candidates]
    waiting = [candidates[i] for i in sorted(range(len(candidates)), key=lambda i: (-scores[i], -values[i]))]
    ancestors = {state.id: set(expansions.ancestors(state.id)) for state in candidates}
    picks: list[State] = []
    while waiting and len(picks) < groups:
        blocked: list[State] = []
        chosen: set[str] = set()
        above: set[str] = set()
        for state in waiting:
            if state.id in above or ancestors[state.id] & chosen:
                blocked.append(state)
            else:
                picks.append(state)
                chosen.add(state.id)
                above |= ancestors[state.id]
        waiting = blocked
    return list(itertools.islice(itertools.cycle(picks), groups))


def _ranked(archive: Archive, seed: State) -> list[State]:
    """The archive's states and, if it has a value, the seed, best first; the seed is the first among equals, since it came first."""
    if seed.value is None:
        return list(archive.states)
    value = seed.value
    better = [state for state in archive.states if state.value is not None and state.value > value]
    return [*better, seed, *archive.states[len(better) :]]


def _candidates(archive: Archive, seed: State) -> list[State]:
    """The archive's states and the seed, best first; a seed without a value comes last."""
    return _ranked(archive, seed) if seed.value is not None else [*archive.states, seed]


def puct_scores(archive: Archive, expansions: Expansions, exploration: float = 1.0, seed: State = SEED) -> list[float]:
    """Q + c scale P sqrt(1 + T) / (1 + n) of the archive's states and the seed, best first (paper; reference code).

    Q is the best value among a state's direct children, kept or not, or its own value while it has none. P = (N - rank) / sum (N - rank)
    over the N candidates, rank 0 being the best. The scale is the distance between the best and the worst value in the archive, at least
    1e-6. n and T count groups (see `Expansions`). A seed without a value ranks last, and without children its score is -inf.

    Raises:
      RunError: `expansions` does not know a state of the archive.
    """
    for state in archive.states:
        if expansions.parents.get(state.id) != state.parent_id:
            raise RunError(
                f"The archive has the state {state.id!r} with the parent {state.parent_id!r}; the journal gives it"
                f" {expansions.parents.get(state.id)!r}. The two do not belong together: puct needs all rows of the archive's journal."
            )
    candidates = _candidates(archive, seed)
    values = [state.value for state in candidates if state.value is not None]
    scale = min(max(values[0] - values[-1], _LEAST_SCALE), sys.float_info.max) if values else _LEAST_SCALE
    counts = expansions.counts()
    explored = exploration * scale * (1 + expansions.total) ** 0.5
    ranks = len(candidates) * (len(candidates) + 1) / 2
    scores = []
    for rank, state in enumerate(candidates):
        known = expansions.best_children.get(state.id, state.value)
        prior = (len(candidates) - rank) / ranks
        scores.append(-np.inf if known is None else known + explored * prior / (1 + counts.get(state.id, 0)))
    return scores


SELECTORS: dict[str, ParentSelector] = {"greedy": greedy, "fixed": fixed, "puct": puct}
"""By the name in config.reuse.sampler."""

USUAL_CHILDREN = -1
"""Value of config.reuse.children that leaves the number to the selector."""


def kept_children(selector: str, children: int) -> int:
    """Number of best children of a parent that the archive keeps, as `Archive.add_group` takes it; 0 keeps all.

    For puct the usual number is part of its definition, 2 (paper; reference code). The other selectors keep all.

    Args:
      selector: a name in SELECTORS.
      children: of the config: USUAL_CHILDREN, or a number that overrides it.
    """
    if children != USUAL_CHILDREN:
        return children
    return 2 if selector == "puct" else 0


def fresh_groups(fresh: float, groups: int) -> int:
    """Number of groups that start from nothing: the share `fresh` of `groups`, rounded half up."""
    return math.floor(fresh * groups + 0.5)


def diversify_parents(
    parents: Sequence[State], archive: Archive, *, fresh: float = 0.0, distinct: bool = False, seed: State = SEED
) -> list[State]:
    """Replaces some of a selector's parents for variety; the number of parents stays the same.

    Args:
      parents: one for each group.
      archive: the archive that they were selected from.
      fresh: share of the groups, rounded, that start from the seed instead: the last ones.
      distinct: replace a parent that an earlier group already has by the best state of the archive that no group has, while there is one.
    """
    picks = list(parents)
    if distinct:
        others = iter([state for state in archive.states if state not in picks])
        seen: set[str] = set()
        for group, state in enumerate(picks):
            if state.id in seen and (other := next(others, None)) is not None:
                picks[group] = other
            seen.add(picks[group].id)
    kept = len(picks) - fresh_groups(fresh, len(picks))
    return [*picks[:kept], *[seed] * (len(picks) - kept)]


@dataclasses.dataclass(frozen=True)
class ReuseSettings:
    """How parents are selected; `config.reuse` explains each setting.

    Attributes:
      selector: a name in SELECTORS.
      epsilon, exploration: see `ParentSelector`.
      fresh, distinct: see `diversify_parents`.
    """

    selector: str
    epsilon: float
    exploration: float
    fresh: float
    distinct: bool


def select_parents(
    competitions_G: Sequence[str], frontiers: Mapping[str, Frontier], settings: ReuseSettings, rng: np.random.Generator
) -> list[State]:
    """The parent of each group, from the archive of its competition.

    Args:
      competitions_G: id of each group's competition.
      frontiers: by competition id.
      settings: selector and its options.
      rng: generator of the step, see `step_rng`.
    """
    selected: dict[str, Iterator[State]] = {}
    for id in dict.fromkeys(competitions_G):
        frontier = frontiers[id]
        parents = SELECTORS[settings.selector](
            frontier.archive,
            competitions_G.count(id),
            rng,
            epsilon=settings.epsilon,
            exploration=settings.exploration,
            expansions=frontier.expansions,
            seed=frontier.seed,
        )
        variety = {"fresh": settings.fresh, "distinct": settings.distinct, "seed": frontier.seed}
        selected[id] = iter(diversify_parents(parents, frontier.archive, **variety))
    return [next(selected[id]) for id in competitions_G]
