"""Which states the groups of a step build on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from discover_jax.archive.archive import Archive
from discover_jax.types import SEED, State

Sampler = Callable[..., list[State]]
"""function(archive, groups, rng, *, epsilon) -> one parent a group."""

# Keeps these draws apart from every other use of the run's seed.
_STREAM = 0x5A3B1E


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one step's draws: a function of (seed, step) alone, so that a resumed run draws what the unbroken one would have."""
    return np.random.default_rng([_STREAM, seed, step])


def greedy(archive: Archive, groups: int, rng: np.random.Generator, *, epsilon: float) -> list[State]:
    """The best state with probability 1 - epsilon, else a uniformly random one of the kept (the best among them); each group by itself.

    The report's default, with epsilon 0.125. An empty archive gives the seed.
    """
    # Every group takes the same number of draws whatever they come to, so that epsilon changes no other group's choice.
    explore_G = rng.random(groups) < epsilon
    choice_G = rng.integers(max(len(archive.states), 1), size=groups)
    if not archive.states:
        return [SEED] * groups
    return [archive.states[choice if explore else 0] for explore, choice in zip(explore_G, choice_G, strict=True)]


def fixed(archive: Archive, groups: int, rng: np.random.Generator, **_: Any) -> list[State]:
    """Always the empty seed, i.e. no reuse; with a search this is best-of-N."""
    del archive, rng
    return [SEED] * groups


SAMPLERS: dict[str, Sampler] = {"greedy": greedy, "fixed": fixed}
"""By the name of config.reuse.sampler."""
