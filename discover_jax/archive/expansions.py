"""Who came from whom, and which states were used how often: what PUCT must know of the past, read from the journal's rows alone."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from discover_jax.exceptions import RunError
from discover_jax.types import SEED, Attempt


@dataclasses.dataclass(frozen=True)
class Expansions:
    """A view over the journal that nothing is ever evicted from. It is kept in no checkpoint, since the journal gives it again.

    Rows may come in any batches, and again: only what they say counts. A parent's row comes before its children's, so there are no cycles.

    Attributes:
      parents: id of every program with a score -> id of its parent.
      uses: (step, group) -> id of the parent that the group was built on; one for each group, however many rollouts it had or failed.
      best_children: id of a parent -> best value among its direct children with a score.
    """

    parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    uses: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    best_children: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Groups so far: T of the formula."""
        return len(self.uses)

    def add(self, attempts: Iterable[Attempt]) -> "Expansions":
        """With more rows of the journal, in its order.

        Raises:
          RunError: a row names a parent that no row before it made, or contradicts an earlier one.
        """
        parents, uses, best_children = dict(self.parents), dict(self.uses), dict(self.best_children)
        for attempt in attempts:
            place, parent = (attempt.step, attempt.group), attempt.parent_id
            if parent != SEED.id and parent not in parents:
                raise RunError(
                    f"Attempt {attempt.id!r} was built on {parent!r}, of which the journal has no program with a score before it. Rows are"
                    " missing or were altered: put the original journal back."
                )
            if uses.setdefault(place, parent) != parent:
                raise RunError(
                    f"Attempt {attempt.id!r} was built on {parent!r}, others of group {attempt.group} of step {attempt.step} on"
                    f" {uses[place]!r}; a group has one parent. The journal was altered: put the original back."
                )
            if (state := attempt.state()) is None or state.value is None:
                continue
            if parents.setdefault(state.id, parent) != parent or state.id == SEED.id:
                raise RunError(f"Two programs of the journal are called {state.id!r}. It was altered: put the original back.")
            best_children[parent] = max(best_children.get(parent, state.value), state.value)
        return Expansions(parents, uses, best_children)

    def ancestors(self, id: str) -> list[str]:
        """Ids from the parent up to the seed; none for the seed.

        Raises:
          RunError: the journal has no program of that id with a score.
        """
        chain: list[str] = []
        while id != SEED.id:
            if id not in self.parents:
                raise RunError(
                    f"The journal has no program {id!r} with a score, so nobody knows where it came from. Was another one put here?"
                )
            id = self.parents[id]
            chain.append(id)
        return chain

    def counts(self) -> Mapping[str, int]:
        """How often each state was expanded: n of the formula. A group counts once, for its parent and every ancestor of it."""
        counts: collections.Counter[str] = collections.Counter()
        for parent, uses in collections.Counter(self.uses.values()).items():
            for id in (parent, *self.ancestors(parent)):
                counts[id] += uses
        return counts


NO_EXPANSIONS = Expansions()
"""Of a run that has not begun."""
