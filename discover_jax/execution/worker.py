"""The process of one slot: keeps a warm sandbox and runs programs one at a time.

It never executes a program outside a sandbox, has no answers, and imports neither jax nor pandas, and numpy only for calls. Its sandboxes
die with it.
"""

import dataclasses
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from discover_jax.exceptions import SandboxError
from discover_jax.execution import children, sandbox
from discover_jax.execution.backend import Call, End, Execute, Load, Request, ShownTask
from discover_jax.execution.quarantine import Survivor
from discover_jax.execution.sandbox_spec import SandboxSpec
from discover_jax.types import Answer, Execution, Outcome


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a worker sends for a request.

    Attributes:
      value: the reply to the request, or a SandboxError.
      survivor: a process of the program that has not ended although it was killed. Until it has, the slot can run no other program.
    """

    value: Any
    survivor: Survivor | None


def main(connection: Connection, parent: int, spec: SandboxSpec, shown: Sequence[ShownTask]) -> None:
    """Serves requests until the connection closes: receives a Request and sends a Reply.

    Args:
      connection: to the process `parent`.
      parent: pid of the process that started this one.
      spec: of this slot's sandboxes, except for what depends on the task.
      shown: what programs see of each task.
    """
    children.begin(parent)
    os.sched_setaffinity(0, spec.cores)
    sandboxes = _Sandboxes(spec, shown)
    try:
        while True:
            try:
                while sandboxes.running and not connection.poll(_LOOK_SECONDS):
                    sandboxes.look()
                request: Request = connection.recv()
            except EOFError:
                return
            try:
                reply = sandboxes.serve(request)
            except SandboxError as error:
                sandboxes.end()
                reply = error
            connection.send(Reply(reply, sandboxes.survivor))
    finally:
        sandboxes.close()


_LOOK_SECONDS = 0.1
"""Time between two looks at the memory of a program that waits for its next call."""


def _spec_for(task: ShownTask, folder: Path, spec: SandboxSpec) -> SandboxSpec:
    """The spec of a task's sandboxes. Those of problems preload nothing: their programs seldom need packages for tables, whose imports
    would take most of the time of a call that starts the program again (`fresh=True`)."""
    return dataclasses.replace(spec, public=folder, calls=task.calls, preload=() if task.calls else spec.preload)


class _Sandboxes:
    """The sandbox that is in use, and spares. While one runs, the sandbox that is probably needed next warms up on the same cores."""

    def __init__(self, spec: SandboxSpec, shown: Sequence[ShownTask]) -> None:
        self._specs = [[_spec_for(task, folder, spec) for folder in task.folders] for task in shown]
        self._spares: dict[tuple[int, int], sandbox.Sandbox | None] = {}  # by task and run
        self._running: sandbox.Sandbox | None = None
        self._dying: sandbox.Sandbox | None = None  # was killed, but has a process that has not ended
        self._loaded_task = 0
        self._warm(0, 0)

    @property
    def running(self) -> bool:
        return self._running is not None

    @property
    def survivor(self) -> Survivor | None:
        """See `Reply`."""
        return None if self._dying is None else self._dying.survivor

    def look(self) -> None:
        """See `Sandbox.look`."""
        if self._running is not None:
            self._running.look()

    def serve(self, request: Request) -> Execution | Answer | str:
        match request:
            case Execute(task, run, program):
                box = self._take(task, run)
                self._warm(task, (run + 1) % len(self._specs[task]))
                execution = box.run(program)
                self.end()
                if execution.outcome is not Outcome.OK:  # no further run of this program will come
                    self._warm(task, 0)
                return execution
            case Load(task, program, parent_output, seconds):
                self.end()
                if not self._settled():  # it is the same program, which starts again
                    return Answer(Outcome.TIMEOUT, None, sandbox.SLOW_END, 0.0, 0.0)
                self._loaded_task = task
                return self._take(task, 0).load(program, parent_output, seconds)  # no spare warms up while calls are timed
            case Call(name, arguments, seconds):
                assert self._running is not None, "a program was loaded before"
                return self._running.call(name, arguments, seconds)
            case End():
                said = self.end()
                self._warm(self._loaded_task, 0)
                return said

    def end(self) -> str:
        """Ends the running sandbox, if there is one, and returns what its program printed."""
        box, self._running = self._running, None
        if box is None:
            return ""
        try:
            return box.end()
        finally:
            box.close()
            if box.survivor is not None:
                self._dying = box

    def close(self) -> None:
        for box in (self._running, self._dying, *self._spares.values()):
            if box is not None:
                box.close()

    def _settled(self) -> bool:
        """Whether all processes of earlier programs have ended."""
        if self._dying is not None:
            self._dying.close()
            if self._dying.survivor is None:
                self._dying = None
        return self._dying is None

    def _take(self, task: int, run: int) -> sandbox.Sandbox:
        if not self._settled():
            raise SandboxError(f"{self.survivor} of an earlier program has not ended although it was killed.")
        self._running = self._spares.pop((task, run), None) or sandbox.start(self._specs[task][run])
        self._running.wait_ready()
        return self._running

    def _warm(self, task: int, run: int) -> None:
        """Starts a spare sandbox. If it cannot start now, the next program tries again and gets the error."""
        if self._dying is None and self._spares.get((task, run)) is None:
            try:
                self._spares[task, run] = sandbox.start(self._specs[task][run])
            except SandboxError:
                self._spares[task, run] = None
