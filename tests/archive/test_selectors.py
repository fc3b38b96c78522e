"""Properties of the archive under random histories, lineages, and how often each selector picks each state."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.archive.archive import Archive, best_of, lineage
from discover_jax.archive.expansions import Expansions
from discover_jax.archive.selectors import SELECTORS, diversify_parents, puct_scores, step_rng
from discover_jax.exceptions import ConfigError, RunError
from discover_jax.types import SEED, Attempt, Outcome, State, StopReason


def state(number: int, code: str, value: float) -> State:
    return State(id=f"s{number}", parent_id="seed", code=code, value=value, score=value, stdout="", step=0, adapter_step=0)


@st.composite
def histories(draw):
    """States in order of creation. Equal programs have equal values, as after grading."""
    codes = draw(st.lists(st.sampled_from("abcdefghij"), max_size=30))
    values = {code: draw(st.sampled_from([0.0, 0.25, 0.5, 0.75])) for code in sorted(set(codes))}
    return [state(number, code, values[code]) for number, code in enumerate(codes)]


@given(histories(), st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1))
def test_archive_properties(history, capacity, sizes):
    whole = Archive((), capacity).add(history)
    batched, rest, turn = Archive((), capacity), list(history), 0
    while rest:
        size = sizes[turn % len(sizes)]
        batched, rest, turn = batched.add(rest[:size]), rest[size:], turn + 1
    assert batched == whole
    # An independent definition of the archive: first occurrences, stably sorted by value.
    firsts = list({s.code: s for s in reversed(history)}.values())
    expected = sorted(sorted(firsts, key=lambda s: int(s.id[1:])), key=lambda s: -s.value)[:capacity]
    assert list(whole.states) == expected
    assert best_of(history) == (expected[0] if expected else None)
    assert Archive.from_json(json.loads(json.dumps(whole.to_json())), capacity) == whole


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-1, 1)), max_size=40), st.integers(1, 4))
def test_archive_of_noisy_values(pairs, capacity):
    """The archive stays bounded, sorted and free of duplicates even if a program's value varies."""
    archive, bests = Archive((), capacity), []
    for number, (code, value) in enumerate(pairs):
        archive = archive.add([state(number, code, value)])
        bests.append(archive.states[0].value)
        assert len(archive.states) <= capacity
        assert len({s.code for s in archive.states}) == len(archive.states)
        assert [s.value for s in archive.states] == sorted((s.value for s in archive.states), reverse=True)
    assert bests == sorted(bests)


def test_archive_refuses():
    with pytest.raises(RunError, match="value"):
        Archive((), 3).add([SEED])
    with pytest.raises(ConfigError, match="at least 1"):
        Archive((), 0)
    with pytest.raises(RunError, match="archive"):
        Archive.from_json([{"id": "x"}], 3)


def attempt(id: str, parent: str, outcome: Outcome = Outcome.OK) -> Attempt:
    return Attempt(
        id=id,
        parent_id=parent,
        task="boats",
        step=int(id[0]),
        group=0,
        index=0,
        code=f"# {id}",
        outcome=outcome,
        detail="",
        stdout="",
        score=0.5,
        private_score=None,
        reward=0.5,
        adapter_step=0,
        tokens=1,
        stop=StopReason.STOP_TOKEN,
    )


def test_lineage():
    rows = [attempt("0a", "seed"), attempt("0b", "seed"), attempt("1a", "0a"), attempt("1b", "0a", Outcome.TIMEOUT), attempt("2a", "1a")]
    assert [s.id for s in lineage(rows, "2a")] == ["0a", "1a", "2a"]
    assert [s.id for s in lineage(iter(rows), "0b")] == ["0b"]
    assert lineage(rows, "1b") == []
    assert lineage(rows, "nothing") == []
    assert [s.id for s in lineage(rows[2:], "2a")] == ["1a", "2a"]
    with pytest.raises(RunError, match="2a"):
        lineage([*rows[1:], attempt("0a", "2a")], "2a")


def test_greedy_frequencies():
    """Each state except the best has probability epsilon / n; the best has the rest. Bounds are 5 standard deviations."""
    archive = Archive((), 10).add(state(n, f"code {n}", n / 10) for n in range(4))
    draws, epsilon = 20_000, 0.125
    picked = SELECTORS["greedy"](archive, draws, step_rng(7, 3), epsilon=epsilon)
    for rank, kept in enumerate(archive.states):
        p = epsilon / 4 + (1 - epsilon if rank == 0 else 0)
        assert abs(picked.count(kept) / draws - p) < 5 * np.sqrt(p * (1 - p) / draws)


def test_greedy_extremes():
    archive = Archive((), 10).add(state(n, f"code {n}", n / 10) for n in range(4))
    assert SELECTORS["greedy"](archive, 50, step_rng(0, 0), epsilon=0.0) == [archive.states[0]] * 50
    assert set(SELECTORS["greedy"](archive, 200, step_rng(0, 0), epsilon=1.0)) == set(archive.states)
    assert SELECTORS["greedy"](Archive((), 10), 5, step_rng(0, 0), epsilon=0.5) == [SEED] * 5
    assert SELECTORS["fixed"](archive, 5, step_rng(0, 0), epsilon=0.5) == [SEED] * 5


def test_draws_depend_only_on_seed_and_step():
    archive = Archive((), 100).add(state(n, f"code {n}", n / 100) for n in range(100))

    def draw(seed, step):
        return SELECTORS["greedy"](archive, 20, step_rng(seed, step), epsilon=1.0)

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(2, 1)
    assert draw(1, 2) != draw(1, 3)


def test_distinct_parents():
    """By hand: repeated parents are replaced by the best unused states. The last groups start from scratch."""
    archive = Archive((), 10).add([state(n, f"code {n}", 1.0 - n / 10) for n in range(4)])
    best, second, third, fourth = archive.states
    assert diversify_parents([best, best, best], archive) == [best, best, best]
    assert diversify_parents([best, best, third, best], archive, distinct=True) == [best, second, third, fourth]
    assert diversify_parents([best] * 5, archive, distinct=True) == [best, second, third, fourth, best]  # no more states
    assert diversify_parents([best, second, third, best], archive, fresh=0.5) == [best, second, SEED, SEED]
    assert diversify_parents([best], archive, fresh=0.4) == [best]
    assert diversify_parents([SEED, SEED], Archive((), 10), distinct=True) == [SEED, SEED]


@given(histories(), st.sampled_from([0.0, 0.25, 0.6]), st.integers(1, 5))
def test_a_seed_program_competes_with_the_kept_states(history, value, groups):
    seed = dataclasses.replace(SEED, code="start", value=value, score=value)
    archive = Archive((), 6).add(history)
    expansions = Expansions({s.id: "seed" for s in archive.states}, {}, {})
    better = [s for s in archive.states if s.value > value]
    best = better[0] if better else seed
    picked = SELECTORS["greedy"](archive, groups, step_rng(0, 0), epsilon=0.0, seed=seed)
    assert picked == [best] * groups
    assert set(SELECTORS["greedy"](archive, 200, step_rng(0, 0), epsilon=1.0, seed=seed)) == {seed, *archive.states}
    assert SELECTORS["fixed"](archive, groups, step_rng(0, 0), seed=seed) == [seed] * groups
    order = [*better, seed, *archive.states[len(better) :]]
    scores = puct_scores(archive, expansions, 1.0, seed)
    scale = max(order[0].value - order[-1].value, 1e-6)
    ranks = range(len(order), 0, -1)
    assert scores == pytest.approx([s.value + scale * rank / sum(ranks) for s, rank in zip(order, ranks, strict=True)])
    assert diversify_parents([best] * 2, archive, fresh=0.5, seed=seed)[1] == seed
