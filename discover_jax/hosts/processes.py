"""The processes of a run and their communication. It uses jax's collectives, so it needs no additional port or store.

All processes run the same code on the same data. A value that only one process knows (files, outcomes of programs, a device's memory) is
sent to all before any decision depends on it.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from discover_jax.exceptions import ConfigError, TemporaryError
from discover_jax.hosts.waiting import reminder

HEARTBEAT_SECONDS = 40
"""jax treats a process without a heartbeat for this long as lost, in addition to the check in `watch`."""
JOIN_SECONDS = 300
"""Time limit for all processes to join."""
_PART_BYTES = 1 << 24
"""Bytes of a message, per process, that are on a device at once."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process and the number of processes of the run.

    Attributes:
      index: index of this process. Process 0 leads: only it writes journal, metrics, best/ and the console.
      count: number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the first."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by index. All processes must call it. The value must be JSON."""
        if self.count == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.uint32(len(data)))
        parts = []
        for first in range(0, int(sizes.max()), _PART_BYTES):
            part = np.zeros(min(_PART_BYTES, int(sizes.max()) - first), np.uint8)
            mine = data[first : first + len(part)]
            part[: len(mine)] = mine
            parts.append(multihost_utils.process_allgather(part))
        whole = np.concatenate(parts, axis=1)
        return [json.loads(row[:size].tobytes()) for row, size in zip(whole, sizes, strict=True)]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The result of `make`, which only the first process calls, in all processes. All must call this. The result must be JSON."""
        return self.gather(make() if self.leads else None)[0]

    def first_then_others(self, make: Callable[[], T]) -> T:
        """The result of `make` in this process. The first process calls it before the others, which then find the files that it wrote."""
        made = make() if self.leads else None
        self.wait()
        return made if made is not None else make()

    def wait(self) -> None:
        """Waits until all processes have called this."""
        self.gather(None)

    def agree(self, what: str, value: Any, remedy: str) -> None:
        """Checks that all processes have the same value. All must call it.

        Raises:
          ConfigError: values differ. All processes raise it; the message names the processes that differ from the first.
        """
        values = self.gather(value)
        others = [index for index, other in enumerate(values) if other != values[0]]
        if others:
            raise ConfigError(
                f"The processes of this run differ in {what}: process 0 has {values[0]!r}, process {others[0]} has {values[others[0]]!r}"
                f" (differing from process 0: {', '.join(map(str, others))} of {self.count}). {remedy}"
            )


ALONE = Processes()


def place_of(coordinator: str, count: int, index: int) -> tuple[str, int, int]:
    """Address of process 0, number of processes and index of this one, as `start` will use them. Starts nothing.

    Args:
      coordinator, count, index: as for `start`.

    Raises:
      ConfigError: see `start`.
    """
    _check_place(coordinator, count, index)
    if coordinator:
        return coordinator, count, index
    # jax has no public function for this. `start` calls jax.distributed.initialize, which asks the same.
    from jax._src.clusters import ClusterEnv

    address, number, mine, _ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, JOIN_SECONDS)
    if address is None or number is None or mine is None:
        raise ConfigError(_not_detected(f"address {address}, processes {number}, index {mine}"))
    return address, number, mine


def _check_place(coordinator: str, count: int, index: int) -> None:
    if coordinator and not (":" in coordinator and count >= 1 and 0 <= index < count):
        raise ConfigError(
            f"--coordinator={coordinator} --num_processes={count} --process_id={index}: give all three: the address as HOST:PORT,"
            " the number of processes, at least 1, and a different id for each process, from 0 to that number minus 1."
        )


def _not_detected(what: str) -> str:
    return (
        f"jax could not detect the processes of this run ({what}). Give --coordinator=HOST:PORT, --num_processes and --process_id instead"
        " of --distributed."
    )


def start(coordinator: str, count: int, index: int) -> Processes:
    """Joins the processes of a run. Call it before jax first looks for devices.

    Args:
      coordinator: HOST:PORT of process 0, with a free port. If empty, jax detects all three values (SLURM, Open MPI, Cloud TPU, GKE).
      count, index: number of processes, and index of this one.

    Raises:
      ConfigError: jax cannot detect the processes, or the arguments contradict each other.
      TemporaryError: not all processes joined.
    """
    _check_place(coordinator, count, index)
    given: dict[str, Any] = {}
    # When joining times out, jax aborts the process and explains little.
    waiting = (
        f"note: waiting for the other processes of this run (process 0: {coordinator or 'found by jax'}), at most {JOIN_SECONDS} s. Start"
        " all of them with the same command and the same address of process 0, which all hosts must reach. Read the logs of the other"
        " processes."
    )
    if coordinator:
        # With detection off, a process takes all devices of its host, whatever scheduler started it.
        given = {"coordinator_address": coordinator, "num_processes": count, "process_id": index, "cluster_detection_method": "deactivate"}
    try:
        with reminder(lambda: waiting):
            jax.distributed.initialize(**given, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise ConfigError(_not_detected(str(error))) from error
    except RuntimeError as error:
        raise TemporaryError(
            f"The processes of this run did not come together ({str(error).splitlines()[0]}; process 0: {coordinator or 'found by jax'})."
            f" Start all of them within {JOIN_SECONDS} s with the same address of process 0. All hosts must be able to reach it, and its"
            " port must be free. Read the logs of the other processes."
        ) from error
    return Processes(jax.process_index(), jax.process_count())


def least(processes: Processes, value: int | None) -> int | None:
    """The minimum of a number that may differ between hosts, such as a device's memory; None if it is None in all processes."""
    known = [each for each in processes.gather(value) if each is not None]
    return min(known) if known else None
