"""online-bin-packing: place items that arrive one by one into as few bins as possible, by a priority function.

As in FunSearch (Romera-Paredes et al., Nature, 2023): the item goes into the bin with the highest priority among those that can hold it.

An item must not be known before the former one is placed, so one call for a whole instance would not do: the program could pack offline.
One call for each item of each instance would be slow, since a call costs about a millisecond. Hence all instances advance together: one
call gets the current item of every instance. Bins with the same room are interchangeable, so the bins of an instance are sent as counts
by room, which takes the same space however many bins are open.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from discover_jax.tasks.problem import Evaluation, Problem, Program, Rejection
from discover_jax.tasks.problems.exact import kind_of

CAPACITY = 100
INSTANCES = 32
ITEMS = 2000
_SEED_OF_INSTANCES = 20231214


@functools.cache
def hidden_items() -> np.ndarray:
    """Items of shape (INSTANCES, ITEMS): Weibull with shape 3 and scale 45, rounded, from 1 to 100, as FunSearch's. Programs never see this
    file. RandomState's stream is frozen by numpy's policy, so the instances are the same everywhere."""
    sizes_IT = 45 * np.random.RandomState(_SEED_OF_INSTANCES).weibull(3, size=(INSTANCES, ITEMS))
    return np.clip(np.rint(sizes_IT), 1, CAPACITY).astype(np.int64)


def bins_used(items_IT: np.ndarray, priority: Callable[[np.ndarray, np.ndarray], Any]) -> np.ndarray:
    """Packs all instances in lockstep.

    Args:
      items_IT: sizes from 1 to CAPACITY. Item t + 1 is shown only after item t is placed in every instance.
      priority: (items_I, bins_IC) -> untrusted priorities_IC. bins_IC[i, c] is the number of open bins with the room c, 0 <= c <= CAPACITY.
        Column CAPACITY stands for a new bin: its count is 0, and it is always allowed.

    Returns:
      The number of bins of each instance, of shape (I,).

    Raises:
      Rejection: the priorities have another shape or type, or are NaN.
    """
    instances_I = np.arange(len(items_IT))
    rooms_C = np.arange(CAPACITY + 1)
    bins_IC = np.zeros((len(items_IT), CAPACITY + 1), np.int64)
    for items_I in items_IT.T:
        priorities_IC = checked_priorities(priority(items_I.copy(), bins_IC.copy()), bins_IC.shape)
        allowed_IC = ((bins_IC > 0) | (rooms_C == CAPACITY)) & (rooms_C >= items_I[:, None])
        chosen_I = np.where(allowed_IC, priorities_IC, -np.inf).argmax(axis=1)
        bins_IC[instances_I, chosen_I] -= chosen_I < CAPACITY
        bins_IC[instances_I, chosen_I - items_I] += 1
    return bins_IC.sum(axis=1)


def checked_priorities(value: Any, shape: tuple[int, int]) -> np.ndarray:
    """Finite priorities; infinite ones become the largest doubles, so that an allowed bin is always above one that is not.

    Raises:
      Rejection: not an array of numbers of the shape, or NaN.
    """
    if type(value) is not np.ndarray or value.shape != shape or value.dtype.kind not in "iuf" or value.dtype.itemsize > 8:
        raise Rejection(f"priority() must return a float64 array of shape {shape}; got {kind_of(value)}.")
    if np.isnan(value).any():
        instance, room = np.argwhere(np.isnan(value))[0]
        raise Rejection(f"priorities must not be NaN; that of instance {instance} and room {room} is.")
    largest = np.finfo(np.float64).max
    return np.clip(value.astype(np.float64), -largest, largest)


def mean_excess(bins_I: np.ndarray, items_IT: np.ndarray) -> float:
    """The mean over instances of bins / bound - 1. The bound is the sum of sizes over the capacity, rounded up (L1 in FunSearch)."""
    bounds_I = -(-items_IT.sum(axis=1) // CAPACITY)
    return float(np.mean(bins_I / bounds_I - 1))


def best_fit(items_I: np.ndarray, bins_IC: np.ndarray) -> np.ndarray:
    """Prefers the bin with the least room."""
    del items_I
    return np.broadcast_to(-np.arange(CAPACITY + 1.0), bins_IC.shape)


def _evaluate(program: Program) -> Evaluation:
    items_IT = hidden_items()
    bins_I = bins_used(items_IT, functools.partial(program.call, "priority"))
    score, plain = mean_excess(bins_I, items_IT), mean_excess(bins_used(items_IT, best_fit), items_IT)
    feedback = (
        f"{int(bins_I.sum())} bins in {INSTANCES} instances, an excess of {score:.3%} over the lower bound. Best fit has {plain:.3%} on the"
        f" same instances."
    )
    return Evaluation(score=score, feedback=feedback, metrics={"excess_of_best_fit": plain})


_DESCRIPTION = f"""\
Online bin packing. Items arrive one by one and must be placed at once, into a bin with enough room or into a new bin of capacity
{CAPACITY}. Placed items never move. Use as few bins as possible. There are {INSTANCES} hidden instances of {ITEMS:,} items each. The sizes
are independent: Weibull with shape 3 and scale 45, rounded to integers from 1 to {CAPACITY}.

`priority(items, bins)` is called once for each step, for all instances together. I = {INSTANCES}, C = {CAPACITY + 1}:
- `items`: int64 array of shape (I,), the size of the current item of each instance;
- `bins`: int64 array of shape (I, C); `bins[i, c]` is the number of open bins of instance i with c units of room left. Column {CAPACITY}
  stands for a new bin: its count is always 0, and a new bin is always allowed.
It returns a float64 array of shape (I, C): the priority of putting the item into a bin with that much room. The verifier chooses the
highest priority among a new bin and the open bins that can hold the item. Priorities of other columns are ignored. Among equal ones, the
bin with the least room is chosen. Infinite priorities are allowed; NaN, other shapes and other types are refused.

The next item is sent only after the current ones are placed. There are {ITEMS:,} calls, so a call should take about a millisecond:
vectorise. Global variables keep their values between calls.

The score is the mean over instances of (bins used / lower bound) - 1; lower is better. The lower bound is the sum of sizes divided by
{CAPACITY}, rounded up."""

_SEED = """\
import numpy as np


def priority(items, bins):
    \"\"\"Best fit: the bin in which the least room is left.\"\"\"
    rooms = np.arange(bins.shape[1])
    return -(rooms[None, :] - items[:, None]).astype(float)
"""

PROBLEM = Problem(
    id="online-bin-packing",
    description=_DESCRIPTION,
    evaluate=_evaluate,
    higher_is_better=False,
    score_name="excess",
    interface="`priority(items, bins)` returns an array of priorities with the shape of `bins`",
    seed_program=_SEED,
    ideas=(
        "Avoid small gaps: a gap that no likely item fills is lost. Prefer an exact fit, else leave room for a likely size.",
        "Compute at the start, from the distribution of sizes, the expected waste of a bin with each amount of room; use it as a price.",
        "Use the counts of open bins: with many bins of one room, waiting for a perfect item costs little.",
        "Change the policy towards the end of the sequence, where open bins are no longer filled: count the calls.",
    ),
    transform="log",
    failure_reward=-1.0,
    hidden_inputs=True,
)
