"""PUCT by hand, against a naive count over the journal, and on random searches: batches, lineages, bounds, resuming."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discover_jax.archive import journal
from discover_jax.archive.archive import Archive, best_of, lineage
from discover_jax.archive.expansions import NO_EXPANSIONS, Expansions
from discover_jax.archive.selectors import SELECTORS, puct, puct_scores, step_rng
from discover_jax.exceptions import RunError
from discover_jax.types import SEED, Attempt, Outcome, StopReason


def attempt(id, parent, value, step, group, code=None) -> Attempt:
    """An attempt; a value of None is a failure."""
    return Attempt(
        id=id,
        parent_id=parent,
        task="boats",
        step=step,
        group=group,
        index=0,
        code=code or f"# {id}",
        outcome=Outcome.EXCEPTION if value is None else Outcome.OK,
        detail="",
        stdout="",
        score=value,
        private_score=None,
        reward=-1.0 if value is None else value,
        adapter_step=step,
        tokens=1,
        stop=StopReason.STOP_TOKEN,
    )


HISTORY = [
    attempt("a", "seed", 0.5, 0, 0),
    attempt("b", "seed", 0.3, 0, 0),
    attempt("c", "seed", 0.4, 0, 1),
    attempt("x", "seed", None, 0, 1),
    attempt("d", "a", 0.7, 1, 0),
    attempt("e", "a", 0.2, 1, 0),
    attempt("y", "c", None, 1, 1),
]
"""Two groups from the seed, then one from a and one from c. The last has no valid program."""


def archive_of(attempts, capacity=100):
    return Archive((), capacity).add(state for a in attempts if (state := a.state()) is not None)


def test_scores_by_hand():
    """N = 6, sum of N - rank = 21, scale = 0.7 - 0.2, T = 4 groups; n: seed 4, a 1, c 1. The best children of seed and a are a and d."""
    root = np.sqrt(5)
    expected = {
        "d": 0.7 + 0.5 * 6 / 21 * root,
        "a": 0.7 + 0.5 * 5 / 21 * root / 2,
        "c": 0.4 + 0.5 * 4 / 21 * root / 2,  # expanded without success: its own value, a smaller bonus
        "b": 0.3 + 0.5 * 3 / 21 * root,
        "e": 0.2 + 0.5 * 2 / 21 * root,
        "seed": 0.5 + 0.5 * 1 / 21 * root / 5,
    }
    assert expected["d"] == pytest.approx(1.019438)
    assert expected["seed"] == pytest.approx(0.510648)
    archive, expansions = archive_of(HISTORY), Expansions().add(HISTORY)
    assert dict(zip([*(s.id for s in archive.states), "seed"], puct_scores(archive, expansions), strict=True)) == pytest.approx(expected)
    twice = puct_scores(archive, expansions, exploration=2.0)
    once, none = puct_scores(archive, expansions), puct_scores(archive, expansions, exploration=0.0)
    assert none == [0.7, 0.7, 0.4, 0.3, 0.2, 0.5]
    np.testing.assert_allclose(np.subtract(twice, once), np.subtract(once, none))


def test_batch_by_hand():
    """Score order: d, a, seed, c, b, e. d blocks a and the seed, so c, b and e follow. Then a blocks the seed. Then all repeats."""
    archive, expansions = archive_of(HISTORY), Expansions().add(HISTORY)
    for groups in range(1, 10):
        picks = puct(archive, groups, step_rng(0, 2), expansions=expansions)
        assert "".join(s.id[0] for s in picks) == "dcbeasdcb"[:groups]


def test_seed_with_the_best_score_blocks_everything():
    """The only group of a has low values, so Q of a falls to 0.1. The seed, whose best child is a, leads."""
    rows = [attempt("a", "seed", 0.5, 0, 0), attempt("b", "seed", 0.45, 0, 1), attempt("c", "a", 0.1, 1, 0)]
    picks = puct(archive_of(rows), 4, step_rng(0, 2), exploration=0.01, expansions=Expansions().add(rows))
    assert [s.id for s in picks] == ["seed", "b", "a", "c"]


def test_ties_go_to_the_higher_value_then_to_the_earlier_state():
    rows = [attempt("low", "seed", 0.25, 0, 0), attempt("first", "seed", 0.5, 0, 0), attempt("second", "seed", 0.5, 0, 1)]
    rows.append(attempt("child", "low", 0.5, 1, 0))  # raises Q of low to 0.5
    picks = puct(archive_of(rows[:3]), 3, step_rng(0, 1), exploration=0.0, expansions=Expansions().add(rows))
    assert [s.id for s in picks] == ["first", "second", "low"]


def test_groups_of_the_first_step_get_the_seed():
    for expansions in (NO_EXPANSIONS, Expansions().add([attempt("x", "seed", None, 0, 0)])):
        assert puct(Archive((), 10), 5, step_rng(0, 0), expansions=expansions) == [SEED] * 5
        assert puct_scores(Archive((), 10), expansions) == [-np.inf]


def test_equal_and_extreme_values():
    """The scale has a floor, and no finite value overflows into NaN."""
    equal = [attempt(name, "seed", 0.5, 0, group) for group, name in enumerate("ab")]
    scores = puct_scores(archive_of(equal), Expansions().add(equal))
    np.testing.assert_allclose(scores, 0.5 + 1e-6 * np.array([3, 2, 1]) / 6 * np.sqrt(3) / [1, 1, 3], rtol=0, atol=1e-15)
    far = [attempt("a", "seed", 1.7e308, 0, 0), attempt("b", "seed", -1.7e308, 0, 1)]
    for exploration in (0.0, 1.0, 1e6):
        assert not np.isnan(puct_scores(archive_of(far), Expansions().add(far), exploration)).any()
        assert len(puct(archive_of(far), 5, step_rng(0, 1), exploration=exploration, expansions=Expansions().add(far))) == 5


def test_mismatched_journal_is_refused():
    archive = archive_of(HISTORY)
    for expansions in (NO_EXPANSIONS, Expansions().add(HISTORY[:4])):
        with pytest.raises(RunError, match=r"state '\w'.*do not belong together"):
            puct(archive, 2, step_rng(0, 2), expansions=expansions)
    with pytest.raises(RunError, match=r"'d' has the parent 'a'.*no earlier row"):
        Expansions().add(HISTORY[4:])
    with pytest.raises(RunError, match=r"'z' has the parent 'y'.*no earlier row"):
        Expansions().add([*HISTORY, attempt("z", "y", 0.9, 2, 0)])  # y failed
    with pytest.raises(RunError, match=r"'z' has the parent 'b'.*'c'.*one parent"):
        Expansions().add([*HISTORY, attempt("z", "b", 0.9, 1, 1)])
    with pytest.raises(RunError, match=r"Two programs.* id 'd'"):
        Expansions().add([*HISTORY, attempt("d", "b", 0.9, 2, 0)])
    with pytest.raises(RunError, match=r"'d'.*ancestors"):
        Expansions().ancestors("d")


def test_at_most_two_children_of_a_parent_are_kept():
    archive = Archive((), 100)
    for group in ([("a", "seed", 0.1), ("b", "seed", 0.3), ("c", "seed", 0.2)], [("d", "seed", 0.05)], [("e", "b", 0.5), ("f", "b", 0.4)]):
        archive = archive.add_group([attempt(*row, 0, 0).state() for row in group], children=2)
    assert [s.id for s in archive.states] == ["e", "f", "b", "c", "d"]  # d is kept: the seed counts as a new parent in each group
    later = [attempt("g", "b", 0.45, 2, 0).state(), attempt("h", "b", 0.5, 2, 0, code="# e").state()]
    archive = archive.add_group(later, children=2)
    assert [s.id for s in archive.states] == ["e", "g", "b", "c", "d"]  # h is a copy of e, and g replaces f
    assert archive.add_group([attempt("i", "b", 0.45, 3, 0).state()], children=2) == archive  # the earlier of two equal states stays
    assert archive.add_group([], children=2) == archive
    assert len(archive.add_group([attempt("i", "b", 0.45, 3, 0).state()], children=0).states) == 6
    with pytest.raises(RunError, match=r"'b', 'c'.*one parent"):
        archive.add_group([attempt("i", "b", 0.4, 3, 0).state(), attempt("j", "c", 0.4, 3, 0).state()], children=2)
    with pytest.raises(RunError, match="'seed' has no value"):
        archive.add_group([SEED], children=2)


@st.composite
def searches(draw):
    """Sizes of a search and the values of its programs. Some programs are copies of others."""
    groups, size, steps = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    value = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.floats(-1, 1))
    values = draw(st.lists(value, min_size=groups * size * steps, max_size=groups * size * steps))
    codes = draw(st.lists(st.integers(0, 40), min_size=len(values), max_size=len(values)))
    return groups, size, steps, iter(values), iter(codes), draw(st.integers(1, 12)), draw(st.floats(0, 3))


def related(one, other, rows):
    """Whether one is the other or its ancestor, by the lineages in the journal. The seed is an ancestor of all."""
    if one.is_seed or other.is_seed:
        return True
    return one in lineage(rows, other.id) or other in lineage(rows, one.id)


def naive_scores(archive, rows, exploration):
    """The formula, with each state's groups counted one by one through the lineages of their parents."""
    parent_of_group = {(row.step, row.group): row.parent_id for row in rows}
    used = [{"seed", *(s.id for s in lineage(rows, parent))} for parent in parent_of_group.values()]
    values = [s.value for s in archive.states]
    scale = max(max(values, default=0.0) - min(values, default=0.0), 1e-6)
    total = sum(range(len(values) + 2))
    scores = []
    for rank, state in enumerate([*archive.states, SEED]):
        children = [row.reward for row in rows if row.parent_id == state.id and row.outcome is Outcome.OK]
        q = max(children) if children else (-np.inf if state.is_seed else state.value)
        n = sum(state.id in ids for ids in used)
        scores.append(q + exploration * scale * (len(values) + 1 - rank) / total * np.sqrt(1 + len(used)) / (1 + n))
    return scores


@settings(max_examples=60)
@given(searches())
def test_random_searches(search):
    groups, size, steps, values, codes, capacity, exploration = search
    archive, expansions, rows = Archive((), capacity), NO_EXPANSIONS, []
    for step in range(steps):
        # A resumed run has its checkpoint's archive and the journal's rows.
        again = Archive.from_json(json.loads(json.dumps(archive.to_json())), capacity)
        replayed = Expansions().add([journal.from_json(journal.to_json(row)) for row in rows])
        assert replayed == expansions == expansions.add(rows[len(rows) // 2 :])
        options = {"exploration": exploration, "expansions": expansions}
        parents = puct(archive, groups, step_rng(1, step), **options)
        assert parents == puct(again, groups, step_rng(2, step + 1), exploration=exploration, expansions=replayed)

        assert len(parents) == groups
        candidates = [*archive.states, SEED]
        assert all(parent in candidates for parent in parents)
        scores = puct_scores(archive, expansions, exploration)
        np.testing.assert_allclose(scores, naive_scores(archive, rows, exploration), rtol=1e-12, atol=1e-12)
        assert scores[candidates.index(parents[0])] == max(scores)
        assert len({p.id for p in parents}) == min(groups, len(candidates))  # repeated only when all were picked
        # A relative of an earlier pick is taken only if no unrelated candidate is left.
        for place, parent in enumerate(parents):
            if any(related(parent, earlier, rows) for earlier in parents[:place]):
                left = [c for c in candidates if c not in parents[:place]]
                assert all(any(related(c, earlier, rows) for earlier in parents[:place]) for c in left)
                break

        attempts = []
        for group, parent in enumerate(parents):
            of_group = [attempt(f"{step}-{group}-{i}", parent.id, next(values), step, group, f"# {next(codes)}") for i in range(size)]
            archive = archive.add_group([state for a in of_group if (state := a.state()) is not None], children=2)
            attempts += of_group
        rows += attempts
        expansions = expansions.add(attempts)
        assert expansions.total == groups * (step + 1)

        assert len(archive.states) <= capacity
        kept = [(s.parent_id, s.id.split("-")[:2] if s.parent_id == "seed" else None) for s in archive.states]
        assert all(kept.count(family) <= 2 for family in kept)
        assert len({s.code for s in archive.states}) == len(archive.states)
        for state in archive.states:
            line = lineage(rows, state.id)
            assert line[0].parent_id == "seed"
            assert line[-1] == state
            assert [s.step for s in line] == sorted({s.step for s in line})  # each is from a later step than its parent: no cycles
            assert expansions.ancestors(state.id) == [*(s.id for s in line[-2::-1]), "seed"]


@settings(max_examples=60)
@given(searches())
def test_kept_states_without_copies(search):
    """An independent definition: the two best of each parent (for the seed, of each group), and the best of these, in any arrival order."""
    groups, size, steps, values, _, capacity, exploration = search
    archive, expansions, rows = Archive((), capacity), NO_EXPANSIONS, []
    for step in range(steps):
        for group, parent in enumerate(puct(archive, groups, step_rng(0, step), exploration=exploration, expansions=expansions)):
            of_group = [attempt(f"{step}-{group}-{i}", parent.id, next(values), step, group) for i in range(size)]
            archive = archive.add_group([state for a in of_group if (state := a.state()) is not None], children=2)
            rows += of_group
        expansions = expansions.add(rows)
    families = {}
    for row in rows:
        if (state := row.state()) is not None:
            families.setdefault((row.parent_id, (row.step, row.group) if row.parent_id == "seed" else None), []).append(state)
    finalists = [s for family in families.values() for s in sorted(family, key=lambda s: -s.value)[:2]]
    assert [s.value for s in archive.states] == sorted((s.value for s in finalists), reverse=True)[:capacity]
    assert best_of(archive.states) == best_of(s for row in rows if (s := row.state()) is not None)


def test_other_selectors_ignore_the_arguments_of_puct():
    archive, expansions = archive_of(HISTORY), Expansions().add(HISTORY)
    for name in ("greedy", "fixed"):
        plain = SELECTORS[name](archive, 20, step_rng(3, 4), epsilon=0.5)
        assert SELECTORS[name](archive, 20, step_rng(3, 4), epsilon=0.5, exploration=7.0, expansions=expansions) == plain
