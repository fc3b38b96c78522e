"""Intervals, against published values and the property that defines Wilson's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.tasks.interval import score_interval, wilson_interval
from discover_jax.tasks.metrics import ACCURACY, RMSE


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for right, rows in [(0, 10), (10, 10), (705, 870), (1, 2), (400, 1197)]:
        expected = stats.binomtest(right, rows).proportion_ci(0.95, method="wilson")
        assert wilson_interval(right / rows, rows) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 5000).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))))
def test_its_bounds_are_the_proportions_that_the_data_just_allow(data):
    """(p - q)^2 = z^2 q (1 - q)/n at either bound q, or the bound is 0 or 1."""
    right, rows = data
    for bound in wilson_interval(right / rows, rows, z=2.0):
        if 0.0 < bound < 1.0:
            assert (right / rows - bound) ** 2 == pytest.approx(4.0 * bound * (1 - bound) / rows, abs=1e-12)


def test_width_on_the_rows_of_spaceship_titanic():
    low, high = wilson_interval(0.81, 870)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.0133, abs=5e-4)  # the spec's standard error


def test_only_proportions_have_one():
    assert score_interval(ACCURACY, 0.5, 100) == wilson_interval(0.5, 100)
    assert score_interval(RMSE, 0.5, 100) is None


@pytest.mark.parametrize(("proportion", "rows"), [(1.01, 10), (-0.1, 10), (0.5, 0), (float("nan"), 10)])
def test_values_that_make_no_sense(proportion, rows):
    with pytest.raises(ValueError, match="A proportion lies in"):
        wilson_interval(proportion, rows)
