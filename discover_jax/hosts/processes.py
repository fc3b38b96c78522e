"""Who the processes of a run are, and what they tell each other: through jax's own collectives, so that no further port or store is needed.

All processes run the same program on the same data. What one alone can know or do (files, outcomes of programs, a device's memory) is told
to all before anything is decided by it.
"""

import contextlib
import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from discover_jax.exceptions import ConfigError, HostError

HEARTBEAT_SECONDS = 40
"""After so long without a sign of life a process counts as lost: jax's own check, beside that of `watch`."""
_JOIN_SECONDS, _PATIENCE_SECONDS = 300, 15
"""For the processes to come together, and after which the wait is told of."""
_PART_BYTES = 1 << 24
"""So much of a message lies on a device at once, of each process."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all of a run.

    Attributes:
      index: of this one; 0 leads: it alone writes journal, metrics, best/ and the screen.
      count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the first."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; all must call it. What JSON can hold."""
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
        """What `make` gives in the first process, which alone calls it; what JSON can hold. All must call this."""
        return self.gather(make() if self.leads else None)[0]

    def first_then_others(self, make: Callable[[], T]) -> T:
        """What `make` gives here. The first process calls it before all others, which then find what it put into a folder."""
        made = make() if self.leads else None
        self.wait()
        return made if made is not None else make()

    def wait(self) -> None:
        """Goes on once all processes have come here."""
        self.gather(None)

    def agree(self, what: str, value: Any, remedy: str) -> None:
        """Checks that all processes have the same value; all must call it.

        Raises:
          ConfigError: in all processes, naming those that differ from the first, and what both have.
        """
        values = self.gather(value)
        others = [index for index, other in enumerate(values) if other != values[0]]
        if others:
            raise ConfigError(
                f"The processes of this run differ in {what}: process 0 has {values[0]!r}, process {others[0]} has {values[others[0]]!r}"
                f" (differing from process 0: {', '.join(map(str, others))} of {self.count}). {remedy}"
            )


ALONE = Processes()


def start(coordinator: str, count: int, index: int) -> Processes:
    """Joins the processes of a run; to be called before jax first looks for devices.

    Args:
      coordinator: HOST:PORT of process 0, where the port is free; empty: jax finds all three by itself (SLURM, Open MPI, Cloud TPU, GKE).
      count, index: processes in all, and which this is.

    Raises:
      ConfigError: jax cannot tell where it runs, or the numbers do not fit together.
      HostError: not all processes came.
    """
    if coordinator and not (":" in coordinator and count >= 1 and 0 <= index < count):
        raise ConfigError(
            f"--coordinator={coordinator} --num_processes={count} --process_id={index}: all three must be given, the address as HOST:PORT,"
            " the number as 1 or more, and the id from 0 to below it, another one for each process."
        )
    given: dict[str, Any] = {}
    if coordinator:
        # Without detection a process takes all devices of its host, whatever scheduler started it.
        given = {"coordinator_address": coordinator, "num_processes": count, "process_id": index, "cluster_detection_method": "deactivate"}
    try:
        with _reminder(coordinator or "found by jax"):
            jax.distributed.initialize(**given, initialization_timeout=_JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise ConfigError(
            f"jax could not find out which process of how many this is ({error}). Give --coordinator=HOST:PORT, --num_processes and"
            " --process_id instead of --distributed."
        ) from error
    except RuntimeError as error:
        raise HostError(
            f"The processes of this run did not come together ({str(error).splitlines()[0]}; process 0: {coordinator or 'found by jax'})."
            f" Start all within {_JOIN_SECONDS} s with the same address of process 0, which all hosts must reach and where the port must be"
            " free; look into the logs of the others."
        ) from error
    return Processes(jax.process_index(), jax.process_count())


@contextlib.contextmanager
def _reminder(coordinator: str) -> Iterator[None]:
    """Says what is waited for: if the others do not come, jax ends the process by an abort, which says little."""
    text = (
        f"note: waiting for the other processes of this run (process 0: {coordinator}), {_JOIN_SECONDS} s at most. Start all by the same"
        " command with the same address of process 0, which all hosts must reach; look into the logs of the others."
    )
    timer = threading.Timer(_PATIENCE_SECONDS, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def least(processes: Processes, value: int | None) -> int | None:
    """The least of a number that may differ from host to host, such as a device's memory; None where all say None."""
    known = [each for each in processes.gather(value) if each is not None]
    return min(known) if known else None
