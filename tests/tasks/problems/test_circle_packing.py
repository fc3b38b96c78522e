"""The verifier against fractions, one-ulp violations and hostile values."""

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
from discover_jax.tasks.problems.circle_packing import PROBLEM_26, PROBLEM_32, check_packing

up = math.inf


def grid(count=26):
    """A valid packing: a 6 x 6 grid of circles that stay clear of each other."""
    centers = [((i % 6 + 0.5) / 6, (i // 6 + 0.5) / 6) for i in range(count)]
    return centers, [0.08] * count


def with_item(values, index, item):
    return [*values[:index], item, *values[index + 1 :]]


@pytest.mark.parametrize(("problem", "score"), [(PROBLEM_26, 2.369796095), (PROBLEM_32, 2.717115117)])
def test_seed_program(problem, score):
    evaluation = problem.evaluate(InProcess(problem.seed_program))
    assert evaluation.score == pytest.approx(score, abs=1e-6)
    assert "touch" in evaluation.feedback


def test_score_is_the_sum_rounded_down():
    centers, radii = grid()
    exact = sum(map(Fraction, radii))
    score = check_packing([centers, radii], 26).score
    assert Fraction(score) <= exact < Fraction(math.nextafter(score, up))


def violations(centers, radii):
    """Naively, in fractions: what is outside and what overlaps."""
    circles = [(Fraction(x), Fraction(y), Fraction(r)) for (x, y), r in zip(centers, radii, strict=True)]
    outside = sum(x - r < 0 or x + r > 1 or y - r < 0 or y + r > 1 for x, y, r in circles)
    overlaps = sum((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < (a[2] + b[2]) ** 2 for i, a in enumerate(circles) for b in circles[:i])
    return outside, overlaps


def test_verifier_agrees_with_fractions_on_random_packings():
    rng = np.random.RandomState(0)
    verdicts = set()
    for _ in range(300):
        count = rng.randint(1, 6)
        centers, radii = rng.rand(count, 2), rng.rand(count) * rng.choice([0.1, 0.3])
        outside, overlaps = violations(centers.tolist(), radii.tolist())
        try:
            assert check_packing([centers, radii], count).score == pytest.approx(radii.sum(), abs=1e-12)
            verdict = "valid"
        except Rejection as rejection:
            verdict = "leaves" if "leaves the square" in str(rejection) else "overlap"
        assert verdict == ("leaves" if outside else "overlap" if overlaps else "valid")
        verdicts.add(verdict)
    assert verdicts == {"valid", "leaves", "overlap"}


@given(st.sampled_from([(0, 1, 1), (3, 4, 5), (5, 12, 13), (8, 15, 17)]), st.integers(1, 2**20), st.floats(0.01, 0.99))
def test_circles_that_touch_exactly_and_one_ulp_more(triangle, multiple, share):
    """The centers differ by the sides of a triangle of integers, in units of 2^-26, so the distance is a double too."""
    x, y, distance = (side * multiple for side in triangle)
    first = max(1, int(distance * share)) if distance > 1 else 0.5
    radii = [first * 2.0**-26, (distance - first) * 2.0**-26]
    centers = [(0.375, 0.375), (0.375 + x * 2.0**-26, 0.375 + y * 2.0**-26)]
    assert violations(centers, radii) == (0, 0)
    assert check_packing([centers, radii], 2).score == radii[0] + radii[1]
    for more in ([math.nextafter(radii[0], up), radii[1]], [radii[0], math.nextafter(radii[1], up)]):
        with pytest.raises(Rejection, match="Circles 0 and 1 overlap"):
            check_packing([centers, more], 2)


@given(st.integers(1, 2**40), st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1)]))
def test_circles_that_touch_a_side_exactly_and_one_ulp_more(a, corner):
    radius = a * 2.0**-42
    center = [abs(side - radius) for side in corner]  # exact: a multiple of 2^-42 below 1
    assert check_packing([[center], [radius]], 1).score == radius
    with pytest.raises(Rejection, match="Circle 0 leaves the square"):
        check_packing([[center], [math.nextafter(radius, up)]], 1)


def test_amounts_of_violations():
    centers, radii = [(0.25, 0.5), (0.75, 0.5)], [0.25, 0.25]
    assert check_packing([centers, radii], 2).score == 0.5
    with pytest.raises(Rejection, match="Circles 0 and 1 overlap: their distance is 1e-09 smaller"):
        check_packing([[(0.25 + 1e-9, 0.5), (0.75, 0.5)], [0.25, 0.25]], 2)
    with pytest.raises(Rejection, match=r"Circle 1 leaves the square: it crosses the upper side by 0\.125.* 3 sides"):
        check_packing([[(0.25, 0.25), (0.75, 0.875)], [0.25 + 1e-9, 0.25]], 2)


def test_tiny_circles_do_not_vanish():
    tiny = 5e-324
    assert check_packing([[(0.5, 0.5), (0.25, 0.5)], [tiny, tiny]], 2).score == 2 * tiny
    with pytest.raises(Rejection, match="overlap"):
        check_packing([[(0.5, 0.5), (0.5, 0.5)], [tiny, tiny]], 2)


def test_a_valid_sum_of_4_is_not_possible():
    """openevolve's evaluator accepted NaN centers with any radii."""
    with pytest.raises(Rejection, match="centers must be finite"):
        check_packing([np.full((26, 2), np.nan), np.full(26, 4 / 26)], 26)
    with pytest.raises(Rejection, match=r"leaves the square|overlap"):
        check_packing([np.full((26, 2), 0.5), np.full(26, 4 / 26)], 26)


def test_radii_at_a_tolerance():
    """ThetaEvolve's packing holds only with a tolerance of 1e-7."""
    with pytest.raises(Rejection, match="1e-07 smaller"):
        check_packing([[(0.25, 0.25), (0.75 - 1e-7, 0.25)], [0.25, 0.25]], 2)


def test_claimed_sum():
    with pytest.raises(Rejection, match="The sum of the radii is computed here"):
        check_packing([*grid(), 4.0], 26)


@pytest.mark.parametrize("count", [0, 1, 25, 27, 32, 10**6])
def test_another_number_of_circles(count):
    with pytest.raises(Rejection, match="centers must have length 26"):
        check_packing([[(0.5, 0.5)] * count, [1e-9] * count], 26)
    with pytest.raises(Rejection, match="radii must have length 26"):
        check_packing([grid()[0], [1e-9] * count], 26)


@pytest.mark.parametrize("radius", [0, 0.0, -0.0, -0.01, -5e-324])
def test_radii_that_are_not_positive(radius):
    centers, radii = grid()
    with pytest.raises(Rejection, match=r"radii must be positive; radii\[3\]"):
        check_packing([centers, with_item(radii, 3, radius)], 26)


@pytest.mark.parametrize("value", hostile.NO_LISTS.values(), ids=hostile.NO_LISTS.keys())
def test_no_lists(value):
    centers, radii = grid()
    for returned in (value, [value, radii], [centers, value]):
        with pytest.raises(Rejection, match="must be a list or an array"):
            PROBLEM_26.evaluate(Returns(returned))
    with pytest.raises(Rejection, match=r"centers\[25\] must be a list or an array"):
        check_packing([with_item(centers, 25, value), radii], 26)


@pytest.mark.parametrize(("value", "word"), hostile.NO_NUMBERS.values(), ids=hostile.NO_NUMBERS.keys())
def test_no_numbers(value, word):
    centers, radii = grid()
    with pytest.raises(Rejection, match=rf"radii\[7\].*{word}|radii must be {word}"):
        check_packing([centers, with_item(radii, 7, value)], 26)
    with pytest.raises(Rejection, match=rf"centers\[7\]\[1\].*{word}|centers\[7\] must be {word}"):
        check_packing([with_item(centers, 7, (0.5, value)), radii], 26)


@pytest.mark.parametrize("name", hostile.arrays((26,)))
def test_hostile_arrays(name):
    centers, radii = grid()
    value, word = hostile.arrays((26,))[name]
    with pytest.raises(Rejection, match="radii.*" + re.escape(word)):
        check_packing([centers, value], 26)
    value, word = hostile.arrays((26, 2))[name]
    with pytest.raises(Rejection, match="centers.*" + re.escape(word)):
        check_packing([value, radii], 26)


@pytest.mark.parametrize("centers", [hostile.nested(1000), [hostile.nested(1000)] * 26, [[0.5]] * 26, [[0.5, 0.5, 0.5]] * 26])
def test_other_nesting(centers):
    with pytest.raises(Rejection, match="centers"):
        check_packing([centers, grid()[1]], 26)
