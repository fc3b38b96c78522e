"""circle-packing-26 and circle-packing-32: pack circles into the unit square so that the sum of their radii is as large as possible.

A packing is valid only if it holds in exact arithmetic on the returned doubles, so that every score is a proof.
"""

import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np

from discover_jax.tasks.problem import Evaluation, Problem, Program, Record, Rejection
from discover_jax.tasks.problems.exact import checked_floats, checked_list, float_at_most, scaled_integers

_TOUCHING = 1e-9
"""Circles with less room than this count as touching. Only the feedback uses it."""


def check_packing(value: Any, count: int) -> Evaluation:
    """Checks a packing and sums its radii.

    Circle i is inside the square if x_i - r_i >= 0, x_i + r_i <= 1, and likewise for y_i. Circles i and j do not overlap if
    (x_i - x_j)^2 + (y_i - y_j)^2 >= (r_i + r_j)^2. All comparisons are exact: there is no tolerance and no square root.

    Args:
      value: as the program returned it: centers_N2 and radii_N.
      count: N, the number of circles.

    Returns:
      The sum of the radii, rounded down to a double.

    Raises:
      Rejection: the value is not a valid packing. The reason names the worst violation and its amount.
    """
    if type(value) in (list, tuple) and len(value) == 3:
        raise Rejection("run() must return two items, centers and radii; got three. The sum of the radii is computed here.")
    centers, radii = checked_list("The returned value", value, range(2, 3))
    centers_N2 = checked_floats("centers", centers, range(count, count + 1), columns=2)
    radii_N = checked_floats("radii", radii, range(count, count + 1))
    if not (radii_N > 0).all():
        smallest = int(radii_N.argmin())
        raise Rejection(f"radii must be positive; radii[{smallest}] is {radii_N[smallest]}.")

    integers, one = scaled_integers(np.concatenate([centers_N2.ravel(), radii_N]))
    xs_N, ys_N, rs_N = integers[0 : 2 * count : 2], integers[1 : 2 * count : 2], integers[2 * count :]
    _refuse_outside(xs_N, ys_N, rs_N, one)
    _refuse_overlaps(xs_N, ys_N, rs_N, one)
    return Evaluation(score=float_at_most(Fraction(sum(rs_N), one)), feedback=_room(centers_N2, radii_N))


def _refuse_outside(xs_N: list[int], ys_N: list[int], rs_N: list[int], one: int) -> None:
    """Refuses circles that leave the square. All numbers are in units of 1 / one."""
    violations = [
        (amount, index, side)
        for index, (x, y, r) in enumerate(zip(xs_N, ys_N, rs_N, strict=True))
        for amount, side in ((r - x, "left"), (x + r - one, "right"), (r - y, "lower"), (y + r - one, "upper"))
        if amount > 0
    ]
    if violations:
        amount, index, side = max(violations)
        raise Rejection(
            f"Circle {index} leaves the square: it crosses the {side} side by {_shown(Fraction(amount, one))}."
            f"{_others(violations, 'sides are crossed')}"
        )


def _refuse_overlaps(xs_N: list[int], ys_N: list[int], rs_N: list[int], one: int) -> None:
    """Refuses circles that overlap. All numbers are in units of 1 / one."""
    violations = []
    for i, j in itertools.combinations(range(len(xs_N)), 2):
        squared = (xs_N[i] - xs_N[j]) ** 2 + (ys_N[i] - ys_N[j]) ** 2
        reach = rs_N[i] + rs_N[j]
        if squared < reach**2:
            # reach - distance, as a quotient without cancellation. The root only serves the text; it has 128 more bits than the numbers.
            distance = math.isqrt(squared << 256)
            violations.append((Fraction((reach**2 - squared) << 128, one * ((reach << 128) + distance)), i, j))
    if violations:
        amount, i, j = max(violations)
        raise Rejection(
            f"Circles {i} and {j} overlap: their distance is {_shown(amount)} smaller than the sum of their radii."
            f"{_others(violations, 'pairs overlap')}"
        )


def _shown(amount: Fraction) -> str:
    return f"{max(float(amount), 5e-324):.3g}"


def _others(violations: list, what: str) -> str:
    return f" In all, {len(violations)} {what}; this is the worst." if len(violations) > 1 else ""


def _room(centers_N2: np.ndarray, radii_N: np.ndarray) -> str:
    """Which circles touch something, and which has the most room to grow. In float64: it only informs."""
    distances_NN = np.linalg.norm(centers_N2[:, None] - centers_N2[None], axis=-1)
    gaps_NN = distances_NN - radii_N[:, None] - radii_N[None]
    np.fill_diagonal(gaps_NN, np.inf)
    sides_N = np.minimum(centers_N2, 1 - centers_N2).min(axis=1) - radii_N
    room_N = np.minimum(gaps_NN.min(axis=1), sides_N)
    pairs = int((gaps_NN < _TOUCHING).sum()) // 2
    most = int(room_N.argmax())
    x, y = centers_N2[most]
    return (
        f"{pairs} pairs of circles touch, and {int((sides_N < _TOUCHING).sum())} circles touch a side (within {_TOUCHING:g})."
        f" Circle {most} at ({x:.4f}, {y:.4f}) has the most room: it could grow by {max(room_N[most], 0.0):.3g}."
        f" Radii are from {radii_N.min():.4f} to {radii_N.max():.4f}."
    )


def _evaluate(program: Program, count: int) -> Evaluation:
    return check_packing(program.call("run"), count)


_DESCRIPTION = """\
Pack {count} circles into the unit square [0, 1] x [0, 1]. Maximise the sum of their radii.

`run()` returns two items: `centers`, {count} rows (x, y), and `radii`, {count} positive numbers. Both may be lists or float64 arrays.
The score is the sum of the radii, which the verifier computes.

The packing must hold exactly for the returned doubles. There is no tolerance:
- each circle is inside the square: x - r >= 0, x + r <= 1, y - r >= 0, y + r <= 1;
- no two circles overlap: (x_i - x_j)^2 + (y_i - y_j)^2 >= (r_i + r_j)^2. They may touch.
The verifier uses rational arithmetic. The result of an optimiser usually misses by rounding: shrink the radii a little at the end, by 1e-12
or less if you check with `fractions.Fraction`. Values that are not finite, other counts, and radii of 0 or less are refused."""

_SEED = '''\
import numpy as np

COUNT = {count}


def radii_of(centers):
    """Radii that fit: half the distance to the nearest other center, or the distance to the nearest side if that is smaller."""
    distances = np.linalg.norm(centers[:, None] - centers[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    sides = np.minimum(centers, 1 - centers).min(axis=1)
    return np.minimum(distances.min(axis=1) / 2, sides) * (1 - 1e-12)  # a margin for rounding


def run():
    side = int(np.ceil(np.sqrt(COUNT)))
    grid = (np.arange(side) + 0.5) / side
    centers = np.array([(x, y) for x in grid for y in grid])[:COUNT]
    radii = radii_of(centers)
    rng = np.random.default_rng(0)
    for _ in range(5000):
        moved = centers.copy()
        moved[rng.integers(COUNT)] += rng.normal(0, 0.03, 2)
        moved = np.clip(moved, 0.01, 0.99)
        if radii_of(moved).sum() > radii.sum():
            centers, radii = moved, radii_of(moved)
    return centers, radii
'''

_IDEAS = (
    "For fixed centers the best radii are the solution of a linear program. Alternate it with moves of the centers.",
    "Optimise centers and radii together with SLSQP, from many starting points, with the overlaps as inequality constraints.",
    "Start from structured patterns: rows of unequal circles, hexagonal patches, large circles in corners, small ones in gaps.",
    "Move one circle from a crowded place into the largest gap, then optimise again (basin hopping).",
    "Polish the best packing: find the touching pairs and solve their equations by Newton's method, then shrink radii for rounding.",
)


def _problem(count: int, records: tuple[Record, ...]) -> Problem:
    return Problem(
        id=f"circle-packing-{count}",
        description=_DESCRIPTION.format(count=count),
        evaluate=functools.partial(_evaluate, count=count),
        score_name="sum of radii",
        interface=f"`run()` takes no arguments and returns `centers` ({count} rows x, y) and `radii` ({count} numbers)",
        seed_program=_SEED.format(count=count),
        ideas=_IDEAS,
        records=records,
    )


PROBLEM_26 = _problem(
    26,
    (
        Record("AlphaEvolve", 2.63586276, "arXiv 2506.13131"),
        Record("ThetaEvolve", 2.63598308, "arXiv 2511.23473"),
    ),
)
PROBLEM_32 = _problem(32, (Record("AlphaEvolve", 2.9379, "arXiv 2506.13131"),))
