"""autocorrelation-1 and autocorrelation-2: step functions that bound the constants of two autoconvolution inequalities.

Both are in AlphaEvolve's appendix B (B.1 and B.2) and in TTT-Discover (arXiv 2601.16175). With (f * f)(t) the integral of f(t - x) f(x),
for all nonnegative f:

1. max of f * f over [-1/2, 1/2] >= C1 (integral of f over [-1/4, 1/4])^2. Every f on [-1/4, 1/4] bounds the largest such C1 from above.
2. (2-norm of f * f)^2 <= C2 (1-norm of f * f) (maximum of f * f). Every f bounds the smallest such C2 from below.
"""

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from discover_jax.tasks.problem import Evaluation, Problem, Program, Record, Rejection
from discover_jax.tasks.problems.exact import checked_floats, convolution, float_at_least, float_at_most, scaled_integers

MAX_PIECES = 30_000
"""Checking this many heights takes less than a second, or about 10 s if they span all exponents of doubles."""


def check_first(value: Any) -> Evaluation:
    """The exact bound of C1 by a step function on [-1/4, 1/4], rounded up to a double.

    f has the heights a_i on N pieces of width w = 1 / (2 N). f * f is linear between multiples of w and zero at both ends. At the others
    it is w c_k with c_k = sum_i a_i a_{k - i}. The integral of f is w sum(a). So the bound is 2 N max(c) / sum(a)^2.

    Args:
      value: as the program returned it: heights_N.

    Raises:
      Rejection: the value is not a list of 1 to MAX_PIECES nonnegative numbers, some positive.
    """
    heights_N = _checked_heights(value)
    a_N, sums_K = _autoconvolution(heights_N)
    score = float_at_least(Fraction(2 * len(a_N) * max(sums_K), sum(a_N) ** 2))
    return Evaluation(score=score, feedback=_summary(heights_N, sums_K))


def check_second(value: Any) -> Evaluation:
    """The exact bound of C2 by a step function, rounded down to a double.

    On pieces of width 1, f * f is linear between integers, where it is 0, c_0, ..., c_{2N - 2}, 0. A linear piece from u to v has the
    integral (u + v) / 2, and its square has (u^2 + u v + v^2) / 3. So the bound is sum(u^2 + u v + v^2) / (3 sum(c) max(c)). It does not
    depend on the width of the pieces or the unit of the heights.

    Args:
      value: as the program returned it: heights_N.

    Raises:
      Rejection: the value is not a list of 1 to MAX_PIECES nonnegative numbers, some positive.
    """
    heights_N = _checked_heights(value)
    _, sums_K = _autoconvolution(heights_N)
    squares = sum(u * u + u * v + v * v for u, v in itertools.pairwise([0, *sums_K, 0]))
    score = float_at_most(Fraction(squares, 3 * sum(sums_K) * max(sums_K)))
    return Evaluation(score=score, feedback=_summary(heights_N, sums_K))


def _checked_heights(value: Any) -> np.ndarray:
    heights_N = checked_floats("heights", value, range(1, MAX_PIECES + 1))
    lowest = int(heights_N.argmin())
    if not heights_N[lowest] >= 0:
        raise Rejection(f"heights must not be negative; heights[{lowest}] is {float(heights_N[lowest])!r}.")
    if not heights_N.max() > 0:
        raise Rejection("heights must not all be 0.")
    return heights_N


def _autoconvolution(heights_N: np.ndarray) -> tuple[list[int], list[int]]:
    """The heights as integers in a common unit, and their exact sums c_k, in that unit squared. K = 2 N - 1."""
    a_N, _ = scaled_integers(heights_N)
    return a_N, convolution(a_N, a_N)


def _summary(heights_N: np.ndarray, sums_K: list[int]) -> str:
    """Where f * f is largest, and how flat its top is."""
    highest = max(sums_K)
    place = (sums_K.index(highest) + 1) / (len(sums_K) + 1)
    near, above = (sum((highest - item) * parts <= highest for item in sums_K) / len(sums_K) for parts in (10**6, 100))
    return (
        f"{len(heights_N)} pieces; {int((heights_N == 0).sum())} of them are 0. The maximum of f * f is at {place:.2%} of its support."
        f" It is within a millionth of the maximum on {near:.2%} of its support, and within 1% on {above:.2%}."
    )


def _evaluate_first(program: Program) -> Evaluation:
    return check_first(program.call("run"))


def _evaluate_second(program: Program) -> Evaluation:
    return check_second(program.call("run"))


_FORMAT = f"""\
`run()` returns the heights of f on N pieces of equal width, from left to right: a list or a float64 array of 1 to {MAX_PIECES:,}
nonnegative numbers, not all 0. You choose N. The unit of the heights does not matter. Values that are negative (even by rounding) or not
finite are refused: use `np.maximum(f, 0)`. The verifier computes the score in rational arithmetic"""

_FIRST = f"""\
The first autocorrelation inequality. Find a nonnegative step function f on [-1/4, 1/4] that minimises

    max over t of (f * f)(t) / (integral of f)^2,   where (f * f)(t) is the integral of f(t - x) f(x) dx.

For a constant f it is 2.

{_FORMAT} and rounds it
up; lower is better. In numpy it is about `2 * N * np.convolve(f, f).max() / f.sum() ** 2`."""

_SECOND = f"""\
The second autocorrelation inequality. Find a nonnegative step function f that maximises

    (2-norm of f * f)^2 / ((1-norm of f * f) (maximum of f * f)),   where (f * f)(t) is the integral of f(t - x) f(x) dx.

It is at most 1. For a constant f it is 2/3. The width of the pieces does not matter.

{_FORMAT} and rounds it
down; higher is better. In numpy, with `c = np.convolve(f, f)` and `u = np.append(0, c)`, `v = np.append(c, 0)`, it is about
`(u * u + u * v + v * v).sum() / (3 * c.sum() * c.max())`."""

_SEED = """\
import numpy as np

PIECES = 40


def score(f):
    c = np.convolve(f, f)
    {score}


def run():
    rng = np.random.default_rng(0)
    f = np.ones(PIECES)
    best = score(f)
    for _ in range(5000):
        moved = f.copy()
        moved[rng.integers(PIECES)] *= np.exp(rng.normal(0, 0.3))
        value = score(moved)
        if value {better} best:
            f, best = moved, value
    return f
"""


def _problem(number: int, evaluate: Callable[[Program], Evaluation], **different: Any) -> Problem:
    return Problem(
        id=f"autocorrelation-{number}",
        evaluate=evaluate,
        score_name="ratio",
        interface=f"`run()` takes no arguments and returns a list or array of 1 to {MAX_PIECES:,} nonnegative heights",
        **different,
    )


PROBLEM_1 = _problem(
    1,
    _evaluate_first,
    description=_FIRST,
    higher_is_better=False,
    seed_program=_SEED.format(
        score="return 2 * PIECES * c.max() / f.sum() ** 2",
        better="<",
    ),
    ideas=(
        "Minimise the maximum by a sequence of linear programs: linearise f * f around f, fix the integral, bound the step.",
        "Replace the maximum by a softmax over t, use its gradient with L-BFGS, and sharpen it step by step.",
        "Good functions are not symmetric, rise steeply at one end, and make f * f flat over most of its support.",
        "Optimise few pieces from many random starts, then split the pieces of the best and go on.",
    ),
    records=(Record("TTT-Discover", 1.50287, "arXiv 2601.16175"),),
    transform="inverse",
)
PROBLEM_2 = _problem(
    2,
    _evaluate_second,
    description=_SECOND,
    seed_program=_SEED.format(
        score="u, v = np.append(0, c), np.append(c, 0)\n    return (u * u + u * v + v * v).sum() / (3 * c.sum() * c.max())",
        better=">",
    ),
    ideas=(
        "Maximise by gradients: Adam or L-BFGS on the logarithms or squares of the heights, with a softmax in place of the maximum.",
        "Noise in the gradients helps at first: the landscape has many local optima. Then polish without noise.",
        "Optimise a few hundred pieces, then split the pieces and go on: more pieces give better scores.",
        "Compute f * f by FFT. Start from narrow teeth at equal distances on one side and broad parts on the other.",
    ),
    records=(
        Record("TTT-Discover", 0.9591, "arXiv 2601.16175"),
        Record("before TTT-Discover", 0.9610, "arXiv 2601.16175"),
    ),
)
