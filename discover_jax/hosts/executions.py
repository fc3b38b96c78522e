"""Runs the programs of a step on the CPU cores of all hosts.

Every process samples the same rollouts, so each one knows all programs and which of them it must run; no process assigns them. The
verdicts are exchanged once, or once for each wave of the update, after its programs have run on all hosts. The exchange is the same
collective as everything else, and all processes ask for the same waves in the same order. A separate store or queue could also fail.
"""

import concurrent.futures
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
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
        self._submitted_at = time.monotonic()
        self._ended_at: dict[P, float] = {}
        self.retried = 0
        """How often programs of this step were run again, on all hosts, until `verdicts` last returned."""
        self.waits: list[float] = []
        """Seconds of each call of `verdicts`."""
        self.tail_seconds = 0.0
        """Seconds from the last submission to the end of the last program so far, on the slowest host, when `verdicts` last returned."""

    def submit(self, key: P, program: str, task: int, parent_output: bytes = b"", priority: int = 0) -> None:
        """Queues a program if this host runs it. Each program goes to the host with the fewest programs per slot. Identical programs go to
        the same host, so that they run once.

        Args:
          key: key of the rollout that wrote it.
          program, task, parent_output, priority: see `Executor.submit`.
        """
        host = self._host_of.get((task, program, parent_output))
        if host is None:
            able = [host for host, slots in enumerate(self._slots) if slots]
            host = min(able, key=lambda h: (self._given_H[h] + 1) / self._slots[h])
            self._given_H[host] += 1
            self._host_of[task, program, parent_output] = host
        self._keys.append(key)
        if host == self._processes.index:
            self._futures[key] = future = self._executor.submit(program, task, parent_output, priority)
            future.add_done_callback(lambda _: self._ended_at.setdefault(key, time.monotonic()))
        self._submitted_at = time.monotonic()

    def _tail(self) -> float:
        """`tail_seconds` of this host. A future wakes those who wait for it before it calls back, so an end may not be noted yet."""
        now = time.monotonic()
        ends = [self._ended_at.get(key, now) for key, future in self._futures.items() if future.done()]
        return max(max(ends, default=0.0) - self._submitted_at, 0.0)

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

    def verdicts(self, while_waiting: Callable[[], None], keys: Collection[P] | None = None) -> dict[P, Verdict]:
        """Waits for programs of this host, then for the other hosts. Returns their verdicts, in the order of submission.

        All processes must call it with the same keys.

        Args:
          while_waiting: called about twice a second.
          keys: of the programs, by default all. Keys without a program are ignored.

        Raises:
          SandboxError, GradingError, RunError: from any of this host's programs that have ended, see `Executor.submit`.
        """
        began = time.monotonic()
        asked = [number for number, key in enumerate(self._keys) if keys is None or key in keys]
        found = self._awaited([number for number in asked if self._keys[number] in self._futures], while_waiting)
        retries, self._retries = self._executor.retries - self._retries, self._executor.retries
        own: dict[str, Any] = {"retries": retries, "tail": self._tail()}
        if self._processes.count > 1:
            own["verdicts"] = [[number, verdict_row(verdict), verdict.execution.cached] for number, verdict in found.items()]
        gathered: list[dict[str, Any]] = self._processes.gather(own)
        self.retried += sum(each["retries"] for each in gathered)
        self.tail_seconds = max(each["tail"] for each in gathered)
        if self._processes.count > 1:
            found = {number: verdict_of(row, cached=cached) for each in gathered for number, row, cached in each["verdicts"]}
        self.waits.append(time.monotonic() - began)
        return {self._keys[number]: found[number] for number in asked}

    def _awaited(self, numbers: Sequence[int], while_waiting: Callable[[], None]) -> dict[int, Verdict]:
        """The verdicts on programs of this host. A failure of the host in any program of the step is raised at once."""
        futures = {number: self._futures[self._keys[number]] for number in numbers}
        waiting = set(futures.values())
        while waiting:
            while_waiting()
            _, waiting = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in self._futures.values():
                if future.done():
                    future.result()
        return {number: future.result() for number, future in futures.items()}
