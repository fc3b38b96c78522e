"""The best of k by hand, by enumeration of all subsets in exact arithmetic, and its gradient by enumeration of a small policy."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.learning.advantages import advantage_metrics, estimate_groups, frontier, least_rollouts, max_at_k
from discover_jax.learning.best_of_k import best_with_minus_without, contributions, k_of_step, weight_of_step

rewards_and_k = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=7).flatmap(
    lambda rewards: st.tuples(st.just(rewards), st.integers(1, len(rewards) - 1))
)


def mean(values):
    values = [Fraction(value) for value in values]
    return sum(values) / len(values)


def test_by_hand():
    """0, 1, 3 with k = 2: the pairs' bests are 1, 3, 3. With 0: 1 and 3; without it: 3. The same for 1. With 3: 3 and 3; without it: 1."""
    np.testing.assert_allclose(max_at_k([0.0, 1.0, 3.0], k=2).values_K, [-2.0, -2.0, 4.0])
    np.testing.assert_allclose(max_at_k([1.0, 3.0, 0.0], k=1).values_K, [-0.5, 2.5, -2.0])  # less the mean of the others
    # Added to one of the others: 3 adds 3 or 2, 1 adds 1 or 0. With a best of 2 so far, only 3 adds anything, always 1.
    np.testing.assert_allclose(contributions([0.0, 1.0, 3.0], 2, base=-1.0), [0.0, 0.5, 2.5])
    np.testing.assert_allclose(contributions([0.0, 1.0, 3.0], 2, base=2.0), [0.0, 0.0, 1.0])
    np.testing.assert_allclose(contributions([0.0, 1.0, 3.0], 1, base=0.5), [0.0, 0.5, 2.5])


@given(rewards_and_k)
def test_equals_the_enumeration_of_all_subsets(case):
    rewards, k = case
    subsets = list(itertools.combinations(range(len(rewards)), k))
    best = {subset: max(rewards[i] for i in subset) for subset in subsets}
    expected = [k * (mean(best[s] for s in subsets if i in s) - mean(best[s] for s in subsets if i not in s)) for i in range(len(rewards))]
    np.testing.assert_allclose(best_with_minus_without(rewards, k), [float(value) for value in expected], atol=1e-12)


@given(rewards_and_k, st.integers(-10, 10))
def test_contributions_equal_the_enumeration(case, base):
    rewards, k = case
    base /= 4

    def added(i, others):
        before = max([base, *(rewards[j] for j in others)])
        return max(before, rewards[i]) - before

    expected = []
    for i in range(len(rewards)):
        others = [j for j in range(len(rewards)) if j != i]
        expected.append(float(mean(added(i, subset) for subset in itertools.combinations(others, k - 1))))
    np.testing.assert_allclose(contributions(rewards, k, base), expected, atol=1e-12)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (3, 2), (4, 2), (4, 3)])
def test_the_gradient_is_unbiased(n, k):
    """A softmax policy over three actions: the mean over all 3^n groups is the gradient of the expected best of k."""
    rewards, logits = np.array([0.2, -0.7, 1.3]), np.array([0.4, 1.0, -0.9])
    p = np.exp(logits) / np.exp(logits).sum()
    scores = np.eye(3) - p  # grad log p of each action

    def expectation(size, weights_of):
        total = np.zeros(3)
        for actions in itertools.product(range(3), repeat=size):
            total += np.prod(p[list(actions)]) * (weights_of(rewards[list(actions)]) @ scores[list(actions)])
        return total

    true = expectation(k, lambda group: np.full(k, group.max()))  # grad E[f] = E[f sum grad log p]
    np.testing.assert_allclose(expectation(n, lambda group: max_at_k(group, k=k).values_K / n), true, atol=1e-12)
    without_baseline = expectation(n, lambda group: contributions(group, k, base=group.min() if k > 1 else 0.0) * k / n)
    np.testing.assert_allclose(without_baseline if k > 1 else true, true, atol=1e-12)  # PKPO's second estimator


@pytest.mark.parametrize("k", [1, 2, 64, 512, 1022, 1023])
def test_large_groups_are_safe(k):
    n = 1024
    rewards = np.random.default_rng(k).normal(size=n)
    values = best_with_minus_without(rewards, k)
    assert np.isfinite(values).all()
    assert abs(values.sum()) < 1e-9 * np.abs(values).sum()
    ordered, last = np.sort(rewards), math.comb(n, k)
    exact = sum(Fraction(math.comb(i, k - 1), last) * Fraction(r) for i, r in enumerate(ordered.tolist()))
    rest = ordered[:-1].tolist()
    without_best = sum(Fraction(math.comb(i, k - 1), math.comb(n - 1, k)) * Fraction(r) for i, r in enumerate(rest))
    assert values[rewards.argmax()] == pytest.approx(float(n * (exact - without_best)), rel=1e-9)


@given(rewards_and_k, st.integers(-1000, 1000))
def test_ties_shifts_and_order(case, shift):
    rewards, k = np.array(case[0]), case[1]
    for estimate in (lambda r: max_at_k(r, k=k).values_K, lambda r: frontier(r, k=k, weight=0.5).values_K):
        values = estimate(rewards)
        np.testing.assert_array_equal(estimate(rewards + shift), values)
        np.testing.assert_allclose(estimate(rewards[::-1]), values[::-1], atol=1e-12)
        assert all(len(set(values[rewards == reward])) == 1 for reward in rewards)
        assert (np.diff(values[np.argsort(rewards)]) >= -1e-12).all()
        assert abs(values.sum()) < 1e-9


def test_a_large_k_ignores_differences_below_the_best():
    values = max_at_k([0.0, 0.1, 0.2, 0.3, 1.0], k=4).values_K
    np.testing.assert_allclose(values, [-0.7, -0.7, -0.7, -0.7, 4 * 0.7])
    assert np.ptp(max_at_k([0.0, 0.1, 0.2, 0.3, 1.0], k=1).values_K[:4]) == pytest.approx(0.3 * 5 / 4)


def test_frontier_by_hand():
    """r = 0, 1, 3 and best = 2 with k = 1: c = 0, 0, 1. z(r) = (r - 4/3) / sqrt(14/9); z(c) = (-1, -1, 2) / sqrt(2)."""
    early, late = np.array([-4, -1, 5]) / math.sqrt(14), np.array([-1, -1, 2]) / math.sqrt(2)
    for weight in (0.0, 0.25, 1.0):
        result = frontier([0.0, 1.0, 3.0], k=1, best=2.0, weight=weight)
        np.testing.assert_allclose(result.values_K, (1 - weight) * early + weight * late)
        assert not result.empty
    # In any unit, with the best in the same unit.
    np.testing.assert_allclose(frontier([0.0, 1e-200, 3e-200], k=1, best=2e-200).values_K, late)


def test_a_group_that_adds_nothing_has_no_signal_late_and_only_the_groups_mean_before():
    rewards = [0.0, 1.0, 3.0]
    assert estimate_groups([rewards], "frontier", k=1, bests_G=[3.0], weight=1.0) == [None]
    (half,) = estimate_groups([rewards], "frontier", k=1, bests_G=[1e300], weight=0.5)
    assert half is not None
    np.testing.assert_allclose(half.values_K, 0.5 * np.array([-4, -1, 5]) / math.sqrt(14))
    assert advantage_metrics(estimate_groups([rewards, rewards], "frontier", k=1, bests_G=[3.0, None]))["groups/unused_frac"] == 0.5


def test_groups_smaller_than_k_have_no_signal():
    groups = [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0, 4.0]]
    assert [group is None for group in estimate_groups(groups, "max_at_k", k=4)] == [True, True, False]
    assert [group is None for group in estimate_groups(groups, "frontier", k=4)] == [True, False, False]
    assert (least_rollouts("max_at_k", 1), least_rollouts("frontier", 1)) == (2, 2)


def test_bad_arguments_are_refused_with_numbers():
    with pytest.raises(LearningError, match=r"k = 3 .* 3 rollouts.*1 to 2.*max_at_k"):
        max_at_k([0.0, 1.0, 2.0], k=3)
    with pytest.raises(LearningError, match=r"k = 4 .* 3 rollouts.*1 to 3"):
        frontier([0.0, 1.0, 2.0], k=4)
    with pytest.raises(LearningError, match=r"k = 0"):
        best_with_minus_without([0.0, 1.0], 0)
    for estimate in (max_at_k, frontier):
        with pytest.raises(LearningError, match="overflows"):
            estimate([1.7e308, -1.7e308, 0.0])
    for weight, best in ((-0.1, None), (math.nan, None), (0.5, math.inf)):
        with pytest.raises(ConfigError, match="weight"):
            frontier([0.0, 1.0], weight=weight, best=best)


def test_schedules_by_hand():
    assert [k_of_step(step, first=1, last=4, steps=7) for step in range(9)] == [1, 2, 2, 3, 3, 4, 4, 4, 4]  # 1.5, 2.5, 3.5 round up
    assert [k_of_step(step, first=8, last=2, steps=4) for step in range(5)] == [8, 6, 4, 2, 2]
    assert [k_of_step(step, first=3, last=3, steps=5) for step in range(3)] == [3, 3, 3]
    assert k_of_step(0, first=1, last=4, steps=1) == 4
    assert [weight_of_step(step, start=0, steps=5) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [weight_of_step(step, start=2, steps=3) for step in range(6)] == [0, 0, 0, 0.5, 1, 1]
    assert [weight_of_step(step, start=2, steps=1) for step in range(4)] == [0, 0, 1, 1]


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30))
def test_k_moves_steadily_between_its_ends(first, last, steps):
    values = [k_of_step(step, first=first, last=last, steps=steps) for step in range(steps)]
    assert values[-1] == last
    assert values[0] == (first if steps > 1 else last)
    assert values == sorted(values, reverse=last < first)
