"""Checked arrays of doubles, and exact arithmetic on them: scaled integers, convolutions, and rounding in a chosen direction.

A double is an integer times a power of two. So sums, products and comparisons of doubles are exact in Python's integers, and a verifier
needs no tolerance.
"""

import decimal
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from discover_jax.tasks.problem import Rejection

_LARGEST_INT = 2**53
"""Up to here every integer is a double."""


def kind_of(value: Any) -> str:
    """A short text that says what a returned value is. It never prints a value whose size has no bound."""
    if type(value) is np.ndarray:
        return f"an array of shape {value.shape} and type {value.dtype}"
    if type(value) in (list, tuple):
        return f"a {type(value).__name__} of length {len(value)}"
    if value is None or type(value) is bool or type(value) is float:
        return repr(value)
    if type(value) is int and abs(value) <= 2**64:
        return repr(value)
    return f"a value of type {type(value).__name__}"


def checked_list(name: str, value: Any, lengths: range) -> list[Any]:
    """The items of a list, tuple or array whose length is in `lengths`.

    Raises:
      Rejection: the value is something else, or its length is not allowed.
    """
    allowed = f"{lengths.start}" if len(lengths) == 1 else f"{lengths.start:,} to {lengths.stop - 1:,}"
    if type(value) not in (list, tuple, np.ndarray) or (type(value) is np.ndarray and not value.ndim):
        raise Rejection(f"{name} must be a list or an array of length {allowed}; got {kind_of(value)}.")
    if len(value) not in lengths:
        raise Rejection(f"{name} must have length {allowed}; got {kind_of(value)}.")
    return list(value)


def checked_floats(name: str, value: Any, lengths: range, columns: int | None = None) -> np.ndarray:
    """A returned list or array as float64, the same numbers exactly.

    Args:
      name: of the value, for the reason of a rejection.
      value: untrusted. Lists must hold Python floats and integers. Booleans, strings and subclasses are refused.
      lengths: allowed lengths.
      columns: length of each row; by default, the value is one-dimensional.

    Returns:
      Finite float64 of shape (N,) or (N, columns).

    Raises:
      Rejection: type, length or a number is not allowed.
    """
    rows = checked_list(name, value, lengths)
    if type(value) is np.ndarray:
        numbers = _of_array(name, value, columns)
    elif columns is None:
        numbers = np.array([_of_number(f"{name}[{index}]", item) for index, item in enumerate(rows)])
    else:
        parts = [checked_floats(f"{name}[{index}]", row, range(columns, columns + 1)) for index, row in enumerate(rows)]
        numbers = np.array(parts).reshape(len(rows), columns)
    if not np.isfinite(numbers).all():
        index = np.argwhere(~np.isfinite(numbers))[0]
        where = "".join(f"[{position}]" for position in index)
        raise Rejection(f"{name} must be finite; {name}{where} is {numbers[tuple(index)]}.")
    return numbers


def _of_array(name: str, value: np.ndarray, columns: int | None) -> np.ndarray:
    if value.shape[1:] != (() if columns is None else (columns,)):
        shape = "(N,)" if columns is None else f"(N, {columns})"
        raise Rejection(f"{name} must have shape {shape}; got {kind_of(value)}.")
    if value.dtype.kind not in "iuf" or value.dtype.itemsize > 8:
        raise Rejection(f"{name} must be of type float64; got {kind_of(value)}.")
    if value.dtype.kind in "iu" and ((value > _LARGEST_INT) | (value < -_LARGEST_INT)).any():
        raise Rejection(f"{name} has integers beyond 2^53; return float64.")
    return value.astype(np.float64)


def _of_number(name: str, value: Any) -> float:
    if type(value) is int and abs(value) <= _LARGEST_INT:
        return float(value)
    if type(value) is not float:
        raise Rejection(f"{name} must be a float; got {kind_of(value)}.")
    return value


def scaled_integers(values_N: np.ndarray) -> tuple[list[int], int]:
    """Integers, and their common denominator, a power of two: `values_N[i]` equals `integers_N[i] / denominator` exactly."""
    ratios_N = [value.as_integer_ratio() for value in values_N.tolist()]
    denominator = max(below for _, below in ratios_N)
    return [above * (denominator // below) for above, below in ratios_N], denominator


def convolution(first_N: Sequence[int], second_M: Sequence[int]) -> list[int]:
    """The exact sums over i of first[i] * second[k - i], for k from 0 to N + M - 2, of integers that are at least 0.

    Each sequence becomes one large number whose digits, in groups, are its items. The groups of digits of the product are the sums
    (Kronecker's substitution). `decimal` multiplies large numbers by number-theoretic transforms, so the time is almost linear in digits.
    """
    width = len(str(min(len(first_N), len(second_M)) * max(first_N) * max(second_M)))
    sums = len(first_N) + len(second_M) - 1
    context = decimal.Context(
        prec=width * (sums + 1), Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[decimal.Inexact, decimal.Overflow]
    )
    first, second = (context.create_decimal("".join(str(item).zfill(width) for item in items)) for items in (first_N, second_M))
    digits = str(context.multiply(first, second)).zfill(width * sums)
    return [int(digits[start : start + width]) for start in range(0, width * sums, width)]


def float_at_most(value: Fraction) -> float:
    """The largest double that is not above the value."""
    nearest = float(value)
    return nearest if Fraction(nearest) <= value else math.nextafter(nearest, -math.inf)


def float_at_least(value: Fraction) -> float:
    """The smallest double that is not below the value."""
    return -float_at_most(-value)
