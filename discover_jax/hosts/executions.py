"""Runs the programs of a step on the CPU cores of all hosts.

Every process samples the same rollouts, so each one knows all programs and which of them it must run; no process assigns them. The
verdicts are exchanged once, after all programs have run, by the same collective as everything else. A separate store or queue could also
fail, and no process needs a verdict before the last program ends.
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
    """The programs of one step. Every process creates one and submits the same programs in the same order.

    Args:
      executor: executor of this host.
      slots_H: programs that each host runs at once. With a ray cluster, the first host has all slots and the others have none.
      processes: the processes of the run, one per host.
    """

    def __init__(self, executor: Executor, slots_H: Sequence[int], processes: Processes):
        self._executor, self._slots, self._processes = executor, slots_H, processes
        self._given_H = [0] * len(slots_H)
        self._host_of: dict[tuple[int, str, bytes], int] = {}
        self._keys: list[P] = []
        self._futures: dict[P, concurrent.futures.Future[Verdict]] = {}
        self._retries = executor.retries
        self.retried = 0
        """How often programs of this step were run again, on all hosts; set when `verdicts` returns."""

    def submit(self, key: P, program: str, task: int, parent_output: bytes = b"") -> None:
        """Queues a program if this host runs it. Each program goes to the host with the fewest programs per slot. Identical programs go to
        the same host, so that they run once.

        Args:
          key: key of the rollout that wrote it.
          program, task, parent_output: see `Executor.submit`.
        """
        host = self._host_of.get((task, program, parent_output))
        if host is None:
            able = [host for host, slots in enumerate(self._slots) if slots]
            host = min(able, key=lambda h: (self._given_H[h] + 1) / self._slots[h])
            self._given_H[host] += 1
            self._host_of[task, program, parent_output] = host
        self._keys.append(key)
        if host == self._processes.index:
            self._futures[key] = self._executor.submit(program, task, parent_output)

    @property
    def done(self) -> int:
        """Number of this host's programs that have ended."""
        return sum(future.done() for future in self._futures.values())

    @property
    def outcomes(self) -> Counter[Outcome]:
        """Outcomes of this host's programs that have ended. `verdicts` raises the host's own failures."""
        return Counter(f.result().outcome for f in self._futures.values() if f.done() and not f.cancelled() and f.exception() is None)

    @property
    def here(self) -> int:
        """Number of programs that this host runs."""
        return len(self._futures)

    def verdicts(self, while_waiting: Callable[[], None]) -> dict[P, Verdict]:
        """Waits for the programs of this host, then for the other hosts. Returns the verdicts on all programs, in the order of submission.

        Args:
          while_waiting: called about twice a second.

        Raises:
          SandboxError, GradingError, RunError: from this host's programs, see `Executor.submit`.
        """
        waiting = set(self._futures.values())
        while waiting:
            while_waiting()
            done, waiting = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises a failure of the host at once
        mine = {key: future.result() for key, future in self._futures.items()}
        retries = self._executor.retries - self._retries
        if self._processes.count == 1:
            self.retried = retries
            return mine
        numbers = {key: number for number, key in enumerate(self._keys)}
        rows = [[numbers[key], verdict_row(verdict), verdict.execution.cached] for key, verdict in mine.items()]
        gathered: list[dict[str, Any]] = self._processes.gather({"retries": retries, "verdicts": rows})
        self.retried = sum(each["retries"] for each in gathered)
        found = {number: verdict_of(row, cached=cached) for each in gathered for number, row, cached in each["verdicts"]}
        return {key: found[number] for key, number in numbers.items()}
