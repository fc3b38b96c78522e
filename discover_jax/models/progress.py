"""Progress of reading and writing weights, in bytes. Needs no jax."""

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""(bytes done, total bytes) that this process reads or writes."""


class Progress:
    """Counts bytes for an `OnProgress`."""

    def __init__(self, total: int, report: OnProgress | None):
        self._done, self._total, self._report = 0, total, report

    def add(self, amount: int) -> None:
        self._done += amount
        if self._report is not None:
            self._report(self._done, self._total)
