"""The packing in lockstep against one instance at a time, written naively, and hostile priorities."""

import hostile
import numpy as np
import pytest
from programs import InProcess, Returns

from discover_jax.tasks.problem import Rejection
from discover_jax.tasks.problems import online_bin_packing as packing
from discover_jax.tasks.problems.online_bin_packing import (
    CAPACITY,
    PROBLEM,
    best_fit,
    bins_used,
    checked_priorities,
    hidden_items,
    mean_excess,
)


def bins_naively(items, priority):
    """One instance, a list of bins as in FunSearch."""
    rooms = []
    for item in items:
        candidates = sorted({room for room in rooms if room >= item} | {CAPACITY})
        room = max(candidates, key=lambda room: (priority(item, room), -room))
        if room in rooms and room < CAPACITY:
            rooms.remove(room)
        rooms.append(room - item)
    return len(rooms)


@pytest.mark.parametrize("seed", range(3))
def test_lockstep_agrees_with_one_instance_at_a_time(seed):
    rng = np.random.RandomState(seed)
    items_IT = rng.randint(1, CAPACITY + 1, (4, 60))
    table = rng.randint(-3, 4, (CAPACITY + 1, CAPACITY + 1)) * 1.0  # many ties
    bins_I = bins_used(items_IT, lambda items, bins: table[items])
    assert bins_I.tolist() == [bins_naively(items, lambda item, room: table[item, room]) for items in items_IT.tolist()]


def test_best_fit_and_always_a_new_bin():
    items_IT = np.array([[60, 50, 40, 50], [100, 100, 1, 1]])
    assert bins_used(items_IT, best_fit).tolist() == [2, 3]
    new = np.zeros((2, CAPACITY + 1))
    new[:, CAPACITY] = 1
    assert bins_used(items_IT, lambda items, bins: new).tolist() == [4, 4]
    # The sum of sizes is 200 and 202: bounds of 2 and 3.
    assert mean_excess(np.array([2, 3]), items_IT) == 0.0
    assert mean_excess(np.array([4, 3]), items_IT) == 0.5


def test_items_are_revealed_one_by_one():
    """A call sees the current items and the bins of the former ones, in arrays of its own."""
    items_IT = np.array([[30, 70, 20]])
    seen = []

    def priority(items, bins):
        seen.append((items.tolist(), {int(room): int(bins[0, room]) for room in np.flatnonzero(bins[0])}))
        items[:], bins[:] = 1, 7
        return best_fit(items, bins)

    assert bins_used(items_IT, priority).tolist() == [2]
    assert seen == [([30], {}), ([70], {70: 1}), ([20], {0: 1})]


def test_hidden_items_are_those_of_the_description():
    items_IT = hidden_items()
    assert items_IT.shape == (packing.INSTANCES, packing.ITEMS)
    assert items_IT.min() >= 1
    assert items_IT.max() <= CAPACITY
    # The mean of Weibull(shape 3, scale 45) is 45 Gamma(4/3) = 40.18.
    assert items_IT.mean() == pytest.approx(40.18, abs=0.2)


def test_seed_program_is_best_fit():
    evaluation = PROBLEM.evaluate(InProcess(PROBLEM.seed_program))
    assert evaluation.score == evaluation.metrics["excess_of_best_fit"] == pytest.approx(0.04387049413, abs=1e-9)


def test_a_better_heuristic_and_a_worse_one():
    better = """
import numpy as np

def priority(items, bins):
    left = np.arange(bins.shape[1])[None] - items[:, None]
    return np.where((left > 2) & (left < 18), -100.0, 0.0) - left
"""
    worst_fit = "def priority(items, bins):\n    return (bins > 0).cumsum(axis=1)\n"
    assert PROBLEM.evaluate(InProcess(better)).score < 0.04
    assert PROBLEM.evaluate(InProcess(worst_fit)).score > 0.05


def test_infinite_priorities():
    infinite = np.full((1, CAPACITY + 1), -np.inf)
    assert bins_used(np.array([[60, 40]]), lambda items, bins: infinite).tolist() == [1]
    assert bins_used(np.array([[60, 40]]), lambda items, bins: -infinite).tolist() == [1]


@pytest.mark.parametrize("value", hostile.NO_LISTS.values(), ids=hostile.NO_LISTS.keys())
def test_no_arrays(value):
    with pytest.raises(Rejection, match="must return a float64 array"):
        PROBLEM.evaluate(Returns(value))


@pytest.mark.parametrize("name", [name for name in hostile.arrays((2, 2)) if name not in ("infinite array", "integers beyond 2^53")])
def test_hostile_arrays(name):
    with pytest.raises(Rejection, match=r"must return a float64 array|NaN"):
        checked_priorities(hostile.arrays((2, 2))[name][0], (2, 2))
