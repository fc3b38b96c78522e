"""Compared with fractions and with sums written naively."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.tasks.problem import Rejection
from discover_jax.tasks.problems import exact

finite = st.floats(allow_nan=False, allow_infinity=False)
naturals = st.lists(st.integers(0, 2**80), min_size=1, max_size=12).filter(any)


@given(st.lists(finite, min_size=1, max_size=9))
def test_scaled_integers_are_the_same_numbers(values):
    integers, one = exact.scaled_integers(np.array(values))
    assert [Fraction(integer, one) for integer in integers] == [Fraction(value) for value in values]


@given(naturals, naturals)
def test_convolution_is_that_of_the_definition(first, second):
    expected = [0] * (len(first) + len(second) - 1)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            expected[i + j] += a * b
    assert exact.convolution(first, second) == expected


def test_convolution_of_zeros():
    assert exact.convolution([0, 0], [0, 5]) == [0, 0, 0]


@given(st.fractions())
def test_rounding_encloses_the_value(value):
    below, above = exact.float_at_most(value), exact.float_at_least(value)
    assert Fraction(below) <= value <= Fraction(above)
    assert above in (below, math.nextafter(below, math.inf))


@pytest.mark.parametrize("value", [[1, 2.5], (1.0, 2.5), np.array([1, 2.5]), np.array([1, 2.5], np.float32)])
def test_the_same_numbers_in_other_containers(value):
    numbers = exact.checked_floats("heights", value, range(1, 3))
    assert numbers.dtype == np.float64
    assert numbers.tolist() == [1.0, 2.5]


@pytest.mark.parametrize("value", [[], [0.5] * 4, np.zeros(0), np.zeros((2, 2)), [[0.5], [0.5]], [2**53 + 1]])
def test_other_shapes_and_integers_that_are_no_doubles(value):
    with pytest.raises(Rejection, match="heights"):
        exact.checked_floats("heights", value, range(1, 4))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint64, np.float16])
def test_small_numbers_of_every_type(kind):
    assert exact.checked_floats("heights", np.array([0, 7], kind), range(2, 3)).tolist() == [0.0, 7.0]


def test_rows():
    assert exact.checked_floats("centers", [[0, 1], np.array([2.0, 3.0])], range(2, 3), columns=2).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(Rejection, match=r"centers\[1\] must have length 2"):
        exact.checked_floats("centers", [[0, 1], [2]], range(2, 3), columns=2)
    with pytest.raises(Rejection, match=r"centers must be finite; centers\[1\]\[0\] is nan"):
        exact.checked_floats("centers", np.array([[0, 1], [np.nan, 2]]), range(2, 3), columns=2)
