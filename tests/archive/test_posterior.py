"""Posteriors by hand, against Bayes' rule in matrix form, and by simulation: intervals cover the truth as often as they say."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.archive.posterior import (
    Normal,
    child_posterior,
    difference_of_counts,
    estimate_prior,
    is_tie,
    lineage_posterior,
    lower_bound,
    priors_of_steps,
    shrink,
)
from discover_jax.exceptions import RunError

small = st.floats(-10, 10)
variances = st.floats(0, 10)


def test_difference_of_counts_by_hand():
    """Of 10 rows, 3 are right only for the child and 1 only for the parent: 0.2, and (4 - 4 / 10) / 100."""
    assert difference_of_counts(3, 1, 10) == pytest.approx((0.2, 0.036))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=50))
def test_difference_of_counts_is_that_of_the_rows(rows):
    """The mean of the differences row by row, and their variance about this mean."""
    parent, child = np.array(rows).T
    counts = (child & ~parent).sum(), (parent & ~child).sum(), len(rows)
    differences = child.astype(float) - parent
    assert difference_of_counts(*counts) == pytest.approx((differences.mean(), differences.var() / len(rows)), abs=1e-15)


def test_shrink_by_hand():
    """Prior N(1, 4), measurement 4 with variance 2: weight 2/3, mean 3, variance 4/3."""
    assert shrink(4.0, 2.0, 1.0, 4.0) == pytest.approx((3.0, 4 / 3))
    assert shrink(4.0, 0.0, 1.0, 4.0) == (4.0, 0.0)
    assert shrink(4.0, 2.0, 1.0, 0.0) == (1.0, 0.0)
    assert shrink(4.0, 0.0, 1.0, 0.0) == (4.0, 0.0)


@given(small, st.floats(1e-3, 10), small, st.floats(1e-3, 10))
def test_shrink_is_the_formula_with_precisions(x, s2, m, t2):
    mean, variance = shrink(x, s2, m, t2)
    assert mean == pytest.approx((m / t2 + x / s2) / (1 / t2 + 1 / s2), rel=1e-9, abs=1e-9)
    assert variance == pytest.approx(1 / (1 / t2 + 1 / s2), rel=1e-9)


def test_prior_by_hand():
    """Differences 0, 1, 2 with noise 0.1, 0.2, 0.3: mean 1, spread 1 - 0.2. With more noise than spread, 0."""
    assert estimate_prior([0.0, 1.0, 2.0], [0.1, 0.2, 0.3]) == pytest.approx((1.0, 0.8))
    assert estimate_prior([0.0, 1.0, 2.0], [2.0, 2.0, 2.0]) == pytest.approx((1.0, 0.0))


def test_prior_leaves_out_copies_and_broken_programs():
    prior = estimate_prior([0.0, 1.0, 2.0, 0.0, 0.0, -90.0], [0.1, 0.2, 0.3, 0.0, 0.0, 0.2])
    assert prior == pytest.approx((1.0, 0.8))
    everything = estimate_prior([0.0, 1.0, 2.0, -90.0], [0.1, 0.2, 0.3, 0.2], reach=math.inf)
    assert everything.variance > 1000


def test_broken_programs_and_rare_gains_have_broad_priors():
    """The others give N(1, 0.8); -90 is 91 away, and 20 is 19 away. A copy is near the rest."""
    d, v = [0.0, 1.0, 2.0, 0.0, -90.0, 20.0], [0.1, 0.2, 0.3, 0.0, 0.2, 0.2]
    prior = priors_of_steps(d, v)
    np.testing.assert_allclose(prior.mean, np.ones(6))
    np.testing.assert_allclose(prior.variance, [0.8, 0.8, 0.8, 0.8, 91.0**2, 19.0**2])
    np.testing.assert_array_equal(priors_of_steps([0.0, 0.0], [0.0, 0.0]).variance, [0.0, 0.0])


def test_a_broken_child_says_next_to_nothing_about_its_parent():
    rng = np.random.default_rng(5)
    d, v = np.append(rng.normal(-0.003, 0.006, 50), -0.3), np.append(np.full(50, 2e-5), 2e-4)
    x, s2 = np.append(0.8, 0.8 + d), np.full(52, 1e-4)
    parents, root = [-1] + [0] * 51, Normal(0.79, 1e-4)

    def first(children, step):
        kept = slice(0, children + 1)
        prior = Normal(np.append(0.0, step.mean)[kept], np.append(0.0, step.variance)[kept])
        return lineage_posterior(parents[kept], Normal(x[kept], s2[kept]), np.append(0.0, v)[kept], root=root, step=prior).mean[0]

    one = estimate_prior(d, v)
    without = first(50, Normal(np.full(50, one.mean), np.full(50, one.variance)))
    assert first(51, priors_of_steps(d, v)) == pytest.approx(without, abs=2e-4)
    assert first(51, Normal(np.full(51, one.mean), np.full(51, one.variance))) < without - 0.01


@pytest.mark.parametrize(("differences", "variances", "mean"), [([], [], 0.0), ([3.0], [1.0], 3.0), ([3.0, 5.0], [0.0, 1.0], 5.0)])
def test_prior_of_too_few_measurements(differences, variances, mean):
    assert estimate_prior(differences, variances) == (mean, 0.0)


def test_prior_is_unbiased_and_close():
    rng = np.random.default_rng(1)
    noise = rng.uniform(0.2, 2.0, (400, 60))
    found = [estimate_prior(rng.normal(0.5, 1.5, 60) + rng.normal(0, np.sqrt(v)), v, reach=math.inf) for v in noise]
    assert np.mean([prior.mean for prior in found]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([prior.variance for prior in found]) == pytest.approx(2.25, abs=0.1)


@given(small, variances, st.floats(0.1, 10), small, small, st.floats(0, 5), small, variances)
def test_child_with_independent_difference_is_the_shrunken_difference(a, spread, s2, x, d, v, m, t2):
    """rho = 1 and q = v if the child's noise is the parent's plus that of the difference."""
    child = child_posterior(Normal(a, spread), Normal(x, s2), Normal(x + d, s2 + v), v, Normal(m, t2))
    step = shrink(d, v, m, t2)
    if v > 1e-6 or v == 0 == t2 or t2 > 1e-6:
        assert child.variance == pytest.approx(spread + step.variance, rel=1e-6, abs=1e-6)
        if not (v == 0 and t2 == 0):
            assert child.mean == pytest.approx(a + step.mean, rel=1e-6, abs=1e-6)


@given(small, variances, small, st.floats(0.1, 10), small, st.floats(0.1, 10), small, variances)
def test_child_on_other_rows_is_shrunk_towards_its_parent(a, spread, x_p, s2_p, x_c, s2_c, m, t2):
    child = child_posterior(Normal(a, spread), Normal(x_p, s2_p), Normal(x_c, s2_c), s2_p + s2_c, Normal(m, t2))
    assert child == pytest.approx(shrink(x_c, s2_c, a + m, spread + t2), rel=1e-9, abs=1e-9)


def test_a_copy_has_the_posterior_of_its_parent():
    child = child_posterior(Normal(0.79, 1e-4), Normal(0.81, 2e-4), Normal(0.81, 2e-4), 0.0, Normal(-0.01, 3e-5))
    assert child == pytest.approx((0.79, 1e-4))


def joint_posterior(parents, x, s2, v, root, step):
    """True scores and scores of a tree as one normal vector, conditioned on all scores by matrices."""
    n = len(x)
    mean, truth, noise = np.zeros(n), np.zeros((n, n)), np.zeros((n, n))
    for i, p in enumerate(parents):
        rho = 0.0 if p < 0 else (s2[p] + s2[i] - v[i]) / (2 * s2[p])
        mean[i] = root.mean if p < 0 else mean[p] + step.mean
        if p >= 0:
            truth[i, :i] = truth[:i, i] = truth[p, :i]
            noise[i, :i] = noise[:i, i] = rho * noise[p, :i]
        truth[i, i], noise[i, i] = root.variance if p < 0 else truth[p, p] + step.variance, s2[i]
    gain = truth @ np.linalg.inv(truth + noise)
    return Normal(mean + gain @ (np.asarray(x) - mean), np.diag(truth - gain @ truth))


@pytest.mark.parametrize("seed", range(5))
def test_lineage_is_bayes_rule_on_all_scores(seed):
    rng = np.random.default_rng(seed)
    parents = [-1, 0, 0, -1, 1, 3, 4, 4, 0]
    x, s2, v = rng.normal(0.8, 0.01, 9), rng.uniform(0.9e-4, 1.1e-4, 9), rng.uniform(1e-5, 8e-5, 9)
    root, step = Normal(0.75, 4e-4), Normal(-0.003, 2e-5)
    found, expected = lineage_posterior(parents, Normal(x, s2), v, root=root, step=step), joint_posterior(parents, x, s2, v, root, step)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9)
    np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-7)


def test_the_last_of_a_chain_follows_from_its_parent():
    """Nobody descends from it, so its posterior is `child_posterior` of its parent's without it."""
    x, s2, v = np.array([0.78, 0.80, 0.79]), np.array([1.1e-4, 1.0e-4, 1.2e-4]), np.array([math.nan, 3e-5, 4e-5])
    root, step = Normal(0.75, 4e-4), Normal(-0.003, 2e-5)
    before = lineage_posterior([-1, 0], Normal(x[:2], s2[:2]), v[:2], root=root, step=step)
    parent = Normal(before.mean[1], before.variance[1])
    child = child_posterior(parent, Normal(x[1], s2[1]), Normal(x[2], s2[2]), v[2], step)
    found = lineage_posterior([-1, 0, 1], Normal(x, s2), v, root=root, step=step)
    assert (found.mean[2], found.variance[2]) == pytest.approx(child)
    assert lineage_posterior([], Normal([], []), [], root=root, step=step).mean.shape == (0,)


def test_copies_say_nothing_new_and_priors_may_differ_between_programs():
    x, s2 = np.array([0.80, 0.80, 0.80, 0.75]), np.full(4, 1e-4)
    root = Normal(np.array([0.75, 0.0, 0.0, 0.70]), np.array([4e-4, 0.0, 0.0, 1e-4]))
    step = Normal(np.full(4, -0.003), np.array([0.0, 2e-5, 0.0, 0.0]))
    found = lineage_posterior([-1, 0, 1, -1], Normal(x, s2), [0, 0, 0, 0], root=root, step=step)
    alone = shrink(0.80, 1e-4, 0.75, 4e-4)
    np.testing.assert_allclose(found.mean, [alone.mean] * 3 + [0.725])
    np.testing.assert_allclose(found.variance, [alone.variance] * 3 + [5e-5])


def test_children_that_score_less_lower_the_estimate_of_their_parent():
    root, step = Normal(0.78, 1e-4), Normal(0.0, 1e-5)
    x = np.array([0.80] + [0.795] * 20)
    found = lineage_posterior([-1] + [0] * 20, Normal(x, np.full(21, 1e-4)), [0.0] + [4e-5] * 20, root=root, step=step)
    assert found.mean[0] < shrink(0.80, 1e-4, 0.78, 1e-4).mean - 0.002


def search(rng, s, rho, root, step, programs=60):
    """A greedy search on raw scores; noise follows the lineage with correlation rho. Returns parents, true scores, scores."""
    parents, truth, noise = [-1] * 4, list(rng.normal(root.mean, root.variance**0.5, 4)), list(rng.normal(0, s, 4))
    for _ in range(programs):
        best = int(np.argmax(np.add(truth, noise)))
        parents.append(best)
        truth.append(truth[best] + rng.normal(step.mean, step.variance**0.5))
        noise.append(rho * noise[best] + rng.normal(0, s * (1 - rho**2) ** 0.5))
    return parents, np.array(truth), np.add(truth, noise)


def test_intervals_cover_the_truth_even_of_the_luckiest_program():
    """Selection does not bias a posterior: all that selected is in it. The raw score of the best program is far too high."""
    s, rho, root, step = 0.01, 0.85, Normal(0.78, 0.02**2), Normal(-0.003, 0.006**2)
    rng, gaps, covered, raw = np.random.default_rng(3), [], [], []
    for _ in range(300):
        parents, truth, scores = search(rng, s, rho, root, step)
        known = np.full(len(scores), s**2)
        mean, variance = lineage_posterior(parents, Normal(scores, known), 2 * (1 - rho) * known, root=root, step=step)
        covered.append(np.abs(mean - truth) <= 1.96 * np.sqrt(variance))
        best = int(np.argmax(scores))
        gaps.append(mean[best] - truth[best])
        raw.append(scores[best] - truth[best])
    # Programs of a run are alike, so there are hardly more than 300 independent ones.
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)
    assert np.mean(np.array(covered)[:, -20:]) == pytest.approx(0.95, abs=0.035)
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / math.sqrt(300)
    assert np.mean(raw) > 0.008


def test_variances_from_rows_are_those_of_repeated_measurements():
    """Rows have a difficulty; two programs that resemble each other are right on mostly the same rows."""
    rng = np.random.default_rng(4)
    shared, changed = rng.random((2000, 400)) < 0.8, rng.random((2000, 400)) < 0.15
    parent = shared
    child = np.where(changed, rng.random((2000, 400)) < 0.85, shared)
    difference, variance = difference_of_counts((child & ~parent).sum(axis=1), (parent & ~child).sum(axis=1), 400)
    assert variance.mean() == pytest.approx(difference.var(), rel=0.1)
    assert difference.mean() == pytest.approx(0.15 * 0.05, abs=0.001)
    assert parent.mean(axis=1).var() > 2 * variance.mean()


def test_ties_and_lower_bounds():
    assert is_tie(0.019, 1e-4)
    assert not is_tie(0.020, 1e-4)
    assert is_tie(0.0, 0.0)
    assert not is_tie(-1e-9, 0.0)
    np.testing.assert_allclose(lower_bound(Normal([0.8, 0.81], [1e-4, 4e-4]), z=1.0), [0.79, 0.79])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: shrink(math.nan, 1.0, 0.0, 1.0), r"finite.*nan"),
        (lambda: difference_of_counts(3, 3, 5), "b \\+ c at most n"),
        (lambda: shrink(1.0, -2.0, 0.0, 1.0), r"variance.*-2\.0"),
        (lambda: estimate_prior([1.0, 2.0], [1.0]), "2 differences and 1 variances"),
        (lambda: lineage_posterior([-1, 1], Normal([1, 2], [1, 1]), [0, 1], root=Normal(0, 1), step=Normal(0, 1)), r"\[1\] have \[1\]"),
        (lambda: lineage_posterior([-1, 0], Normal([1, 2], [1, 1]), [0], root=Normal(0, 1), step=Normal(0, 1)), "one length"),
        (lambda: lineage_posterior([-1, 0], Normal([1, 2], [1, 1]), [0, -1], root=Normal(0, 1), step=Normal(0, 1)), "difference_var"),
    ],
)
def test_bad_arguments_are_refused_with_numbers(call, words):
    with pytest.raises(RunError, match=words) as caught:
        call()
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), RunError)
