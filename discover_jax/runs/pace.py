"""How long the step and the run will still take: guesses for people, from the steps before."""

import statistics
import time
from collections import deque
from collections.abc import Callable

_RECENT = 5
"""So many steps are looked back on: prompts and replies grow while a run goes on, and steps with them."""


class Pace:
    """Times the steps of this start of the run.

    Args:
      clock: seconds from any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._warm = False
        self._began: float | None = None
        self._later = 0

    def step(self, step: int, steps: int) -> None:
        """A step begins, which ends the one before, its checkpoint included: `step` from 0, of `steps`."""
        now = self._clock()
        if self._began is not None:
            if len(self._durations) == 1 and not self._warm:
                self._durations.clear()  # the first one's, in which everything was compiled
                self._warm = True
            self._durations.append(now - self._began)
        self._began, self._later = now, steps - step - 1

    @property
    def elapsed(self) -> float:
        """Seconds since the step began; 0 before the first."""
        return 0.0 if self._began is None else self._clock() - self._began

    def left(self, share: float) -> str:
        """What is left of step and run, in words; "" where nothing can be said yet.

        Args:
          share: of the step's rollouts, those that are finished. In the first step of a start they alone tell anything, of sampling only.
        """
        of_sampling = self.elapsed * (1 - share) / share if self._began is not None and 0 < share < 1 else None
        if not self._durations:
            return f"~{duration(of_sampling)} of sampling left" if of_sampling is not None else ""
        usual = statistics.median(self._durations)
        of_step = usual - self.elapsed
        if of_step <= 0:  # longer than usual
            of_step = of_sampling or 0.0
        return f"~{duration(of_step)} left, of the run {duration(of_step + self._later * usual)}"


def duration(seconds: float) -> str:
    """A time for people, in two units at most."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"
