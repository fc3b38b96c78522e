"""Progress of an update: counts the passes over microbatches that the devices have finished."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

OnPass = Callable[[int, int], None]
"""(finished, total) passes over microbatches -> None."""


class Passes:
    """Counts the passes over microbatches that the devices have finished, and calls `on_pass` after each.

    It waits for a pass only once the next one is queued, so the devices never wait for the host.
    """

    def __init__(self, total: int, on_pass: OnPass | None):
        self._total, self._on_pass = total, on_pass
        self._finished = 0
        self._queued: Any = None

    def expect(self, more: int) -> None:
        """There will be this many more passes in total."""
        self._total += more

    def queued(self, result: Any) -> None:
        """Registers a pass that was queued. `result` is any array that it computes."""
        if self._on_pass is None:
            return
        before, self._queued = self._queued, result
        if before is not None:
            jax.block_until_ready(before)
            self._count(self._on_pass)

    def gather(self, started: Iterable[Any]) -> list[Any]:
        """The results of passes, on the host. Iterating over `started` queues the passes."""
        results = []
        for result in started:
            results.append(result)
            self.queued(result)
        results = jax.device_get(results)
        self.read()
        return results

    def read(self) -> None:
        """Counts the last queued pass as finished, because the host has read its result."""
        if self._on_pass is not None and self._queued is not None:
            self._queued = None
            self._count(self._on_pass)

    def _count(self, on_pass: OnPass) -> None:
        self._finished += 1
        on_pass(self._finished, self._total)


UNCOUNTED = Passes(0, None)
