"""A resumed run rebuilds the same frontier from journal and checkpoint, on random searches by each parent selector."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discover_jax.archive import journal
from discover_jax.archive.archive import Archive, best_of
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.selectors import SELECTORS, USUAL_CHILDREN, kept_children, step_rng
from discover_jax.types import Attempt, Outcome, StopReason


@st.composite
def searches(draw):
    """Sizes of a search. For each program: a value (None for a failure), a text that may repeat, and whether it fits in a prompt."""
    groups, size, steps = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    value = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5]), st.floats(-1, 1))
    program = st.tuples(value, st.integers(0, 30), st.integers(0, 9).map(bool))
    programs = draw(st.lists(program, min_size=groups * size * steps, max_size=groups * size * steps))
    return groups, size, steps, iter(programs), draw(st.integers(1, 12))


def as_resumed(frontier: Frontier, rows: list[Attempt]) -> Frontier:
    """The frontier of a resumed run: from the archive of its checkpoint and the rows of its journal, both read from JSON."""
    archive = Archive.from_json(json.loads(json.dumps(frontier.archive.to_json())), frontier.archive.capacity)
    return Frontier.resumed(archive, [journal.from_json(journal.to_json(row)) for row in rows])


def parents_of(sampler: str, frontier: Frontier, groups: int, step: int):
    return SELECTORS[sampler](frontier.archive, groups, step_rng(3, step), epsilon=0.5, expansions=frontier.expansions)


@pytest.mark.parametrize("sampler", sorted(SELECTORS))
@settings(max_examples=60)
@given(searches())
def test_resumed_frontier_equals_the_uninterrupted_one(sampler, search):
    groups, size, steps, programs, capacity = search
    frontier, rows = Frontier(Archive((), capacity)), []
    for step in range(steps):
        attempts, reusable = [], set()
        for group, parent in enumerate(parents_of(sampler, frontier, groups, step)):
            for index in range(size):
                (value, text, fits), id = next(programs), f"{step:04d}-{group:03d}-{index:03d}"
                reusable |= {id} if fits else set()
                attempts.append(
                    Attempt(
                        id=id,
                        parent_id=parent.id,
                        task="boats",
                        step=step,
                        group=group,
                        index=index,
                        code=f"# {text}",
                        outcome=Outcome.EXCEPTION if value is None else Outcome.OK,
                        detail="" if value is not None else f"error of {id}",
                        stdout="",
                        score=value,
                        private_score=None,
                        reward=-1.0 if value is None else value,
                        adapter_step=step,
                        tokens=1,
                        stop=StopReason.STOP_TOKEN,
                    )
                )
        frontier = frontier.after(attempts, reusable=reusable, children=kept_children(sampler, USUAL_CHILDREN))
        rows += attempts
        resumed = as_resumed(frontier, rows)
        assert resumed == frontier
        assert parents_of(sampler, resumed, groups, step + 1) == parents_of(sampler, frontier, groups, step + 1)
        # Independently of both: the best of all, including those that fit no prompt, and each parent's errors of the last step.
        assert frontier.best == best_of(state for row in rows if (state := row.state()) is not None)
        for state in frontier.archive.states:
            on_it = [row for row in rows if row.parent_id == state.id]
            last = [row for row in on_it if row.step == on_it[-1].step]
            assert list(frontier.failures(state)) == (last if all(row.outcome is not Outcome.OK for row in last) else [])


def test_number_of_kept_children_per_parent():
    assert kept_children("puct", USUAL_CHILDREN) == 2  # the paper's
    assert kept_children("greedy", USUAL_CHILDREN) == kept_children("fixed", USUAL_CHILDREN) == 0
    assert [kept_children(sampler, children) for sampler in ("puct", "greedy") for children in (0, 3)] == [0, 3, 0, 3]
