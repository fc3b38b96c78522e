"""The process of one slot: keeps a warm sandbox, runs one program after the other, and grades what comes back.

It never executes a candidate's code and does not import jax. It dies with the main process, and its sandboxes die with it.
"""

import ctypes
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from discover_jax.exceptions import GradingError, SandboxError
from discover_jax.execution import sandbox
from discover_jax.types import Execution, Grade, Outcome, Verdict

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _die_with(parent: int) -> None:
    """Asks the kernel to kill this process when the thread that started it ends; leaves if that has happened already.

    And to be handed the orphans of its sandboxes: an init that does not collect them, as in many containers, would let them pile up.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
    if os.getppid() != parent:
        sys.exit(1)


def _leave(*_: object) -> None:
    """Ends the process in good order; a second request must not interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def judge(task: Any, execution: Execution) -> Verdict:
    """Grades an execution's submission, if there is one.

    Raises:
      GradingError: the task's grading itself failed, which no submission should be able to bring about.
    """
    if execution.outcome is not Outcome.OK or execution.csv is None:
        return Verdict(execution.outcome, Grade(False, execution.detail, None, None), execution)
    try:
        grade = task.grade(execution.csv)
    except Exception as error:
        raise GradingError(
            f"Grading a submission of {len(execution.csv)} bytes failed: {type(error).__name__}: {error}. An invalid submission must be"
            " answered with Grade(valid=False, reason=...); correct the competition's metric."
        ) from error
    return Verdict(Outcome.OK if grade.valid else Outcome.INVALID_SUBMISSION, grade, execution)


def main(connection: Connection, plan: sandbox.Plan, task_bytes: bytes, parent: int) -> None:
    """Serves programs until the connection closes: receives a str, sends a Verdict or an error of this project.

    Args:
      connection: to the main process.
      plan: how this slot's sandboxes are made.
      task_bytes: the pickled task; unpickled here, while the first sandbox warms up.
      parent: pid of the main process.
    """
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the main process decides what it means
    signal.signal(signal.SIGTERM, _leave)
    os.sched_setaffinity(0, plan.cores)
    spare: sandbox.Sandbox | None = None
    running: sandbox.Sandbox | None = None
    try:
        spare = _start(plan)
        task = pickle.loads(task_bytes)
        while True:
            try:
                program = connection.recv()
            except EOFError:
                return
            reply: Verdict | Exception
            try:
                running, spare = spare or sandbox.start(plan), None
                running.wait_ready()
                spare = _start(plan)  # warms up while this program runs, on the same cores
                execution = running.run(program)
                running.close()
                reply = judge(task, execution)
            except (SandboxError, GradingError) as error:
                reply = error
            if running is not None:
                running.close()
            connection.send(reply)
    finally:
        for box in (running, spare):
            if box is not None:
                box.close()


def _start(plan: sandbox.Plan) -> sandbox.Sandbox | None:
    """A spare sandbox; None if it cannot be started now, in which case the next program tries again and tells why."""
    try:
        return sandbox.start(plan)
    except SandboxError:
        return None
