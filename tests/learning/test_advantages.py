"""Advantages, compared with the spec's vectors, with formulas in exact or naive arithmetic, and with properties of any rewards."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.learning.advantages import (
    ESTIMATORS,
    advantage_metrics,
    entropic,
    entropic_adaptive,
    entropic_loo,
    estimate_groups,
    is_constant,
    mean_baseline,
)

REPORT_SCORES = [0.60, 0.55, 0.92, 0.58, 0.61, 0.57, 0.59, 0.62]
finite = st.floats(allow_nan=False, allow_infinity=False)
moderate = st.floats(-100, 100)
# Multiples of 1/16. Their shifts, and products with powers of two, are exact, so any change of a result comes from the estimator.
lattice = st.lists(st.integers(-64, 64).map(lambda n: n / 16), min_size=1, max_size=20)


def test_entropic_of_the_reports_scores():
    """The vector of spec/algorithm.md. The report prints other numbers; see the docstring of `advantages`."""
    result = entropic(REPORT_SCORES, beta=2.0)
    np.testing.assert_allclose(result.values_K, [-0.0852, -0.1723, 0.7349, -0.1211, -0.0667, -0.1385, -0.1033, -0.0479], atol=5e-5)
    assert result.beta == 2.0
    assert not result.saturated
    assert result.values_K.dtype == np.float64


@given(st.lists(moderate, min_size=2, max_size=20), st.floats(0, 5))
def test_entropic_keeps_its_bits(rewards, beta):
    """The report's estimator, operation by operation: later options must not change a bit of it, alone or in a step."""
    r = np.asarray(rewards, np.float64)
    weights = np.exp(beta * (r - r.max()))
    expected = weights / weights.mean() - 1.0
    np.testing.assert_array_equal(entropic(rewards, beta=beta).values_K, expected)
    np.testing.assert_array_equal(entropic(rewards, beta=beta, k=3, best=2.0, weight=0.5).values_K, expected)
    (group,) = estimate_groups([rewards], "entropic", beta=beta, k=3, bests_G=[2.0], weight=0.5)
    assert (group is None) == is_constant(rewards)
    if group is not None:
        np.testing.assert_array_equal(group.values_K, expected)


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


@given(lattice, st.integers(-(2**20), 2**20))
def test_advantages_do_not_depend_on_a_shift_of_all_rewards(rewards, shift):
    for name, estimate in ESTIMATORS.items():
        ours, before = estimate(np.asarray(rewards) + shift), estimate(rewards)
        np.testing.assert_allclose(ours.values_K, before.values_K, rtol=0, atol=1e-8 if name == "mean_baseline" else 0)
        assert (ours.beta, ours.saturated, ours.ties) == (before.beta, before.saturated, before.ties)


@given(lattice, st.randoms(use_true_random=False))
def test_advantages_do_not_depend_on_the_order_of_a_group(rewards, random):
    order = random.sample(range(len(rewards)), len(rewards))
    for estimate in ESTIMATORS.values():
        ours, before = estimate(np.asarray(rewards)[order]), estimate(rewards)
        # If a KL is within rounding of ln 2, the searches may differ in their last halving: 2^-60 of the interval.
        assert ours.beta == before.beta or ours.beta == pytest.approx(before.beta, rel=1e-12)
        assert (ours.saturated, ours.ties) == (before.saturated, before.ties)
        np.testing.assert_allclose(ours.values_K, before.values_K[order], rtol=1e-8, atol=1e-8)


@given(lattice)
def test_advantages_increase_with_rewards_and_are_equal_for_equal_rewards(rewards):
    rewards = np.sort(rewards)
    for estimate in ESTIMATORS.values():
        values = estimate(rewards).values_K
        assert (np.diff(values) >= -1e-9 * np.abs(values[1:])).all()
        for reward in set(rewards):
            same = values[rewards == reward]
            np.testing.assert_allclose(same, same[0], rtol=1e-12, atol=1e-12)


def loo_by_loops(rewards, beta):
    """The leave-one-out formula with one exact sum per rollout."""
    weights = [math.exp(beta * (r - max(rewards))) for r in rewards]
    means = [math.fsum(w for j, w in enumerate(weights) if j != i) / (len(weights) - 1) for i in range(len(weights))]
    return [w / (mean + 1e-12) - 1 for w, mean in zip(weights, means, strict=True)]


@given(st.lists(moderate, min_size=2, max_size=20), st.floats(0, 5))
def test_entropic_loo_equals_the_naive_formula(rewards, beta):
    result = entropic_loo(rewards, beta=beta)
    np.testing.assert_allclose(result.values_K, loo_by_loops(rewards, beta), rtol=1e-9, atol=1e-9)
    assert result.beta == beta
    assert result.ties == rewards.count(max(rewards))


def test_entropic_loo_by_hand():
    """r = (0, 0, ln 4 / beta): weights 1/4, 1/4, 1; the others' means 5/8, 5/8, 1/4; so A = -3/5, -3/5, 3."""
    for beta in (0.5, 2.0, 7.0):
        result = entropic_loo([0.0, 0.0, math.log(4) / beta], beta=beta)
        np.testing.assert_allclose(result.values_K, [-0.6, -0.6, 3.0], atol=1e-10)  # the 1e-12 of the formula is visible
        assert not result.saturated


def test_entropic_loo_is_saturated_when_its_constant_dominates():
    result = entropic_loo([0.0, 0.0, 100.0], beta=2.0)
    np.testing.assert_allclose(result.values_K, [-1, -1, 1e12], rtol=1e-9)
    assert result.saturated
    assert not entropic_loo([0.0, 0.0, 13.0], beta=2.0).saturated  # exp(-26) is 5e-12


@pytest.mark.parametrize(
    ("rewards", "beta", "advantages"),
    [
        ([0, 1, 2, 3], 1.44586, {0: -0.9696, 1: -0.8667, 2: -0.3387, 3: 8.8654}),
        ([0] * 7 + [1], 2.46539, {7: 10.768}),
        ([0] * 63 + [1], 3.35988, {63: 27.7857}),
    ],
)
def test_entropic_adaptive_vectors_of_the_spec(rewards, beta, advantages):
    result = entropic_adaptive(rewards)
    assert result.beta == pytest.approx(beta, abs=5e-6)
    assert not result.saturated
    assert result.ties == 1
    for place, value in advantages.items():
        assert result.values_K[place] == pytest.approx(value, abs=5e-4 if value > 9 else 5e-5)


@pytest.mark.parametrize("best", [1.0, 1.0 + 1e-9, 1e300])
@pytest.mark.parametrize("ties", [4, 5, 7])
def test_ties_of_half_a_group_saturate(ties, best):
    """Spec: four 1 and four 0 give 1.3333 and -1. At beta = 2^20 only the best count: Z = (ties - 1) / 7 for them, ties / 7 for others."""
    result = entropic_adaptive([best] * ties + [0.0] * (8 - ties))
    assert result.saturated
    assert result.beta == 2.0**20
    assert result.ties == ties
    np.testing.assert_allclose(result.values_K, [7 / (ties - 1) - 1] * ties + [-1] * (8 - ties), atol=1e-9)


@given(st.lists(moderate, min_size=3, max_size=20))
def test_entropic_adaptive_solves_its_equation_or_is_saturated(rewards):
    result = entropic_adaptive(rewards)
    if 2 * rewards.count(max(rewards)) >= len(rewards):
        assert result.saturated
        return
    weights = [math.exp(result.beta * (r - max(rewards))) for r in rewards]
    total = math.fsum(weights)
    kl = math.fsum(w / total * math.log(w / total * len(rewards)) for w in weights if w)
    assert result.saturated == (abs(kl - math.log(2)) > 1e-9)
    if max(rewards) - min(rewards) > 1e-3 and sorted(rewards)[len(rewards) // 2] < max(rewards) - 1e-3:
        assert not result.saturated  # at this scale, only ties or near-ties prevent a solution
    np.testing.assert_allclose(result.values_K, loo_by_loops(rewards, result.beta), rtol=1e-9, atol=1e-9)


@given(lattice, st.integers(-10, 10))
def test_entropic_adaptive_does_not_depend_on_the_unit_of_the_reward(rewards, power):
    ours, before = entropic_adaptive(np.asarray(rewards) * 2.0**power), entropic_adaptive(rewards)
    assert ours.saturated == before.saturated
    np.testing.assert_allclose(ours.values_K, before.values_K, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["entropic_loo", "entropic_adaptive"])
@given(st.lists(finite, min_size=1, max_size=20))
def test_leave_one_out_never_overflows(name, rewards):
    result = ESTIMATORS[name](rewards)
    assert np.isfinite(result.values_K).all()
    assert result.values_K.min() >= -1
    assert result.values_K.max() <= 1e12
    assert result.beta is not None
    assert math.isfinite(result.beta)
    assert result.values_K[np.argmax(rewards)] == pytest.approx(result.values_K.max())


@pytest.mark.parametrize("spread", [1e300, 1e-300, 5e-324, 2.0**-40])
def test_spreads_beyond_the_search_are_reported(spread):
    """Far apart: beta is 2^-60, from the last halving; only the best counts. Close together: beta is 2^20; all weights are nearly equal."""
    result = entropic_adaptive([0.0] * 5 + [spread])
    assert result.saturated
    assert result.beta == (2.0**-60 if spread > 1 else 2.0**20)
    np.testing.assert_allclose(result.values_K, [-1] * 5 + [1e12] if spread > 1 else np.zeros(6), rtol=1e-9, atol=2e-6)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_group_of_one_has_no_advantage(name):
    result = ESTIMATORS[name]([0.7])
    np.testing.assert_array_equal(result.values_K, [0.0])
    assert not result.saturated
    if name == "entropic_adaptive":
        assert result.beta == 0.0


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
    for estimate in (entropic, entropic_loo):
        with pytest.raises(ConfigError, match="beta"):
            estimate([0.0, 1.0], beta=beta)


def test_constant_groups():
    assert is_constant([0.8])
    assert is_constant([0.1 + 0.2] * 5)
    assert is_constant([0.0, -0.0])
    assert not is_constant([0.1 + 0.2, 0.3])  # the scores differ in the last bit
    assert not is_constant([0.0, 0.0, 1e-12])


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_constant_rewards_have_no_advantage(name):
    # The constant of the leave-one-out formula leaves -1e-12. The update excludes constant groups anyway.
    np.testing.assert_allclose(ESTIMATORS[name]([0.7] * 6).values_K, np.zeros(6), atol=2e-12)


def test_an_unknown_estimator_is_refused_with_the_list_of_known_ones():
    with pytest.raises(ConfigError, match=r"'grpo'.*entropic.*mean_baseline"):
        ESTIMATORS["grpo"]


def test_groups_of_a_step():
    groups = estimate_groups([[0.0, 1.0], [0.5, 0.5], [0.0, 0.0, 3.0]], "mean_baseline")
    assert groups[1] is None
    assert groups[0] is not None
    assert groups[2] is not None
    np.testing.assert_allclose(groups[0].values_K, [-0.5, 0.5])
    np.testing.assert_allclose(groups[2].values_K, [-1, -1, 2])
    metrics = advantage_metrics(groups)
    assert metrics == pytest.approx({"groups/unused_frac": 1 / 3, "advantage/mean": 0, "advantage/min": -1, "advantage/max": 2})
    assert advantage_metrics(estimate_groups([[0.0, 1.0]], "entropic", beta=3.0))["advantage/beta"] == 3.0
    assert advantage_metrics([None, None]) == {"groups/unused_frac": 1.0}
    groups = estimate_groups([[0, 1, 2, 3], [1, 1, 0, 0], [7, 7]], "entropic_adaptive")
    metrics = advantage_metrics(groups)
    assert metrics["advantage/beta"] == pytest.approx((1.44586 + 2**20) / 2)
    assert metrics["advantage/saturated_frac"] == 0.5
    assert metrics["advantage/tied_frac"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert "advantage/tied_frac" not in advantage_metrics(estimate_groups([[0.0, 1.0]], "entropic"))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_groups_too_small_for_the_estimator_have_no_signal(name):
    """Two rollouts would get an advantage of 1e12 from entropic_adaptive, whatever their rewards."""
    groups = estimate_groups([[0.7], [0.5, 0.500001], [0.5, 0.500001, 0.2]], name)
    assert groups[0] is None
    assert (groups[1] is None) == (name == "entropic_adaptive")
    kept = [group for group in groups if group is not None]
    assert groups[2] is not None
    assert all(np.abs(group.values_K).max() < 1e3 for group in kept)
    assert advantage_metrics(groups)["groups/unused_frac"] == pytest.approx(1 - len(kept) / 3)
    with pytest.raises(LearningError, match="finite"):
        estimate_groups([[math.nan, 1.0]], name)


@given(st.lists(st.lists(moderate, min_size=1, max_size=4), min_size=1, max_size=4))
def test_entropic_adaptive_gives_no_group_of_a_step_the_advantage_of_1e12(rewards):
    """The 1e12 comes from the constant of the leave-one-out formula. The number and spread of rewards do not matter."""
    for group in estimate_groups(rewards, "entropic_adaptive"):
        assert group is None or np.abs(group.values_K).max() < 1e4
