"""Counts against all pairs, the score against a formula worked by hand, and hostile values."""

import hostile
import numpy as np
import pytest
from programs import InProcess, Returns

from discover_jax.tasks.problem import Rejection
from discover_jax.tasks.problems import counting_inversions as inversions
from discover_jax.tasks.problems.counting_inversions import PROBLEM, check_count, count, geometric_mean_speedup, hidden_inputs


@pytest.fixture
def short(monkeypatch):
    """Arrays of 2,000 instead of 50,000 values."""
    monkeypatch.setattr(inversions, "LENGTH", 2000)
    hidden_inputs.cache_clear()
    yield
    hidden_inputs.cache_clear()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 50, 257])
@pytest.mark.parametrize("largest", [1, 10, 2**62])
def test_count_is_that_of_all_pairs(length, largest):
    values_N = np.random.RandomState(length).randint(-largest, largest, length)
    assert count(values_N) == int(np.triu(values_N[:, None] > values_N, 1).sum())


def test_hidden_inputs_all_differ():
    arrays = [values_N for arrays in hidden_inputs().values() for values_N in arrays]
    assert {values_N.shape for values_N in arrays} == {(inversions.LENGTH,)}
    assert {values_N.dtype for values_N in arrays} == {np.dtype(np.int64)}
    assert len({values_N.tobytes() for values_N in arrays}) == len(arrays) == 3 * inversions.REPEATS


def test_geometric_mean_of_best_times():
    assert geometric_mean_speedup({"a": [4.0, 8.0], "b": [9.0]}, {"a": [1.0, 0.5], "b": [2.0, 4.5]}) == pytest.approx(6.0)


def test_seed_program_is_the_reference():
    evaluation = PROBLEM.evaluate(InProcess(PROBLEM.seed_program))
    assert 0.05 < evaluation.score < 3  # about 1 on an idle machine; the program's wall time also has the time of other processes
    assert len(evaluation.metrics) == 3


@pytest.mark.usefixtures("short")
def test_other_right_programs():
    blocks = """
import numpy as np

def count(values):
    return int(np.triu(values[:, None] > values, 1).sum())
"""
    merging = """
import bisect

def count(values):
    seen, total = [], 0
    for number, value in enumerate(values.tolist()):
        place = bisect.bisect_right(seen, value)
        total += number - place
        seen.insert(place, value)
    return total
"""
    assert PROBLEM.evaluate(InProcess(merging)).score > 0  # times are not asserted: other tests run beside this one
    assert PROBLEM.evaluate(InProcess(blocks)).score > 0


@pytest.mark.usefixtures("short")
def test_an_answer_that_is_remembered_is_wrong():
    remembering = (
        PROBLEM.seed_program.replace("def count", "def right")
        + """
answers = []

def count(values):
    answers.append(answers[-1] if answers else right(values))
    return answers[-1]
"""
    )
    with pytest.raises(Rejection, match="The count is wrong"):
        PROBLEM.evaluate(InProcess(remembering))


@pytest.mark.parametrize("value", [None, True, 3.0, "3", [3], hostile.Lying(3.0), np.int64(3), np.array(3), float("nan")])
def test_other_types(value):
    with pytest.raises(Rejection, match="must return an int"):
        check_count(value, 3)


@pytest.mark.parametrize("value", [2, 4, -3, 0, 10**10_000], ids=["2", "4", "-3", "0", "huge"])
def test_wrong_counts(value):
    check_count(3, 3)
    with pytest.raises(Rejection, match="The count is wrong: got"):
        check_count(value, 3)


@pytest.mark.usefixtures("short")
def test_evaluate_checks_what_count_returned():
    with pytest.raises(Rejection, match="The count is wrong"):
        PROBLEM.evaluate(Returns(1))
