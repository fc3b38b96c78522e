"""Parents, and how often each state was expanded: what PUCT needs to know of the past, computed from the journal."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from discover_jax.exceptions import RunError
from discover_jax.types import SEED, Attempt


@dataclasses.dataclass(frozen=True)
class Expansions:
    """A view over the whole journal. Checkpoints do not store it, since the journal reproduces it.

    Rows may be added in any batches, and more than once. A parent's row comes before its children's, so there are no cycles.

    Attributes:
      parents: id of every program with a score -> id of its parent.
      uses: (step, group) -> id of the parent that the group was built on; one entry per group, whatever its number of rollouts or failures.
      best_children: id of a parent -> best value among its direct children with a score.
    """

    parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    uses: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    best_children: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of groups so far: T of the formula."""
        return len(self.uses)

    def add(self, attempts: Iterable[Attempt]) -> "Expansions":
        """The expansions after more rows of the journal, in its order.

        Raises:
          RunError: no earlier row has a row's parent, or a row contradicts an earlier one.
        """
        parents, uses, best_children = dict(self.parents), dict(self.uses), dict(self.best_children)
        for attempt in attempts:
            group, parent = (attempt.step, attempt.group), attempt.parent_id
            if parent != SEED.id and parent not in parents:
                raise RunError(
                    f"Attempt {attempt.id!r} has the parent {parent!r}, but no earlier row of the journal has that program with"
                    " a score. Rows are missing or were altered: restore the original journal."
                )
            if uses.setdefault(group, parent) != parent:
                raise RunError(
                    f"Attempt {attempt.id!r} has the parent {parent!r}, but others of step {attempt.step}, group {attempt.group} have"
                    f" {uses[group]!r}. A group has one parent, so the journal was altered: restore the original."
                )
            if (state := attempt.state()) is None or state.value is None:
                continue
            if parents.setdefault(state.id, parent) != parent or state.id == SEED.id:
                raise RunError(f"Two programs of the journal have the id {state.id!r}, so it was altered: restore the original.")
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
                    f"The journal has no program {id!r} with a score, so its ancestors are unknown. Restore the journal of this run."
                )
            id = self.parents[id]
            chain.append(id)
        return chain

    def counts(self) -> Mapping[str, int]:
        """How often each state was expanded: n of the formula. A group counts once for its parent and for each of its ancestors."""
        counts: collections.Counter[str] = collections.Counter()
        for parent, uses in collections.Counter(self.uses.values()).items():
            for id in (parent, *self.ancestors(parent)):
                counts[id] += uses
        return counts


NO_EXPANSIONS = Expansions()
"""The expansions of a run before its first step."""
