"""Estimates of the remaining time of a step and a run, from earlier steps."""

import statistics
import time
from collections import deque
from collections.abc import Callable

_RECENT = 5
"""Steps that an estimate uses. Prompts and replies grow during a run, and steps take longer."""


class Pace:
    """Times the phases of each step since this process started.

    Args:
      clock: seconds since an arbitrary moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._earlier: deque[dict[str, float]] = deque(maxlen=_RECENT)
        self._compiled = False
        self._done: dict[str, float] = {}
        self._recurring: set[str] = set()
        self._phase: str | None = None
        self._step_began = self._phase_began = 0.0
        self._steps_later = 0

    def step(self, step: int, steps: int) -> None:
        """Ends the current step and starts step `step`, from 0, of `steps`."""
        if self._phase is not None:
            self._end_phase()
            if len(self._earlier) == 1 and not self._compiled:
                self._earlier.clear()  # the first step, which includes compilation
                self._compiled = True
            self._earlier.append(self._done)
        self._done, self._phase = {}, ""
        self._step_began = self._phase_began = self._clock()
        self._steps_later = steps - step - 1

    def phase(self, name: str) -> None:
        """Ends the current phase and starts the next one. A phase may recur within a step; its times add up."""
        if self._phase is not None:
            self._end_phase()
            self._phase = name

    def _end_phase(self) -> None:
        now = self._clock()
        assert self._phase is not None
        if self._phase in self._done:
            self._recurring.add(self._phase)
        self._done[self._phase] = self._done.get(self._phase, 0.0) + now - self._phase_began
        self._phase_began = now

    @property
    def elapsed(self) -> float:
        """Seconds since the step began; 0 before the first."""
        return 0.0 if self._phase is None else self._clock() - self._step_began

    def left(self, share: float) -> str:
        """The remaining time of step and run, as text; "" if it is not known yet.

        Args:
          share: fraction of the phase's work that is done; 0 or 1 if the phase reports no progress. In the first step after a start, the
            estimate covers only the current phase, and only from this fraction.
        """
        if self._phase is None:
            return ""
        passed = self._clock() - self._phase_began
        at_this_rate = passed * (1 - share) / share if 0 < share < 1 else 0.0
        if not self._earlier:
            return f"~{duration(at_this_rate)} of {self._phase} left" if at_this_rate else ""
        names = dict.fromkeys(name for phases in self._earlier for name in phases)
        usual = {name: statistics.median(phases.get(name, 0.0) for phases in self._earlier) for name in names}
        of_phase = usual.get(self._phase, 0.0) - self._done.get(self._phase, 0.0) - passed
        if of_phase <= 0:  # longer than usual
            of_phase = at_this_rate
        later = (name for name in usual if name != self._phase and (name not in self._done or name in self._recurring))
        of_step = of_phase + sum(max(usual[name] - self._done.get(name, 0.0), 0.0) for name in later)
        return f"~{duration(of_step)} left, run {duration(of_step + self._steps_later * sum(usual.values()))}"


def duration(seconds: float) -> str:
    """A time in at most two units."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"
