"""The verifiers of erdos-overlap and the autocorrelation inequalities against known values, fractions, dense numerical integration, and
hostile values."""

import itertools
import math
import re
from fractions import Fraction

import hostile
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import InProcess, Returns

from discover_jax.tasks.problem import Rejection
from discover_jax.tasks.problems import autocorrelation, erdos_overlap
from discover_jax.tasks.problems.autocorrelation import check_first, check_second
from discover_jax.tasks.problems.erdos_overlap import check_step_function

CHECKS = {"erdos-overlap": check_step_function, "autocorrelation-1": check_first, "autocorrelation-2": check_second}
PROBLEMS = {problem.id: problem for problem in (erdos_overlap.PROBLEM, autocorrelation.PROBLEM_1, autocorrelation.PROBLEM_2)}
every_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
heights = st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(any)


def sums(first, second):
    """first * second, naively."""
    result = [0] * (len(first) + len(second) - 1)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            result[i + j] += a * b
    return result


def exact_overlap(a):
    """C(h) in fractions, from its definition: rescale, then try every shift."""
    a, n = [Fraction(value) for value in a], len(a)
    if sum(a) < Fraction(n, 2):
        h = [1 - (1 - value) * Fraction(n, 2) / (n - sum(a)) for value in a]
    else:
        h = [value * Fraction(n, 2) / sum(a) for value in a]
    assert sum(h) * Fraction(2, n) == 1
    assert all(0 <= value <= 1 for value in h)
    return max(Fraction(2, n) * sum(h[i] * (1 - h[i + k]) for i in range(n) if 0 <= i + k < n) for k in range(-n + 1, n))


def exact_first(a):
    a = [Fraction(value) for value in a]
    return 2 * len(a) * max(sums(a, a)) / sum(a) ** 2


def exact_second(a):
    """Simpson's rule is exact for the square of a linear piece."""
    a = [Fraction(value) for value in a]
    c = [0, *sums(a, a), 0]
    square = sum(u**2 + 4 * ((u + v) / 2) ** 2 + v**2 for u, v in itertools.pairwise(c)) / 6
    return square / (sum((u + v) / 2 for u, v in itertools.pairwise(c)) * max(c))


@given(heights)
def test_overlap_is_exact_and_rounded_up(values):
    score, exact = check_step_function(values).score, exact_overlap(values)
    assert math.nextafter(score, 0) < exact <= Fraction(score)


@given(heights)
def test_first_is_exact_and_rounded_up(values):
    score, exact = check_first(values).score, exact_first(values)
    assert math.nextafter(score, 0) < exact <= Fraction(score)


@given(heights)
def test_second_is_exact_and_rounded_down(values):
    score, exact = check_second(values).score, exact_second(values)
    assert Fraction(score) <= exact < math.nextafter(score, math.inf)


def integral(function, low, high, points=50_001):
    """By the midpoint rule."""
    x = low + (high - low) * (np.arange(points) + 0.5) / points
    return function(x).mean() * (high - low)


def stepped(values, low, high):
    """The step function on [low, high], zero elsewhere."""

    def f(x):
        index = np.floor((x - low) / (high - low) * len(values)).astype(int)
        return np.where((index >= 0) & (index < len(values)), np.asarray(values)[np.clip(index, 0, len(values) - 1)], 0.0)

    return f


def test_agreement_with_dense_integration():
    """Integrals over 50,000 points at shifts that are no breakpoints too: no shift is above the score, one comes close."""
    rng = np.random.RandomState(1)
    for pieces in (5, 8):
        values = rng.rand(pieces)
        values = 0.5 + (values - values.mean()) / 2  # mean 1/2
        h = stepped(values, 0, 2)
        overlaps = [
            integral(lambda x, k=k, h=h: h(x) * (1 - h(x + k)) * ((x + k >= 0) & (x + k <= 2)), 0, 2)
            for k in np.linspace(-2, 2, 8 * pieces + 1)
        ]
        assert max(overlaps) == pytest.approx(check_step_function(values).score, abs=1e-4)
        f = stepped(values, -0.25, 0.25)
        t = np.linspace(-0.5, 0.5, 8 * pieces + 1)
        squares = np.array([integral(lambda x, t=t, f=f: f(x) * f(t - x), -0.25, 0.25) for t in t])
        assert squares.max() / integral(f, -0.25, 0.25) ** 2 == pytest.approx(check_first(values).score, abs=1e-4)
        fine = np.linspace(-0.5, 0.5, 50_001)
        between = np.interp(fine, t, squares)
        second = (between**2).mean() / (between.mean() * between.max())
        assert second == pytest.approx(check_second(values).score, abs=1e-4)


def test_agreement_with_float64_convolution_on_many_pieces():
    rng = np.random.RandomState(2)
    for pieces in (100, 700):
        f = rng.rand(pieces) ** 3
        c = np.convolve(f, f)
        assert check_first(f).score == pytest.approx(2 * pieces * c.max() / f.sum() ** 2, rel=1e-9)
        u, v = np.append(0, c), np.append(c, 0)
        assert check_second(f).score == pytest.approx((u * u + u * v + v * v).sum() / (3 * c.sum() * c.max()), rel=1e-9)
        h = 1 - (1 - f) * pieces / 2 / (1 - f).sum()
        assert check_step_function(f).score == pytest.approx(np.correlate(h, 1 - h, "full").max() * 2 / pieces, rel=1e-9)


def test_known_values():
    for values in ([0.5], [0.5] * 7, [0.3, 0.3], [1.0] * 3):
        assert check_step_function(values).score == 0.5  # constant h = 1/2
    assert check_step_function([1, 0]).score == 1.0
    for values in ([1], [0.1] * 5, [5e-324, 5e-324], [1e308] * 3):
        assert check_first(values).score == 2.0  # f * f of an indicator is a triangle
        assert check_second(values).score == math.nextafter(2 / 3, 1) or check_second(values).score == 2 / 3
    assert Fraction(check_second([1]).score) < Fraction(2, 3)


def test_values_of_haugland():
    """The record-holders with 1 to 4 steps at http://www.neutreeko.net/mop.htm: 1/2, 4/9, 2/5, 2/5."""
    assert check_step_function([0.5]).score == 1 / 2
    assert check_step_function([1 / 3, 2 / 3]).score == pytest.approx(4 / 9, abs=1e-15)
    outer, inner = 1 / 2 - 1 / 40**0.5, 1 / 2 + 1 / 10**0.5
    assert check_step_function([outer, inner, outer]).score == pytest.approx(2 / 5, abs=1e-15)
    outer, inner = 1 / 2 - 1 / 20**0.5, 1 / 2 + 1 / 20**0.5
    assert check_step_function([outer, inner, inner, outer]).score == pytest.approx(2 / 5, abs=1e-15)


def test_values_by_hand():
    # Shift 0.5, in units of the pieces' width 0.5: 1 (1 - 0) for the second 1.
    assert check_step_function([0, 1, 1, 0]).score == 0.5
    # Shift 0.5: 1/4 (1 - 3/4) + 3/4 (1 - 3/4) + 3/4 (1 - 1/4) = 13/16.
    assert check_step_function([0.25, 0.75, 0.75, 0.25]).score == 13 / 32
    # f * f has 1, 0, 2, 0, 1 at the inner breakpoints.
    assert check_first([1, 0, 1]).score == 2 * 3 * 2 / 2**2
    assert check_second([1, 0, 1]).score == 2 * (1 + 4 + 1) / (3 * 4 * 2)


@pytest.mark.parametrize("pieces", [1, 2, 3, 10])
def test_symmetries(pieces):
    rng = np.random.RandomState(pieces)
    f = rng.randint(0, 2**20, pieces) / 2**20
    f[0] = 0.5
    for check in CHECKS.values():
        assert check(f[::-1].copy()).score == check(f).score  # mirror image
        assert check(np.repeat(f, 3)).score == check(f).score  # split pieces
    assert check_step_function(1 - f).score == check_step_function(f).score
    for check in (check_first, check_second):
        assert check(f * 2.0**900).score == check(f).score


def test_one_ulp_outside():
    check_step_function([0.0, 1.0])
    for index, value in enumerate((-5e-324, math.nextafter(1, 2))):
        values = [0.5, 0.5]
        values[index] = value
        with pytest.raises(Rejection, match=rf"heights must be in \[0, 1\]; heights\[{index}\] is {re.escape(repr(value))}"):
            check_step_function(values)
    for check in (check_first, check_second):
        with pytest.raises(Rejection, match=r"heights must not be negative; heights\[1\] is -5e-324"):
            check([0.5, -5e-324])


@pytest.mark.parametrize("check", [check_first, check_second])
def test_all_zero(check):
    for values in ([0.0], [0, -0.0]):
        with pytest.raises(Rejection, match="must not all be 0"):
            check(values)


def test_all_zero_is_constant():
    assert check_step_function([0.0, 0.0]).score == 0.5


@pytest.mark.parametrize(
    ("id", "score"), [("erdos-overlap", 0.3893779441), ("autocorrelation-1", 1.6936241216), ("autocorrelation-2", 0.7447766760)]
)
def test_seed_program(id, score):
    evaluation = PROBLEMS[id].evaluate(InProcess(PROBLEMS[id].seed_program))
    assert evaluation.score == pytest.approx(score, abs=1e-6)
    assert "within a millionth" in evaluation.feedback


@every_check
@pytest.mark.parametrize("value", hostile.NO_LISTS.values(), ids=hostile.NO_LISTS.keys())
def test_no_lists(check, value):
    with pytest.raises(Rejection, match="heights must be a list or an array"):
        check(value)


@every_check
@pytest.mark.parametrize(("value", "word"), hostile.NO_NUMBERS.values(), ids=hostile.NO_NUMBERS.keys())
def test_no_numbers(check, value, word):
    with pytest.raises(Rejection, match=rf"heights\[1\].*{word}|heights must be {word}"):
        check([0.5, value, 0.5])


@every_check
@pytest.mark.parametrize("name", hostile.arrays((26,)))
def test_hostile_arrays(check, name):
    value, word = hostile.arrays((26,))[name]
    with pytest.raises(Rejection, match="heights.*" + re.escape(word)):
        check(value)


@every_check
@pytest.mark.parametrize("value", [[], [0.5] * 30_001, hostile.nested(1000), [[0.5, 0.5]], [[0.5], [0.5, 0.5]], [[0.5], 0.5]])
def test_other_lists(check, value):
    with pytest.raises(Rejection, match="heights"):
        check(value)


@every_check
def test_a_claimed_score_beside_the_function(check):
    """TTT-Discover's programs return (heights, claimed bound, number of points)."""
    with pytest.raises(Rejection, match=r"heights\[0\] must be a float; got a list of length 2"):
        check([[0.5, 0.5], 0.38, 2])


def test_evaluate_checks_what_run_returned():
    for problem in PROBLEMS.values():
        with pytest.raises(Rejection, match="heights"):
            problem.evaluate(Returns("0.38"))
