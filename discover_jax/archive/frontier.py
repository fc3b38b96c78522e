"""What a run knows about one competition: the archive, how often each state was expanded, the best state, and the last failures."""

import dataclasses
import itertools
from collections.abc import Container, Iterable, Mapping, Sequence

from discover_jax.archive.archive import Archive, best_of
from discover_jax.archive.expansions import NO_EXPANSIONS, Expansions
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
    """

    archive: Archive
    expansions: Expansions = NO_EXPANSIONS
    best: State | None = None
    last_children: Mapping[str, Sequence[Attempt]] = dataclasses.field(default_factory=dict)
    seed: State = SEED

    @staticmethod
    def resumed(archive: Archive, attempts: Iterable[Attempt]) -> "Frontier":
        """The frontier of the journal's rows, in their order, with the archive of a checkpoint.

        Raises:
          RunError: the rows contradict each other.
        """
        frontier = Frontier(archive)
        for _, of_step in itertools.groupby(attempts, key=lambda attempt: attempt.step):
            frontier = dataclasses.replace(frontier._seen(list(of_step)), archive=archive)
        return frontier

    def after(self, attempts: Sequence[Attempt], *, reusable: Container[str], children: int) -> "Frontier":
        """The frontier after a step.

        Args:
          attempts: of the step, on this competition, by group.
          reusable: ids of the states that may become parents because their programs fit into a prompt.
          children: number of best children of each parent that the archive keeps; 0: all.

        Raises:
          RunError: the attempts contradict earlier ones.
        """
        archive = self.archive
        for _, of_group in itertools.groupby(attempts, key=lambda attempt: attempt.group):
            archive = archive.add_group([state for state in states_of(of_group) if state.id in reusable], children=children)
        return dataclasses.replace(self._seen(attempts), archive=archive)

    def _seen(self, attempts: Sequence[Attempt]) -> "Frontier":
        by_parent: dict[str, list[Attempt]] = {}
        for attempt in attempts:
            by_parent.setdefault(attempt.parent_id, []).append(attempt)
        known = [] if self.best is None else [self.best]
        return Frontier(
            archive=self.archive,
            expansions=self.expansions.add(attempts),
            best=best_of([*known, *states_of(attempts)]),
            last_children={**self.last_children, **by_parent},
            seed=self.seed,
        )

    def failures(self, parent: State) -> Sequence[Attempt]:
        """The last attempts on a parent if all of them failed, so that the prompt can show an error; otherwise empty."""
        children = self.last_children.get(parent.id, ())
        return children if all(child.outcome is not Outcome.OK for child in children) else ()


def states_of(attempts: Iterable[Attempt]) -> list[State]:
    """The states of the attempts that have a score."""
    return [state for attempt in attempts if (state := attempt.state()) is not None]
