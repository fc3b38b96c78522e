"""Ranking by posterior scores and with ties within noise: by hand, in simulated searches with known true scores, and after resuming."""

import dataclasses

import numpy as np
import pytest

from discover_jax.archive.archive import Archive
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.ranking import RULES, Measurements, Ranking, gains_over_parents
from discover_jax.archive.selectors import puct_scores
from discover_jax.exceptions import RunError
from discover_jax.row_results import encode
from discover_jax.types import SEED, Attempt, Outcome, State, StopReason

ROWS = 400
BY = {rule: Ranking(rule, True, lambda score: score) for rule in RULES}


def _state(id: str, parent: str, correct: np.ndarray, code: str = "") -> State:
    score = float(np.mean(correct))
    return State(id, parent, code or id, score, score, "", 0, 0, rows=encode(correct, share=True))


def _flipped(correct: np.ndarray, lost: int, won: int) -> np.ndarray:
    changed = correct.copy()
    changed[np.flatnonzero(correct)[:lost]] = 0
    changed[np.flatnonzero(correct == 0)[:won]] = 1
    return changed


BASE = (np.arange(ROWS) % 5 > 0).astype(float)  # 80% correct


def test_ties_by_hand():
    """The difference of 3 rows won and none lost has the standard error 1.73 / 400, so 3 / 400 is within 1.96 of them; 12 / 400 is not."""
    states = [_state("a", "seed", BASE), _state("b", "a", _flipped(BASE, 0, 3)), _state("c", "a", _flipped(BASE, 0, 12))]
    values = Measurements().add(states).values(BY["ties"])
    assert values == {"a": 0.8, "b": 0.8, "c": pytest.approx(0.83)}
    # Small gains add up: each is compared with the program whose value it would take, not with the parent.
    chain = [_state("a", "seed", BASE)]
    for number in range(1, 5):
        chain.append(_state(f"{number}", chain[-1].id, _flipped(BASE, 0, 3 * number)))
    values = Measurements().add(chain).values(BY["ties"])
    assert [values[state.id] for state in chain] == [0.8, 0.8, pytest.approx(0.815), pytest.approx(0.815), pytest.approx(0.83)]


def test_gains_beyond_noise_by_hand():
    """The gains of `test_ties_by_hand` over the parent, beside a loss, a copy, and a parent that is not in the journal."""
    changes = {"b": ("a", 0, 3), "c": ("a", 0, 12), "d": ("c", 12, 0), "e": ("a", 0, 0), "f": ("lost", 0, 40)}
    states = [_state("a", "seed", BASE), *(_state(id, parent, _flipped(BASE, *flips)) for id, (parent, *flips) in changes.items())]
    assert gains_over_parents(states, higher_is_better=True) == (2, 1)
    losses = [dataclasses.replace(state, score=1 - state.score, value=state.score - 1) for state in states]
    assert gains_over_parents(losses, higher_is_better=False) == (2, 1)
    assert gains_over_parents([dataclasses.replace(state, rows="") for state in states], higher_is_better=True) is None
    # With a seed program, which is the parent of the first one; its value is not a reward.
    seed = dataclasses.replace(_state("seed", "", _flipped(BASE, 40, 0)), value=-100.0)
    assert gains_over_parents([seed, *states], higher_is_better=True) == (3, 2)


def test_a_copy_has_the_value_of_the_first():
    states = [_state("a", "seed", BASE), _state("b", "a", _flipped(BASE, 0, 12)), _state("c", "a", _flipped(BASE, 0, 12), code="b")]
    for ranking in BY.values():
        values = Measurements().add(states).values(ranking)
        assert values["b"] == values["c"]


def test_exact_scores_stay():
    states = [State(id, parent, id, value, value, "", 0, 0) for id, parent, value in (("a", "seed", 0.5), ("b", "a", 0.7))]
    for ranking in BY.values():
        assert Measurements().add(states).values(dataclasses.replace(ranking, needs_rows=False)) == {"a": 0.5, "b": 0.7}
        with pytest.raises(RunError, match="earlier version"):
            Measurements().add(states).values(ranking)


def test_broken_first_programs_stay_below_the_others():
    rng = np.random.default_rng(3)
    for _ in range(50):
        correct = [(rng.random(ROWS) < share).astype(float) for share in (0.5, *[0.8] * 8)]
        values = Measurements().add(_state(str(number), "seed", each) for number, each in enumerate(correct)).values(BY["posterior"])
        assert values["0"] == min(values.values())
        assert values["0"] < 0.6


def test_lower_is_better():
    """Mirrored scores give mirrored posteriors."""
    rng = np.random.default_rng(0)
    states, losses = [], []
    for number in range(30):
        correct = (rng.random(ROWS) < 0.8).astype(float)
        state = _state(f"s{number}", "seed", correct)
        states.append(state)
        losses.append(dataclasses.replace(state, score=1 - state.score, value=state.score - 1))
    up = Measurements().add(states).values(BY["posterior"])
    down = Measurements().add(losses).values(Ranking("posterior", False, lambda score: -score))
    assert [1 + down[state.id] for state in states] == pytest.approx([up[state.id] for state in states])


def _search(rng, steps=12, children=12):
    """Programs of a greedy search with rows that have a difficulty of their own. Returns the states and the true scores by id."""
    difficulty = rng.normal(size=ROWS)
    luck = rng.normal(size=ROWS)
    states, truth, skills, best = [], {}, {"seed": 0.8}, "seed"
    values = {}
    for step in range(steps):
        parent = best
        for index in range(children):
            id, skill = f"{step:04d}-000-{index:03d}", skills[parent] + rng.normal(-0.01, 0.05)
            own = luck + 0.3 * rng.normal(size=ROWS)
            correct = (difficulty + own < 1.2 * skill).astype(float)
            skills[id], truth[id] = skill, skill
            states.append(_state(id, parent, correct))
            values[id] = states[-1].value
        best = max(values, key=lambda id: values[id])
    return states, truth


def test_posterior_picks_better_programs_and_knows_its_error():
    """Over 60 searches: the program with the highest posterior is truly no worse than the one with the highest score, and less lucky."""
    gaps = {rule: [] for rule in ("raw", "posterior")}
    for number in range(60):
        states, _ = _search(np.random.default_rng(number))
        measurements = Measurements().add(states)
        by_id = {state.id: state for state in states}
        fresh = {}
        for rule in gaps:
            values = measurements.values(BY[rule])
            chosen = max(values, key=lambda id, values=values: values[id])
            fresh[rule] = values[chosen]
            gaps[rule].append(fresh[rule] - by_id[chosen].score)
    assert max(gaps["raw"]) == 0.0
    assert np.mean(gaps["posterior"]) < -0.002  # the posterior of a winner is below its lucky score


def _attempt(state: State, step: int, group: int, index: int) -> Attempt:
    common = {"stdout": "", "detail": "", "private_score": None, "adapter_step": 0, "tokens": 1, "stop": StopReason.STOP_TOKEN}
    return Attempt(
        id=state.id,
        parent_id=state.parent_id or "",
        task="t",
        step=step,
        group=group,
        index=index,
        code=state.code,
        outcome=Outcome.OK,
        score=state.score,
        reward=state.value or 0.0,
        rows=state.rows,
        **common,
    )


@pytest.mark.parametrize("rule", ["ties", "posterior"])
def test_a_resumed_frontier_equals_the_unbroken_one(rule):
    states, _ = _search(np.random.default_rng(7), steps=5, children=6)
    steps = [[_attempt(state, step, 0, i) for i, state in enumerate(states[6 * step : 6 * step + 6])] for step in range(5)]
    frontier = Frontier.start(8, ranking=BY[rule])
    for done, attempts in enumerate(steps, start=1):
        frontier = frontier.after(attempts, reusable={attempt.id for attempt in attempts}, children=3)
        archive = Archive.from_json(frontier.archive.to_json(), 8)
        seen = [attempt for earlier in steps[:done] for attempt in earlier]
        resumed = Frontier.resumed(archive, seen, ranking=BY[rule])
        assert resumed == frontier
        values = [state.value for state in frontier.archive.states]
        assert values == sorted(values, reverse=True)
        assert frontier.best is not None
        assert frontier.best.value == max(frontier.measurements.values(BY[rule]).values())
        assert frontier.best.score == next(state.score for state in states if state.id == frontier.best.id)
    assert np.isfinite([score for score in puct_scores(frontier.archive, frontier.expansions) if score > -np.inf]).all()
    raw = Frontier.start(8)
    for attempts in steps:
        raw = raw.after(attempts, reusable={attempt.id for attempt in attempts}, children=3)
    assert [state.id for state in raw.archive.states] != [state.id for state in frontier.archive.states]


def test_a_seed_program_is_a_parent_with_rows():
    seed = dataclasses.replace(_state("seed", "", BASE, code="s"), parent_id=None)
    frontier = Frontier.start(8, seed=seed, ranking=BY["ties"])
    child = _state("0000-000-000", SEED.id, _flipped(BASE, 0, 3))
    after = frontier.after([_attempt(child, 0, 0, 0)], reusable={child.id}, children=0)
    assert after.archive.states[0].value == 0.8
    assert after.seed == seed


def test_other_rows_are_an_error():
    other = _state("b", "a", BASE[:-1])
    with pytest.raises(RunError, match="400"):
        Measurements().add([_state("a", "seed", BASE), other])
    with pytest.raises(RunError, match="damaged"):
        Measurements().add([dataclasses.replace(other, rows="bits:x")])
