"""What a run knows about one competition: the archive, how often each state was expanded, the best state, and the last failures."""

import dataclasses
import itertools
from collections.abc import Container, Iterable, Mapping, Sequence

from discover_jax.archive.archive import Archive, best_of
from discover_jax.archive.expansions import NO_EXPANSIONS, Expansions
from discover_jax.archive.ranking import NO_MEASUREMENTS, Measurements, Ranking
from discover_jax.types import SEED, Attempt, Outcome, State


@dataclasses.dataclass(frozen=True)
class Frontier:
    """A view over one competition's rows of the journal, together with its archive, which keeps only programs that fit into a prompt.

    Attributes:
      archive: states that may become parents.
      expansions: which states were expanded, and the best value among their children.
      best: the best state, even if it does not fit into a prompt; None before the first score.
      last_children: id of a parent -> attempts of the last step that built on it.
      seed: where the search starts: the empty seed, or a seed program with its score.
      ranking: how programs are ranked; None: by their rewards.
      measurements: all programs with a score, for a ranking that needs them; otherwise empty.
    """

    archive: Archive
    expansions: Expansions = NO_EXPANSIONS
    best: State | None = None
    last_children: Mapping[str, Sequence[Attempt]] = dataclasses.field(default_factory=dict)
    seed: State = SEED
    ranking: Ranking | None = None
    measurements: Measurements = NO_MEASUREMENTS

    @staticmethod
    def start(capacity: int, *, seed: State = SEED, ranking: Ranking | None = None) -> "Frontier":
        """The frontier before the first step."""
        measurements = NO_MEASUREMENTS.add([seed]) if ranking is not None and seed.value is not None else NO_MEASUREMENTS
        return Frontier(Archive((), capacity), seed=seed, ranking=ranking, measurements=measurements)

    @staticmethod
    def resumed(archive: Archive, attempts: Iterable[Attempt], *, seed: State = SEED, ranking: Ranking | None = None) -> "Frontier":
        """The frontier of the journal's rows, in their order, with the archive of a checkpoint.

        Raises:
          RunError: the rows contradict each other.
        """
        frontier, states = Frontier(archive, seed=seed), []
        for _, of_step in itertools.groupby(attempts, key=lambda attempt: attempt.step):
            rows = list(of_step)
            states += states_of(rows)
            frontier = dataclasses.replace(frontier._seen(rows), archive=archive)
        if ranking is None:
            return frontier
        measurements = Frontier.start(archive.capacity, seed=seed, ranking=ranking).measurements.add(states)
        return dataclasses.replace(frontier, ranking=ranking, measurements=measurements)._revalued(measurements.values(ranking))

    def after(self, attempts: Sequence[Attempt], *, reusable: Container[str], children: int) -> "Frontier":
        """The frontier after a step.

        Args:
          attempts: of the step, on this competition, by group.
          reusable: ids of the states that may become parents because their programs fit into a prompt.
          children: number of best children of each parent that the archive keeps; 0: all.

        Raises:
          RunError: the attempts contradict earlier ones.
        """
        seen, values = self._seen(attempts), None
        if seen.ranking is not None:
            values = seen.measurements.values(seen.ranking)
            seen = seen._revalued(values)
        archive = seen.archive
        for _, of_group in itertools.groupby(attempts, key=lambda attempt: attempt.group):
            states = [state for state in states_of(of_group) if state.id in reusable]
            if values is not None:
                states = [dataclasses.replace(state, value=values[state.id]) for state in states]
            archive = archive.add_group(states, children=children)
        return dataclasses.replace(seen, archive=archive)

    def _seen(self, attempts: Sequence[Attempt]) -> "Frontier":
        by_parent: dict[str, list[Attempt]] = {}
        for attempt in attempts:
            by_parent.setdefault(attempt.parent_id, []).append(attempt)
        frontier = dataclasses.replace(self, expansions=self.expansions.add(attempts), last_children={**self.last_children, **by_parent})
        states = states_of(attempts)
        if self.ranking is None:
            known = [] if self.best is None else [self.best]
            return dataclasses.replace(frontier, best=best_of([*known, *states]))
        return dataclasses.replace(frontier, measurements=self.measurements.add(states))

    def _revalued(self, values: Mapping[str, float]) -> "Frontier":
        """With the values that all programs have by the ranking now, by id."""
        best_children: dict[str, float] = {}
        for id, parent in self.expansions.parents.items():
            best_children[parent] = max(best_children.get(parent, values[id]), values[id])
        found = [each.state for each in self.measurements.programs if not each.state.is_seed]
        best = best_of(dataclasses.replace(state, value=values[state.id]) for state in found)
        return dataclasses.replace(
            self,
            archive=self.archive.revalued(values),
            expansions=dataclasses.replace(self.expansions, best_children=best_children),
            best=best,
            seed=dataclasses.replace(self.seed, value=values[SEED.id]) if self.seed.value is not None else self.seed,
        )

    def failures(self, parent: State) -> Sequence[Attempt]:
        """The last attempts on a parent if all of them failed, so that the prompt can show an error; otherwise empty."""
        children = self.last_children.get(parent.id, ())
        return children if all(child.outcome is not Outcome.OK for child in children) else ()


def states_of(attempts: Iterable[Attempt]) -> list[State]:
    """The states of the attempts that have a score."""
    return [state for attempt in attempts if (state := attempt.state()) is not None]
