"""The states kept for reuse, best first: a bounded view over the journal, which keeps everything."""

import bisect
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from discover_jax.exceptions import ConfigError, RunError
from discover_jax.records import from_row
from discover_jax.types import SEED, Attempt, State


@dataclasses.dataclass(frozen=True)
class Archive:
    """At most `capacity` states, from the highest value to the lowest, no two with the same code. The seed is never among them.

    Where children read what their parent returned, the same code may return other values: then states with the same code differ by these.

    Among equal values the one added earlier comes first; of two states with the same code the one added earlier stays, so that
    a lineage points to where a program was first found. States are added one after another: how they are batched makes no difference.
    """

    states: tuple[State, ...]
    capacity: int

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"The capacity of an archive must be at least 1; got {self.capacity}. Set config.reuse.capacity.")

    def add(self, states: Iterable[State]) -> "Archive":
        """The archive with more states; keeps the best `capacity`.

        Raises:
          RunError: a state without a value, such as the seed.
        """
        kept = list(self.states)
        known = {_identity(state) for state in kept}
        for state in states:
            if state.value is None:
                raise RunError(f"State {state.id!r} has no value, so the archive cannot keep it. Add only graded programs.")
            if _identity(state) in known:
                continue
            kept.insert(bisect.bisect_right(kept, -state.value, key=_descending), state)
            known.add(_identity(state))
            if len(kept) > self.capacity:
                known.remove(_identity(kept.pop()))
        return Archive(tuple(kept), self.capacity)

    def add_group(self, states: Iterable[State], *, children: int) -> "Archive":
        """The archive after one group, with at most the `children` best children of each parent, and then the best `capacity` in all.

        The limit does not count the seed's children of earlier groups. The reference code gives each group an initial state of its own;
        otherwise a whole search would descend from two programs. A copy of a kept program displaces no other program.

        Args:
          states: the scored programs of one group, which all have one parent.
          children: 0 keeps them all, and is `add`.

        Raises:
          RunError: a state without a value, or states of several parents.
        """
        states = list(states)
        parents = {state.parent_id for state in states}
        if len(parents) > 1:
            raise RunError(
                f"States of one group have the parents {sorted(map(str, parents))}; a group has one parent. Add each group separately."
            )
        if not children or not states:
            return self.add(states)
        unlike = Archive((), len(states)).add(states).states  # best first, without copies of each other
        known = {_identity(state) for state in self.states}
        fresh = [state for state in unlike if _identity(state) not in known]
        siblings = [] if parents == {SEED.id} else [state for state in self.states if {state.parent_id} == parents]
        best = {state.id for state in sorted([*siblings, *fresh], key=_descending)[:children]}
        dropped = {state.id for state in siblings} - best
        rest = tuple(state for state in self.states if state.id not in dropped)
        return Archive(rest, self.capacity).add(state for state in fresh if state.id in best)

    def revalued(self, values: Mapping[str, float]) -> "Archive":
        """The archive with other values of its states, by id, in their new order."""
        states = [dataclasses.replace(state, value=values[state.id]) for state in self.states]
        return Archive(tuple(sorted(states, key=_descending)), self.capacity)

    def to_json(self) -> list[dict[str, Any]]:
        """The states, best first, as rows for JSON; `from_json` reads them."""
        return [_row(state) for state in self.states]

    @staticmethod
    def from_json(rows: Iterable[dict[str, Any]], capacity: int) -> "Archive":
        """The archive of `to_json`; a smaller capacity drops the worst.

        Raises:
          RunError: a row is not a state.
        """
        try:
            states = [from_row(State, row) for row in rows]
        except (ValueError, TypeError) as error:
            raise RunError(
                f"A row of the archive cannot be read: {error}. Another version wrote the checkpoint, or it was altered."
            ) from error
        return Archive((), capacity).add(states)


def _row(state: State) -> dict[str, Any]:
    """A state as a row, without row results if there are none, so that archives of problems and of earlier versions have equal rows."""
    row = dataclasses.asdict(state)
    if not state.rows:
        del row["rows"]
    return row


def _identity(state: State) -> tuple[str, str]:
    """What no two states of an archive share."""
    return state.code, state.output


def _descending(state: State) -> float:
    assert state.value is not None, "only graded programs are compared"
    return -state.value


def best_of(states: Iterable[State]) -> State | None:
    """The state with the highest value, the first among equals; None if there are no states. All states must have values."""
    return min(states, key=_descending, default=None)


def lineage(attempts: Iterable[Attempt], id: str) -> list[State]:
    """The ancestors of a state and the state itself, oldest first, without the seed.

    Args:
      attempts: rows of the journal. The list starts after the last ancestor that they lack.
      id: of the state. The list is empty if no attempt with a score has it.
    """
    states = {attempt.id: state for attempt in attempts if (state := attempt.state()) is not None}
    chain: list[State] = []
    current = states.get(id)
    while current is not None:
        chain.append(current)
        if len(chain) > len(states):
            raise RunError(f"The ancestors of {id!r} form a cycle, so the journal was altered. Restore the original journal.")
        current = states.get(current.parent_id) if current.parent_id is not None else None
    return chain[::-1]
