"""How the archive ranks programs: by their scores, or by what the noise of the rows leaves of them.

- `raw`: the score (report).
- `ties`: the score, but a gain or loss within noise counts as a tie. A program whose paired difference to the ranked ancestor is within its
  95% interval takes that ancestor's value.
- `posterior`: the mean of the true score's posterior, given the scores of all programs (see `posterior.lineage_posterior`). It is computed
  again after each step, since later children say something about their parents too.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from discover_jax.archive.posterior import Normal, is_tie, lineage_posterior, priors_of_steps
from discover_jax.exceptions import RunError
from discover_jax.row_results import RowResults, decode, difference_variance
from discover_jax.types import State

RULES = ("raw", "ties", "posterior")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A scored program, as ranking needs it.

    Attributes:
      state: with its own score and reward.
      parent: place of its parent among the measured programs; -1 if it started from nothing.
      variance: of its score, from the sampling of rows; 0 without row results.
      parent_variance: of the difference to its parent's score; 0 without a parent.
      anchor: place of the program whose value it has by the rule `ties`; its own place if it has its own.
    """

    state: State
    parent: int
    variance: float
    parent_variance: float
    anchor: int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A rule with the direction of a competition's scores and their rewards.

    Attributes:
      rule: one of RULES.
      higher_is_better: of scores.
      reward: (score) -> reward.
      needs_rows: whether scores are noisy, so that each must have results of single rows.
    """

    rule: str
    higher_is_better: bool
    reward: Callable[[float], float]
    needs_rows: bool = True


@dataclasses.dataclass(frozen=True)
class Measurements:
    """All programs of a competition with a score, in the order of the journal, no two with the same text. A view over the journal.

    Attributes:
      programs: parents come before their children.
      places: id of a state, or of a copy of its program -> its place in `programs`.
    """

    programs: tuple[Measured, ...] = ()
    places: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def add(self, states: Iterable[State]) -> "Measurements":
        """With more states, whose parents are known.

        Raises:
          RunError: the results of a program's rows cannot be compared with its parent's.
        """
        programs, places = list(self.programs), dict(self.places)
        same = {(each.state.code, each.state.output): place for place, each in enumerate(programs)}
        for state in states:
            identity = state.code, state.output
            if identity not in same:
                same[identity] = len(programs)
                programs.append(_measured(state, programs, places.get(state.parent_id or "", -1)))
            places.setdefault(state.id, same[identity])
        return Measurements(tuple(programs), places)

    def values(self, ranking: Ranking) -> dict[str, float]:
        """The value of each state, and of each copy, by id.

        Raises:
          RunError: a noisy score has no results of single rows, as in the journals of earlier versions.
        """
        if ranking.needs_rows and (blind := [each.state.id for each in self.programs if not each.state.rows]):
            raise RunError(
                f"{len(blind)} programs, such as {blind[0]}, have no results of single rows: an earlier version scored them. Set"
                " config.reuse.score = 'raw', or start a new run."
            )
        if ranking.rule == "posterior":
            by_place = [ranking.reward(score) for score in self._posterior_scores(ranking.higher_is_better)]
        else:
            by_place = [_value(self.programs[each.anchor].state if ranking.rule == "ties" else each.state) for each in self.programs]
        return {id: by_place[place] for id, place in self.places.items()}

    def _posterior_scores(self, higher_is_better: bool) -> list[float]:
        """Posterior means of the true scores, in the metric's own direction."""
        sign = 1.0 if higher_is_better else -1.0
        scores = sign * np.array([each.state.score for each in self.programs], np.float64)
        parents = np.array([each.parent for each in self.programs], np.int64)
        variances, of_steps = (np.array([getattr(each, name) for each in self.programs]) for name in ("variance", "parent_variance"))
        if not variances.any():  # exact scores
            return [float(score) for score in sign * scores]
        child = parents >= 0
        # Broken programs get broad priors, also those without a parent: otherwise they would be shrunk to the level of the others.
        root = _priors(np.where(child, 0.0, scores), variances, ~child)
        step = _priors(np.where(child, scores - scores[parents], 0.0), of_steps, child)
        posterior = lineage_posterior(parents, Normal(scores, variances), of_steps, root=root, step=step)
        return [float(score) for score in sign * posterior.mean]


NO_MEASUREMENTS = Measurements()
"""The measurements before the first program."""


def _priors(measured_N: np.ndarray, variances_N: np.ndarray, which_N: np.ndarray) -> Normal:
    """The prior of each of these programs or steps, [N]; 0 for the others."""
    mean, variance = np.zeros(len(measured_N)), np.zeros(len(measured_N))
    if which_N.any():
        mean[which_N], variance[which_N] = priors_of_steps(measured_N[which_N], variances_N[which_N])
    return Normal(mean, variance)


def _measured(state: State, programs: list[Measured], parent: int) -> Measured:
    place, rows = len(programs), _rows(state)
    variance = rows.variance if rows is not None else 0.0
    if parent < 0:
        return Measured(state, parent, variance, 0.0, place)
    anchor = programs[parent].anchor
    tied = rows is not None and bool(is_tie(_score(state) - _score(programs[anchor].state), _paired(state, programs[anchor].state)))
    return Measured(state, parent, variance, _paired(state, programs[parent].state), anchor if tied else place)


def gains_over_parents(states: Iterable[State], *, higher_is_better: bool) -> tuple[int, int] | None:
    """The number of programs with a better score than their parent, and how many of these gains are beyond the noise of the rows: outside
    the 95% interval of the paired difference.

    Args:
      states: in the order of the journal, after the seed program, if there is one. Only their scores count, not their values.

    Returns:
      None if no program has results of single rows: scores are then exact, or from an earlier version.

    Raises:
      RunError: the results of a pair's rows cannot be compared.
    """
    by_id, better, beyond, sign = {}, 0, 0, 1.0 if higher_is_better else -1.0
    for state in states:
        parent = by_id.get(state.parent_id)
        if parent is not None and parent.rows and state.rows and sign * _score(state) > sign * _score(parent):
            better += 1
            beyond += not is_tie(_score(state) - _score(parent), _paired(state, parent))
        by_id[state.id] = state
    return (better, beyond) if any(state.rows for state in by_id.values()) else None


def _paired(child: State, parent: State) -> float:
    """The variance of the difference of their scores; 0 without row results, for exact scores."""
    of_child, of_parent = _rows(child), _rows(parent)
    if of_child is None or of_parent is None:
        return 0.0
    try:
        return difference_variance(of_child, of_parent, _score(child) - _score(parent))
    except ValueError as error:
        raise RunError(f"The scores of {child.id} and its ancestor {parent.id} cannot be compared: {error}.") from error


def _rows(state: State) -> RowResults | None:
    try:
        return decode(state.rows) if state.rows else None
    except ValueError as error:
        raise RunError(f"The row results of {state.id} are damaged: {error}. Restore the original journal.") from error


def _score(state: State) -> float:
    assert state.score is not None, "only graded programs are measured"
    return state.score


def _value(state: State) -> float:
    assert state.value is not None, "only graded programs are measured"
    return state.value
