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
from discover_jax.types import Execution, Outcome


def main(connection: Connection, parent: int, spec: sandbox.SandboxSpec, publics: Sequence[Sequence[Path]]) -> None:
    """Runs programs until the connection closes: receives (task index, run index, program) and sends an Execution or a SandboxError.

    Args:
      connection: to the process `parent`.
      parent: pid of the process that started this one.
      spec: of this slot's sandboxes, except for the folder that they see.
      publics: the folder that programs see, for each run of each task.
    """
    children.begin(parent)
    os.sched_setaffinity(0, spec.cores)
    specs = [[dataclasses.replace(spec, public=shown) for shown in shown_of_task] for shown_of_task in publics]
    # By task and run. While a program runs, the sandbox that is probably needed next warms up on the same cores.
    spares: dict[tuple[int, int], sandbox.Sandbox | None] = {(0, 0): _start(specs[0][0])}
    running: sandbox.Sandbox | None = None

    def warm(task: int, run: int) -> None:
        spares[task, run] = spares.get((task, run)) or _start(specs[task][run])

    try:
        while True:
            try:
                task, run, program = connection.recv()
            except EOFError:
                return
            reply: Execution | SandboxError
            try:
                running = spares.pop((task, run), None) or sandbox.start(specs[task][run])
                running.wait_ready()
                warm(task, (run + 1) % len(specs[task]))
                reply = running.run(program)
                running.close()
                if reply.outcome is not Outcome.OK:  # no further run of this program will come
                    warm(task, 0)
            except SandboxError as error:
                reply = error
            if running is not None:
                running.close()
            connection.send(reply)
    finally:
        for box in (running, *spares.values()):
            if box is not None:
                box.close()


def _start(spec: sandbox.SandboxSpec) -> sandbox.Sandbox | None:
    """Starts a spare sandbox; None if it cannot start now. Then the next program tries again and gets the error."""
    try:
        return sandbox.start(spec)
    except SandboxError:
        return None
