"""counting-inversions: count the inversions of hidden arrays exactly, as fast as possible.

The result is one integer, so the check is cheap and exact, and a random array's count cannot be guessed. The score is the speedup over the
seed program, whose time is measured in the same evaluation.
"""

import functools
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from discover_jax.tasks.problem import Evaluation, Problem, Program, Rejection
from discover_jax.tasks.problems.exact import kind_of

LENGTH = 50_000
REPEATS = 3
_SEED_OF_INPUTS = 1962


def count(values):
    """The number of pairs i < j with values[i] > values[j], by merge sort."""

    def sort(items):
        if len(items) < 2:
            return items, 0
        half = len(items) // 2
        left, in_left = sort(items[:half])
        right, in_right = sort(items[half:])
        merged, inversions, i, j = [], in_left + in_right, 0, 0
        while i < len(left) and j < len(right):
            if right[j] < left[i]:
                merged.append(right[j])
                inversions += len(left) - i
                j += 1
            else:
                merged.append(left[i])
                i += 1
        return merged + left[i:] + right[j:], inversions

    return sort(values.tolist())[1]


@functools.cache
def hidden_inputs() -> Mapping[str, Sequence[np.ndarray]]:
    """REPEATS different arrays of each kind, int64 of shape (LENGTH,). Programs never see this file. RandomState's stream is frozen by
    numpy's policy, so the arrays are the same everywhere."""
    rng = np.random.RandomState(_SEED_OF_INPUTS)
    return {
        "distinct values in random order": [rng.permutation(LENGTH) for _ in range(REPEATS)],
        "300 different values": [rng.randint(0, 300, LENGTH) for _ in range(REPEATS)],
        "large values, nearly sorted": [(np.arange(LENGTH) + rng.randint(0, 1000, LENGTH)) * 10**13 - 2 * 10**17 for _ in range(REPEATS)],
    }


def check_count(value: Any, expected: int) -> None:
    """Refuses everything but the right integer.

    Raises:
      Rejection: the type or the number is wrong.
    """
    if type(value) is not int:
        raise Rejection(f"count() must return an int; got {kind_of(value)}.")
    if value != expected:
        raise Rejection(f"The count is wrong: got {kind_of(value)}.")


def geometric_mean_speedup(reference_s: Mapping[str, Sequence[float]], program_s: Mapping[str, Sequence[float]]) -> float:
    """The geometric mean over kinds of the ratio of best times, reference over program."""
    logs = [math.log(min(reference_s[kind]) / min(program_s[kind])) for kind in reference_s]
    return math.exp(sum(logs) / len(logs))


def _evaluate(program: Program) -> Evaluation:
    # The reference runs before the program is first called, and its CPU time counts: a program cannot gain by keeping the machine busy.
    expected: dict[str, list[int]] = {}
    reference_s: dict[str, list[float]] = {}
    for kind, arrays in hidden_inputs().items():
        for values_N in arrays:
            start = time.process_time()
            expected.setdefault(kind, []).append(count(values_N))
            reference_s.setdefault(kind, []).append(time.process_time() - start)
    # No array is sent twice, so that a program cannot remember its answer.
    program_s: dict[str, list[float]] = {kind: [] for kind in expected}
    for repeat in range(REPEATS):
        for kind, arrays in hidden_inputs().items():
            timed = program.time("count", arrays[repeat].copy())
            check_count(timed.value, expected[kind][repeat])
            program_s[kind].append(timed.wall_s)
    best_s = {kind: min(times) for kind, times in program_s.items()}
    feedback = "Best times: " + "; ".join(f"{kind}: {best * 1000:.2f} ms" for kind, best in best_s.items()) + "."
    return Evaluation(
        score=geometric_mean_speedup(reference_s, program_s),
        feedback=f"{feedback} The reference took {min(map(min, reference_s.values())) * 1000:.0f} ms or more.",
        metrics={f"seconds: {kind}": best for kind, best in best_s.items()},
    )


_DESCRIPTION = f"""\
Count the inversions of an array as fast as possible: the pairs i < j with values[i] > values[j]. Equal values are no inversion.

`count(values)` gets a numpy int64 array of length {LENGTH:,} and returns the exact number of inversions as a Python int.
It is called {3 * REPEATS} times, on hidden arrays: {REPEATS} random orders of distinct values, {REPEATS} with only 300 different
values, and {REPEATS} nearly sorted ones of large values, positive and negative. No two arrays are equal. One wrong count rejects the
program.

The score is the speedup over a merge sort in plain Python that runs on the same machine: for each kind, the best CPU time of the
reference divided by the best wall time of `count`, then the geometric mean over kinds. Higher is better. The time includes sending the
array, about a millisecond or less. Code outside of `count` runs before the first call and is not timed."""

PROBLEM = Problem(
    id="counting-inversions",
    description=_DESCRIPTION,
    evaluate=_evaluate,
    score_name="speedup",
    interface="`count(values)` gets an int64 array and returns the number of its inversions as an int",
    seed_program=inspect.getsource(count),
    ideas=(
        "Merge bottom up in numpy: all pairs of blocks of one level at once, with a sort along an axis and `searchsorted` or `argsort`.",
        "Replace the values by their ranks (stable argsort) first; then small integer types and counting by bits of the rank work.",
        "Count small blocks by comparing all pairs with broadcasting; merge only larger blocks.",
        "Is a compiled library function equivalent? Kendall's tau, for example, counts discordant pairs.",
    ),
    transform="log",
    failure_reward=-5.0,
    hidden_inputs=True,
    noisy=True,
)
