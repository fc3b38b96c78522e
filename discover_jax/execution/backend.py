"""What the executor needs of the places where programs run: this machine (local.py), or the nodes of a ray cluster (cluster.py)."""

import contextlib
import queue
from collections.abc import Iterator
from typing import Protocol, TypeVar

from discover_jax.exceptions import SandboxError
from discover_jax.types import Execution

T = TypeVar("T")


@contextlib.contextmanager
def borrowed(free: queue.SimpleQueue[T]) -> Iterator[T]:
    """One of what is free, waiting for it if need be; it is free again at the context's end."""
    one = free.get()
    try:
        yield one
    finally:
        free.put(one)


class Slot(Protocol):
    """A place for one program at a time."""

    def execute(self, task: int, run: int, program: str) -> Execution:
        """Runs a program in a sandbox of its own.

        Args:
          task, run: index of the task that it is for, and of its run, which decide the folder that it sees.
          program: its source.

        Raises:
          SandboxError: the host's fault, or the backend was closed.
        """
        ...


class Backend(Protocol):
    """Slots on one machine or many. Any thread may call any of it."""

    @property
    def slots(self) -> int:
        """How many programs run at once."""
        ...

    @property
    def isolated(self) -> bool:
        """Whether programs run in sandboxes; False for the unsafe backend."""
        ...

    def describe(self) -> str:
        """One line for summaries: how programs are isolated and bounded, and what is weaker than it could be."""
        ...

    def slot(self) -> contextlib.AbstractContextManager[Slot]:
        """A slot for one program and all its runs, which is free again at the context's end; waits until there is one.

        Raises:
          SandboxError: the backend was closed.
          RunError: there will be none any more.
        """
        ...

    def close(self) -> None:
        """Ends all programs; whoever waits for one gets a SandboxError. Idempotent."""
        ...

    def release(self) -> None:
        """Lets go of what `close` ended, once nobody waits any more."""
        ...


class NoSlots:
    """The backend of a process whose programs another one runs."""

    slots, isolated = 0, True

    def describe(self) -> str:
        return ""

    def slot(self) -> contextlib.AbstractContextManager[Slot]:
        raise SandboxError("This process of the run has no slots: the first one hands programs to the cluster for all.")

    def close(self) -> None:
        pass

    def release(self) -> None:
        pass
