"""The programs of a step, run on the cores of all hosts.

Every process samples the same rollouts, so each knows which programs there are and which of them are its own to run: nobody hands them out.
What came of them is exchanged once, when all have run, by the same collective that all else is exchanged by: a store or a queue of its own
would be one more thing that can fail, and could only tell a little earlier what nobody needs before the last program has ended.
"""

import concurrent.futures
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from discover_jax.execution.cache import verdict_of, verdict_row
from discover_jax.execution.executor import Executor
from discover_jax.hosts.processes import Processes
from discover_jax.types import Outcome, Verdict

P = TypeVar("P", bound=Hashable)


class StepExecutions(Generic[P]):
    """The programs of one step. All processes make one, and submit the same programs in the same order.

    Args:
      executor: of this host.
      slots_H: programs that each host runs at once. Where a ray cluster runs them, the first host has all slots and the others none.
      processes: of the run, one a host.
    """

    def __init__(self, executor: Executor, slots_H: Sequence[int], processes: Processes):
        self._executor, self._slots, self._processes = executor, slots_H, processes
        self._given_H = [0] * len(slots_H)
        self._host_of: dict[tuple[int, str], int] = {}
        self._places: list[P] = []
        self._futures: dict[P, concurrent.futures.Future[Verdict]] = {}
        self._retries = executor.retries
        self.retried = 0
        """How often programs of this step were run again on any host; known once `verdicts` has returned."""

    def submit(self, place: P, program: str, task: int) -> None:
        """Queues a program if it is this host's. Each next one goes to the host that has the fewest for its slots; equal ones go together,
        so that they run once.

        Args:
          place: of the rollout that wrote it.
          program, task: see `Executor.submit`.
        """
        host = self._host_of.get((task, program))
        if host is None:
            able = [host for host, slots in enumerate(self._slots) if slots]
            host = min(able, key=lambda h: (self._given_H[h] + 1) / self._slots[h])
            self._given_H[host] += 1
            self._host_of[task, program] = host
        self._places.append(place)
        if host == self._processes.index:
            self._futures[place] = self._executor.submit(program, task)

    @property
    def done(self) -> int:
        """How many of this host's have ended."""
        return sum(future.done() for future in self._futures.values())

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How those of this host's ended that have; what the host itself failed by is for `verdicts` to raise."""
        return Counter(f.result().outcome for f in self._futures.values() if f.done() and not f.cancelled() and f.exception() is None)

    @property
    def here(self) -> int:
        """How many are this host's."""
        return len(self._futures)

    def verdicts(self, while_waiting: Callable[[], None]) -> dict[P, Verdict]:
        """The verdicts on all programs, in the order in which they were submitted; waits for those of this host, then for the others.

        Args:
          while_waiting: called about twice a second.

        Raises:
          SandboxError, GradingError, RunError: see `Executor.submit`; of this host's programs.
        """
        waiting = set(self._futures.values())
        while waiting:
            while_waiting()
            done, waiting = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises at once what the host failed by
        mine = {place: future.result() for place, future in self._futures.items()}
        retries = self._executor.retries - self._retries
        if self._processes.count == 1:
            self.retried = retries
            return mine
        numbers = {place: number for number, place in enumerate(self._places)}
        rows = [[numbers[place], verdict_row(verdict), verdict.execution.cached] for place, verdict in mine.items()]
        told: list[dict[str, Any]] = self._processes.gather({"retries": retries, "verdicts": rows})
        self.retried = sum(each["retries"] for each in told)
        found = {number: verdict_of(row, cached=cached) for each in told for number, row, cached in each["verdicts"]}
        return {place: found[number] for place, number in numbers.items()}
