"""erdos-overlap: an upper bound of the constant in Erdős's minimum overlap problem, by a step function.

For every partition of {1, ..., 2n} into two halves A and B, some difference k occurs at least M(n) times among all a - b. Swinnerton-Dyer
proved (in Haugland, "Advances in the minimum overlap problem", J. Number Theory 58, 1996) that M(n) / n tends to the infimum, over step
functions h: [0, 2] -> [0, 1] with integral 1, of

    C(h) = max over k of the integral of h(x) (1 - h(x + k)) over all x for which x and x + k are in [0, 2].

So C(h) of any such h bounds the constant from above. The form is that of TTT-Discover (arXiv 2601.16175).
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from discover_jax.tasks.problem import Evaluation, Problem, Program, Record, Rejection
from discover_jax.tasks.problems.exact import checked_floats, convolution, float_at_least, scaled_integers

MAX_PIECES = 30_000
"""Checking this many heights takes less than a second, or about 10 s if they span all exponents of doubles."""


def check_step_function(value: Any) -> Evaluation:
    """The exact C(h) of the step function that the values define, rounded up to a double.

    The values are heights a_i in [0, 1] on N pieces of equal width. Doubles almost never have the mean 1/2 exactly, so h is defined by an
    exact rule that always gives values in [0, 1] and integral 1, in rational numbers:

    - b = a if the mean of a is at least 1/2, else b = 1 - a. The overlaps of 1 - h at k are those of h at -k, so C is the same for both.
    - h_i = b_i N / (2 S), where S is the sum of b. As S >= N / 2, no value exceeds 1.

    The overlap is linear in k between multiples of the pieces' width, 2 / N, so its maximum is among those:

        C(h) = max over k of (2 / N) sum_i h_i (1 - h_{i + k}) = max over k of sum_i b_i (2 S - N b_{i + k}) / (2 S^2).

    Args:
      value: as the program returned it: heights_N.

    Returns:
      The score is exact but for its last rounding, so it is a proof of an upper bound.

    Raises:
      Rejection: the value is not a list of 1 to MAX_PIECES numbers in [0, 1].
    """
    heights_N = checked_floats("heights", value, range(1, MAX_PIECES + 1))
    outside_N = np.maximum(-heights_N, heights_N - 1)
    worst = int(outside_N.argmax())
    if not outside_N[worst] <= 0:
        raise Rejection(f"heights must be in [0, 1]; heights[{worst}] is {float(heights_N[worst])!r}.")

    a_N, one = scaled_integers(heights_N)
    pieces = len(a_N)
    b_N = a_N if 2 * sum(a_N) >= pieces * one else [one - a for a in a_N]
    total = sum(b_N)
    rest_N = [2 * total - pieces * b for b in b_N]
    # Item m is the sum at the shift k = m - (N - 1), since the first sequence is reversed.
    overlaps_K = convolution(b_N[::-1], rest_N)
    highest = max(overlaps_K)
    score = float_at_least(Fraction(highest, 2 * total**2))
    return Evaluation(score=score, feedback=_summary(heights_N, overlaps_K, highest))


def _summary(heights_N: np.ndarray, overlaps_K: list[int], highest: int) -> str:
    """Where the overlap is largest, and how flat its top is."""
    pieces = len(heights_N)
    shift = abs(overlaps_K.index(highest) - (pieces - 1)) * 2 / pieces
    near = sum((highest - overlap) * 10**6 <= highest for overlap in overlaps_K)
    return (
        f"{pieces} pieces. The overlap is largest at the shift |k| = {shift:.5g}; it is within a millionth of that at {near} of"
        f" {len(overlaps_K)} shifts. The mean before rescaling is {math.fsum(heights_N) / pieces:.12g};"
        f" {int((heights_N == 0).sum())} values are 0 and {int((heights_N == 1).sum())} are 1."
    )


def _evaluate(program: Program) -> Evaluation:
    return check_step_function(program.call("run"))


_DESCRIPTION = f"""\
Erdős's minimum overlap problem. Find a step function h: [0, 2] -> [0, 1] with integral 1 that minimises

    C(h) = max over all real k of the integral of h(x) (1 - h(x + k)) dx,

where the integral is over all x for which both x and x + k are in [0, 2]. For h = 1/2 it is 1/2. Every h proves an upper bound of Erdős's
constant.

`run()` returns the heights of h on N pieces of equal width 2 / N, from left to right: a list or a float64 array of 1 to {MAX_PIECES:,}
numbers in [0, 1]. You choose N. The score is C(h), which the verifier computes in rational arithmetic and rounds up; lower is better. In
numpy it is about `np.correlate(h, 1 - h, mode="full").max() * 2 / N`.

The mean of the heights should be 1/2, but need not be it exactly: the verifier rescales. If the mean is above 1/2, it multiplies all
heights by the same factor; if it is below, it multiplies all 1 - h. Values that are not finite or outside [0, 1], even by rounding, are
refused: use `np.clip(h, 0, 1)`."""

_SEED = '''\
import numpy as np

PIECES = 40


def overlap(heights):
    return np.correlate(heights, 1 - heights, mode="full").max() * 2 / PIECES


def with_mean_half(heights):
    """Clipped to [0, 1] and shifted until the mean is 1/2."""
    for _ in range(20):
        heights = np.clip(heights + 0.5 - heights.mean(), 0, 1)
    return heights


def run():
    x = (np.arange(PIECES) + 0.5) / PIECES
    heights = with_mean_half(0.5 + 0.4 * np.cos(2 * np.pi * (x - 0.5)))
    rng = np.random.default_rng(0)
    for _ in range(300):
        moved = heights.copy()
        moved[rng.integers(PIECES)] += rng.normal(0, 0.1)
        moved = with_mean_half(moved)
        if overlap(moved) < overlap(heights):
            heights = moved
    return heights
'''

PROBLEM = Problem(
    id="erdos-overlap",
    description=_DESCRIPTION,
    evaluate=_evaluate,
    higher_is_better=False,
    score_name="overlap",
    interface=f"`run()` takes no arguments and returns a list or array of 1 to {MAX_PIECES:,} heights in [0, 1]",
    seed_program=_SEED,
    ideas=(
        "Minimise the maximum by a sequence of linear programs: linearise all overlaps around h and bound the step.",
        "Replace the maximum by a softmax or a high p-norm over shifts, use its gradient with L-BFGS, and sharpen it step by step.",
        "Optimise a coarse function of 20 to 60 pieces first, then split the pieces and go on.",
        "Require h(x) = h(2 - x), which halves the number of variables; then try without it.",
    ),
    records=(Record("TTT-Discover", 0.380876, "arXiv 2601.16175"),),
    transform="inverse",
)
