"""The process of one slot: keeps a warm sandbox, runs one program after the other, and grades what comes back.

It never executes a candidate's code and does not import jax. It dies with the main process, and its sandboxes die with it.
"""

import ctypes
import dataclasses
import os
import pickle
import signal
import sys
from collections.abc import Sequence
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


def judge(task: Any, execution: Execution, run: int) -> Verdict:
    """Grades the submission of one of a program's runs, if there is one.

    Raises:
      GradingError: the task's grading itself failed, which no submission should be able to bring about.
    """
    if execution.outcome is not Outcome.OK or execution.csv is None:
        return Verdict(execution.outcome, Grade(False, execution.detail, None, None), execution)
    try:
        grade = task.grade(execution.csv, run)
    except Exception as error:
        raise GradingError(
            f"Grading a submission of {len(execution.csv)} bytes failed: {type(error).__name__}: {error}. An invalid submission must be"
            " answered with Grade(valid=False, reason=...); correct the competition's metric."
        ) from error
    return Verdict(Outcome.OK if grade.valid else Outcome.INVALID_SUBMISSION, grade, execution)


def _combined(task: Any, verdicts: Sequence[Verdict]) -> Verdict:
    """A program's verdict from those of its runs: that of the one which failed; or all scores together, and the last run's submission."""
    first, last = verdicts[0], verdicts[-1]
    seconds = sum(verdict.execution.seconds for verdict in verdicts)
    if last.outcome is not Outcome.OK:
        return dataclasses.replace(last, execution=dataclasses.replace(last.execution, seconds=seconds))
    execution = dataclasses.replace(last.execution, seconds=seconds, stdout=first.execution.stdout)
    return Verdict(Outcome.OK, task.combine([verdict.grade for verdict in verdicts]), execution)


def main(connection: Connection, plan: sandbox.Plan, tasks_bytes: bytes, parent: int) -> None:
    """Serves programs until the connection closes: receives (index of the task, program), sends a Verdict or an error of this project.

    Args:
      connection: to the main process.
      plan: how this slot's sandboxes are made, for the first run of the first task's programs; others see another folder.
      tasks_bytes: the pickled tasks; unpickled here, while the first sandbox warms up.
      parent: pid of the main process.
    """
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the main process decides what it means
    signal.signal(signal.SIGTERM, _leave)
    os.sched_setaffinity(0, plan.cores)
    # By task and run. While a program runs, the sandbox that probably comes next warms up on the same cores.
    spares: dict[tuple[int, int], sandbox.Sandbox | None] = {}
    running: sandbox.Sandbox | None = None
    try:
        spares[0, 0] = _start(plan)
        tasks = pickle.loads(tasks_bytes)
        plans = [[dataclasses.replace(plan, public=shown.resolve()) for shown in task.public_dirs] for task in tasks]
        while True:
            try:
                number, program = connection.recv()
            except EOFError:
                return
            reply: Verdict | Exception
            try:
                verdicts: list[Verdict] = []
                for run, plan in enumerate(plans[number]):
                    running = spares.pop((number, run), None) or sandbox.start(plan)
                    running.wait_ready()
                    following = (run + 1) % len(plans[number])
                    spares[number, following] = spares.get((number, following)) or _start(plans[number][following])
                    execution = running.run(program)
                    running.close()
                    verdicts.append(judge(tasks[number], execution, run))
                    if verdicts[-1].outcome is not Outcome.OK:
                        break
                spares[number, 0] = spares.get((number, 0)) or _start(plans[number][0])
                reply = _combined(tasks[number], verdicts)
            except (SandboxError, GradingError) as error:
                reply = error
            if running is not None:
                running.close()
            connection.send(reply)
    finally:
        for box in (running, *spares.values()):
            if box is not None:
                box.close()


def _start(plan: sandbox.Plan) -> sandbox.Sandbox | None:
    """A spare sandbox; None if it cannot be started now, in which case the next program tries again and tells why."""
    try:
        return sandbox.start(plan)
    except SandboxError:
        return None
