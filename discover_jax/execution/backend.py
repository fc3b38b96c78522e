"""The backend interface of the executor. Backends run programs on this machine (local.py) or on a ray cluster (cluster.py)."""

import contextlib
import dataclasses
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from discover_jax.exceptions import SandboxError

T = TypeVar("T")


@contextlib.contextmanager
def borrowed(free: queue.SimpleQueue[T] | queue.Queue[T]) -> Iterator[T]:
    """Takes an item from the queue, waiting if it is empty. Puts it back when the context ends."""
    one = free.get()
    try:
        yield one
    finally:
        free.put(one)


class RunTask(Protocol):
    """The part of a task that runs its programs; see `grading.GradedTask` and `evaluating.EvaluatedTask`.

    Attributes:
      calls: whether functions of its programs are called one by one, instead of run() once for a submission.
      public_dirs: the only folder that a program sees, for each of its runs.
      fingerprint: covers the data and all settings that a score depends on.
    """

    @property
    def calls(self) -> bool: ...
    @property
    def public_dirs(self) -> Sequence[Path]: ...
    @property
    def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class ShownTask:
    """What programs see of a task.

    Attributes:
      folders: the only folder that a program sees, for each of its runs.
      calls: whether functions of its programs are called one by one, instead of run() once for a submission.
    """

    folders: Sequence[Path]
    calls: bool = False


@dataclasses.dataclass(frozen=True)
class Execute:
    """Runs a program in its own sandbox. The reply is an Execution.

    Attributes:
      task, run: indices of the task and of the program's run. They select the folder that the program sees.
      program: its source.
    """

    task: int
    run: int
    program: str


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads a program in a new sandbox, for calls. The reply is an Answer; if it is not OK, the program has ended.

    Attributes:
      task, program: see Execute.
      parent_output: the value that its parent returned, which it can read from a file; empty for none.
      seconds: limit of loading.
    """

    task: int
    program: str
    parent_output: bytes
    seconds: float


@dataclasses.dataclass(frozen=True)
class Call:
    """Calls a function of the loaded program. The reply is an Answer; if it is not OK, the program has ended.

    Attributes:
      name: of the function.
      arguments: a list in the form of `values.encode`.
      seconds: limit of this call.
    """

    name: str
    arguments: bytes
    seconds: float


@dataclasses.dataclass(frozen=True)
class End:
    """Ends the loaded program, if there is one. The reply is what it printed: a string of limited length."""


Request = Execute | Load | Call | End


class Slot(Protocol):
    """Runs one program at a time."""

    def ask(self, request: Request) -> Any:
        """Serves a request and returns its reply.

        Raises:
          SandboxError: the host failed, or the backend was closed. The program has ended.
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
