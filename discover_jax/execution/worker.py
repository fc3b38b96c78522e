"""The process of one slot: keeps a warm sandbox and runs programs one at a time.

It never executes a program outside a sandbox, has no answers, and imports neither jax nor pandas. Its sandboxes die with it.
"""

import dataclasses
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from discover_jax.exceptions import SandboxError
from discover_jax.execution import children, sandbox
from discover_jax.execution.backend import Call, End, Execute, Load, Request, ShownTask
from discover_jax.types import Answer, Execution, Outcome


def main(connection: Connection, parent: int, spec: sandbox.SandboxSpec, shown: Sequence[ShownTask]) -> None:
    """Serves requests until the connection closes: receives a Request and sends its reply or a SandboxError.

    Args:
      connection: to the process `parent`.
      parent: pid of the process that started this one.
      spec: of this slot's sandboxes, except for what depends on the task.
      shown: what programs see of each task.
    """
    children.begin(parent)
    os.sched_setaffinity(0, spec.cores)
    boxes = _Boxes(spec, shown)
    try:
        while True:
            try:
                while boxes.running and not connection.poll(_LOOK_SECONDS):
                    boxes.look()
                request: Request = connection.recv()
            except EOFError:
                return
            try:
                reply = boxes.serve(request)
            except SandboxError as error:
                boxes.end()
                reply = error
            connection.send(reply)
    finally:
        boxes.close()


_LOOK_SECONDS = 0.1
"""Time between two looks at the memory of a program that waits for its next call."""


def _spec_for(task: ShownTask, folder: Path, spec: sandbox.SandboxSpec) -> sandbox.SandboxSpec:
    """The spec of a task's sandboxes. Those of problems preload nothing: their programs seldom need packages for tables, whose imports
    would take most of the time of a call that starts the program again (`fresh=True`)."""
    return dataclasses.replace(spec, public=folder, calls=task.calls, preload=() if task.calls else spec.preload)


class _Boxes:
    """The sandbox that is in use, and spares. While one runs, the sandbox that is probably needed next warms up on the same cores."""

    def __init__(self, spec: sandbox.SandboxSpec, shown: Sequence[ShownTask]) -> None:
        self._specs = [[_spec_for(task, folder, spec) for folder in task.folders] for task in shown]
        self._spares: dict[tuple[int, int], sandbox.Sandbox | None] = {}  # by task and run
        self._running: sandbox.Sandbox | None = None
        self._loaded_task = 0
        self._warm(0, 0)

    @property
    def running(self) -> bool:
        return self._running is not None

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

    def close(self) -> None:
        for box in (self._running, *self._spares.values()):
            if box is not None:
                box.close()

    def _take(self, task: int, run: int) -> sandbox.Sandbox:
        self._running = self._spares.pop((task, run), None) or sandbox.start(self._specs[task][run])
        self._running.wait_ready()
        return self._running

    def _warm(self, task: int, run: int) -> None:
        """Starts a spare sandbox. If it cannot start now, the next program tries again and gets the error."""
        if self._spares.get((task, run)) is None:
            try:
                self._spares[task, run] = sandbox.start(self._specs[task][run])
            except SandboxError:
                self._spares[task, run] = None
