"""How long the step and the run will still take: guesses for people, from the steps before."""

import statistics
import time
from collections import deque
from collections.abc import Callable

_RECENT = 5
"""So many steps are looked back on: prompts and replies grow while a run goes on, and steps with them."""


class Pace:
    """Times the phases of the steps of this start of the run.

    Args:
      clock: seconds from any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._earlier: deque[dict[str, float]] = deque(maxlen=_RECENT)
        self._compiled = False
        self._done: dict[str, float] = {}
        self._phase: str | None = None
        self._step_began = self._phase_began = 0.0
        self._steps_later = 0

    def step(self, step: int, steps: int) -> None:
        """A step begins, which ends the one before: `step` from 0, of `steps`."""
        if self._phase is not None:
            self._end_phase()
            if len(self._earlier) == 1 and not self._compiled:
                self._earlier.clear()  # the first one, in which everything was compiled
                self._compiled = True
            self._earlier.append(self._done)
        self._done, self._phase = {}, ""
        self._step_began = self._phase_began = self._clock()
        self._steps_later = steps - step - 1

    def phase(self, name: str) -> None:
        """A phase of the step begins, which ends the one before."""
        if self._phase is not None:
            self._end_phase()
            self._phase = name

    def _end_phase(self) -> None:
        now = self._clock()
        assert self._phase is not None
        self._done[self._phase] = now - self._phase_began
        self._phase_began = now

    @property
    def elapsed(self) -> float:
        """Seconds since the step began; 0 before the first."""
        return 0.0 if self._phase is None else self._clock() - self._step_began

    def left(self, share: float) -> str:
        """What is left of step and run, in words; "" where nothing can be said yet.

        Args:
          share: of the phase's work, what is done; 0 or 1 where it shows no progress. In the first step of a start it alone tells anything,
            of that phase only.
        """
        if self._phase is None:
            return ""
        passed = self._clock() - self._phase_began
        at_this_rate = passed * (1 - share) / share if 0 < share < 1 else 0.0
        if not self._earlier:
            return f"~{duration(at_this_rate)} of {self._phase} left" if at_this_rate else ""
        names = dict.fromkeys(name for phases in self._earlier for name in phases)
        usual = {name: statistics.median(phases.get(name, 0.0) for phases in self._earlier) for name in names}
        of_phase = usual.get(self._phase, 0.0) - passed
        if of_phase <= 0:  # longer than usual
            of_phase = at_this_rate
        of_step = of_phase + sum(seconds for name, seconds in usual.items() if name != self._phase and name not in self._done)
        return f"~{duration(of_step)} left, of the run {duration(of_step + self._steps_later * sum(usual.values()))}"


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
