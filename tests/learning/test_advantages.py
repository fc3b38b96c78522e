"""Advantages against the spec's vectors, formulas worked in exact or naive arithmetic, and properties that must hold for any rewards."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.learning.advantages import ESTIMATORS, advantage_metrics, entropic, estimate_groups, is_constant, mean_baseline

REPORT_SCORES = [0.60, 0.55, 0.92, 0.58, 0.61, 0.57, 0.59, 0.62]
finite = st.floats(allow_nan=False, allow_infinity=False)
moderate = st.floats(-100, 100)


def test_entropic_of_the_reports_scores():
    """Vector of spec/algorithm.md; the report's own printed numbers differ (module docstring)."""
    result = entropic(REPORT_SCORES, beta=2.0)
    np.testing.assert_allclose(result.values_K, [-0.0852, -0.1723, 0.7349, -0.1211, -0.0667, -0.1385, -0.1033, -0.0479], atol=5e-5)
    assert result.beta == 2.0
    assert not result.saturated
    assert result.values_K.dtype == np.float64


def test_mean_baseline_of_the_reports_scores():
    """Report, section 3.3: mean 0.63, attempts 1, 3 and 6 get -0.03, +0.29, -0.06."""
    result = mean_baseline(REPORT_SCORES)
    np.testing.assert_allclose(result.values_K[[0, 2, 5]], [-0.03, 0.29, -0.06], atol=1e-12)
    assert result.beta is None


def test_entropic_two_rewards_by_hand():
    """r = (0, ln 3 / beta): weights 1 and 3, mean 2, advantages -1/2 and 1/2."""
    for beta in (0.5, 2.0, 7.0):
        np.testing.assert_allclose(entropic([0.0, math.log(3) / beta], beta=beta).values_K, [-0.5, 0.5], atol=1e-14)


@given(st.lists(moderate, min_size=1, max_size=20), st.floats(0.01, 5))
def test_entropic_equals_the_naive_formula(rewards, beta):
    naive = [math.exp(beta * r) for r in rewards]
    expected = [w / (math.fsum(naive) / len(naive)) - 1 for w in naive]
    np.testing.assert_allclose(entropic(rewards, beta=beta).values_K, expected, rtol=1e-9, atol=1e-9)


@given(st.lists(finite, min_size=1, max_size=20), st.floats(0, 1e6))
def test_entropic_never_overflows(rewards, beta):
    values = entropic(rewards, beta=beta).values_K
    assert np.isfinite(values).all()
    assert abs(values.sum()) < 1e-9
    assert values.min() >= -1
    assert values.max() <= len(rewards) - 1 + 1e-9
    assert np.argmax(values) in np.flatnonzero(values == values[np.argmax(rewards)])


@given(st.lists(moderate, min_size=2, max_size=20), moderate)
def test_a_shift_of_all_rewards_changes_nothing(rewards, shift):
    shifted = np.asarray(rewards) + shift
    for estimate in ESTIMATORS.values():
        np.testing.assert_allclose(estimate(shifted).values_K, estimate(rewards).values_K, rtol=1e-9, atol=1e-9)


@given(st.lists(moderate, min_size=1, max_size=20))
def test_mean_baseline_equals_the_exact_mean(rewards):
    expected = np.asarray(rewards) - math.fsum(rewards) / len(rewards)
    np.testing.assert_allclose(mean_baseline(rewards).values_K, expected, atol=1e-12)


def test_mean_baseline_of_huge_rewards():
    np.testing.assert_array_equal(mean_baseline([1e308] * 8).values_K, np.zeros(8))
    with pytest.raises(LearningError, match="overflows"):
        mean_baseline([1.7e308, -1.7e308, -1.7e308])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [is_constant, *ESTIMATORS.values()])
def test_rewards_that_are_not_finite_are_refused(bad, function):
    with pytest.raises(LearningError, match=r"positions \[1\]") as caught:
        function([0.5, bad, 0.5])
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), LearningError)


@pytest.mark.parametrize("bad", [[], [[0.1, 0.2]], 0.3])
def test_rewards_of_another_shape_are_refused(bad):
    with pytest.raises(LearningError, match="shape"):
        entropic(bad)


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf])
def test_impossible_beta_is_refused(beta):
    with pytest.raises(ConfigError, match="beta"):
        entropic([0.0, 1.0], beta=beta)


def test_constant_groups():
    assert is_constant([0.8])
    assert is_constant([0.1 + 0.2] * 5)
    assert is_constant([0.0, -0.0])
    assert not is_constant([0.1 + 0.2, 0.3])  # they differ in the last bit, so they are two scores
    assert not is_constant([0.0, 0.0, 1e-12])


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_constant_rewards_have_no_advantage(name):
    np.testing.assert_allclose(ESTIMATORS[name]([0.7] * 6).values_K, np.zeros(6), atol=1e-15)


def test_unknown_estimator_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'grpo' is not known; allowed: .*entropic.*mean_baseline"):
        ESTIMATORS["grpo"]


def test_groups_of_a_step():
    groups = estimate_groups([[0.0, 1.0], [0.5, 0.5], [0.0, 0.0, 3.0]], "mean_baseline")
    assert groups[1] is None
    assert groups[0] is not None
    assert groups[2] is not None
    np.testing.assert_allclose(groups[0].values_K, [-0.5, 0.5])
    np.testing.assert_allclose(groups[2].values_K, [-1, -1, 2])
    metrics = advantage_metrics(groups)
    assert metrics == pytest.approx({"groups/constant_frac": 1 / 3, "advantage/mean": 0, "advantage/min": -1, "advantage/max": 2})
    assert advantage_metrics(estimate_groups([[0.0, 1.0]], "entropic", beta=3.0))["advantage/beta"] == 3.0
    assert advantage_metrics([None, None]) == {"groups/constant_frac": 1.0}
