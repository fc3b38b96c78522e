"""The backend interface of the executor. Backends run programs on this machine (local.py) or on a ray cluster (cluster.py)."""

import contextlib
import queue
from collections.abc import Iterator
from typing import Protocol, TypeVar

from discover_jax.exceptions import SandboxError
from discover_jax.types import Execution

T = TypeVar("T")


@contextlib.contextmanager
def borrowed(free: queue.SimpleQueue[T]) -> Iterator[T]:
    """Takes an item from the queue, waiting if it is empty. Puts it back when the context ends."""
    one = free.get()
    try:
        yield one
    finally:
        free.put(one)


class Slot(Protocol):
    """Runs one program at a time."""

    def execute(self, task: int, run: int, program: str) -> Execution:
        """Runs a program in its own sandbox.

        Args:
          task, run: indices of the task and of the program's run. They select the folder that the program sees.
          program: its source.

        Raises:
          SandboxError: the host failed, or the backend was closed.
        """
        ...


class Backend(Protocol):
    """Slots on one machine or several. All methods are thread-safe."""

    @property
    def slots(self) -> int:
        """Number of programs that run at once."""
        ...

    @property
    def isolated(self) -> bool:
        """Whether programs run in sandboxes; False for the unsafe backend."""
        ...

    def describe(self) -> str:
        """One line for summaries: isolation, limits, and anything weaker than the best setup."""
        ...

    def slot(self) -> contextlib.AbstractContextManager[Slot]:
        """Waits for a free slot for one program and all its runs. The slot is free again when the context ends.

        Raises:
          SandboxError: the backend was closed.
          RunError: no slot will become free again.
        """
        ...

    def close(self) -> None:
        """Ends all programs; callers that wait for one get a SandboxError. Idempotent."""
        ...

    def release(self) -> None:
        """Releases resources after `close`, once no caller waits any more."""
        ...


class NoSlots:
    """The backend of a process that leaves running programs to another process."""

    slots, isolated = 0, True

    def describe(self) -> str:
        return ""

    def slot(self) -> contextlib.AbstractContextManager[Slot]:
        raise SandboxError("This process has no slots: the first process of the run sends all programs to the cluster.")

    def close(self) -> None:
        pass

    def release(self) -> None:
        pass
