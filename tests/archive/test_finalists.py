"""Successive halving and the order of finalists, by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.archive.finalists import Finalist, Measurement, best_first, first_finalists, rounds
from discover_jax.types import State


def _state(id, code=None):
    return State(id, "seed", code or id, 0.5, 0.5, "", 0, 0)


def _finalist(id, *scores, rows=100, variance=0.0016, failure=""):
    return Finalist(_state(id), tuple(Measurement(score, rows, variance) for score in scores), failure)


def test_rounds_by_hand():
    assert rounds(16, 4) == [16, 8, 4, 2]
    assert rounds(5, 4) == [5, 3, 2, 2]
    assert rounds(1, 3) == [1, 1, 1]


@given(st.integers(1, 200), st.integers(1, 10))
def test_rounds_never_grow(count, retests):
    found = rounds(count, retests)
    assert found[0] == count
    assert all(0 < b <= a for a, b in itertools.pairwise(found))


def test_equal_programs_take_part_once():
    states = [_state("a", "x"), _state("b", "y"), _state("c", "x"), _state("d", "z")]
    assert [finalist.state.id for finalist in first_finalists(states, 3)] == ["a", "b", "d"]
    assert [finalist.state.id for finalist in first_finalists(states, 1)] == ["a"]
    alike = [dataclasses.replace(state, rows=rows) for state, rows in zip(states, ("r", "r", "s", "t"), strict=True)]
    assert [finalist.state.id for finalist in first_finalists(alike, 3)] == ["a", "c", "d"]


def test_estimate_weighs_rows():
    """(100 x 0.8 + 300 x 0.6) / 400, with variance (100^2 x 0.0016 + 300^2 x 0.0008) / 400^2."""
    estimate = Finalist(_state("a"), (Measurement(0.8, 100, 0.0016), Measurement(0.6, 300, 0.0008))).estimate
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.65)
    assert estimate.variance == pytest.approx((16 + 72) / 160_000)


def test_variance_without_rows_is_the_spread_of_scores():
    estimate = _finalist("a", 1.0, 3.0, 2.0, rows=1, variance=None).estimate
    assert estimate is not None
    assert (estimate.mean, estimate.variance) == pytest.approx((2.0, 1 / 3))
    (single,) = [_finalist("a", 1.0, rows=1, variance=None).estimate]
    assert single is not None
    assert math.isinf(single.variance)


def test_order():
    finalists = [
        _finalist("failed", 0.99, 0.99, failure="exception"),
        _finalist("out early", 0.95),
        _finalist("worse", 0.70, 0.72),
        _finalist("better", 0.80, 0.72),
        _finalist("never tested"),
    ]
    assert [f.state.id for f in best_first(finalists, higher_is_better=True)] == ["better", "worse", "out early", "failed", "never tested"]
    assert [f.state.id for f in best_first(finalists, higher_is_better=False)][:2] == ["worse", "better"]


def test_a_certain_score_beats_a_slightly_higher_uncertain_one():
    sure, unsure = _finalist("sure", 0.80, variance=1e-6), _finalist("unsure", 0.81, variance=1e-2)
    assert best_first([unsure, sure], higher_is_better=True)[0] is sure
    assert best_first([unsure, sure], higher_is_better=False)[0] is sure


def test_without_row_results_the_mean_decides():
    steady, lucky = _finalist("steady", 1.0, 1.01, rows=1, variance=None), _finalist("spread", 1.0, 1.2, rows=1, variance=None)
    assert best_first([steady, lucky], higher_is_better=True)[0] is lucky
    assert (steady.degrees, _finalist("rows", 1.0).degrees) == (1, None)


def test_halving_finds_the_best_of_many_by_fewer_runs():
    """Against the maximum of one noisy score, on the same budget of true values."""
    rng = np.random.default_rng(0)
    by_retests, by_maximum = [], []
    for _ in range(300):
        true = rng.normal(0.8, 0.005, 16)
        first = true + rng.normal(0, 0.01, 16)
        by_maximum.append(true[first.argmax()])
        order = sorted(range(16), key=lambda i: -first[i])
        finalists = [Finalist(_state(str(i))) for i in order]
        for kept in rounds(16, 4):
            tested = [
                Finalist(f.state, (*f.measurements, Measurement(true[int(f.state.id)] + rng.normal(0, 0.01), 1500, 1e-4)))
                if n < kept
                else f
                for n, f in enumerate(finalists)
            ]
            finalists = best_first(tested, higher_is_better=True)
        by_retests.append(true[int(finalists[0].state.id)])
    gain = np.array(by_retests) - by_maximum
    assert gain.mean() > 3 * gain.std() / 300**0.5
