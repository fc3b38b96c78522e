"""Grading in separate processes on the machine that has the answers. They never execute a program and start no sandbox."""

import dataclasses
import os
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Protocol

from discover_jax.exceptions import GradingError
from discover_jax.execution import children
from discover_jax.execution.backend import RunTask, borrowed
from discover_jax.execution.output import printable
from discover_jax.types import Execution, Grade, Outcome, Verdict


class GradedTask(RunTask, Protocol):
    """A task whose programs return submissions. It must be picklable.

    A program runs once for each of `public_dirs`, in order, as long as its submissions are valid. `grade` grades the submission of one
    run; `combine` turns the grades of all runs into one.
    """

    def grade(self, csv: bytes, run: int) -> Grade: ...
    def combine(self, grades: Sequence[Grade]) -> Grade: ...


def judge(task: GradedTask, csv: bytes, earlier: Sequence[Grade]) -> Grade:
    """The grade of a submission: of one run, or, for the last run, of the whole program.

    Args:
      task: holds the answers.
      csv: the submission.
      earlier: the valid grades of the program's earlier runs.

    Raises:
      GradingError: the task's grading itself failed, which no submission should be able to cause.
    """
    run = len(earlier)
    try:
        grade = task.grade(csv, run)
        return task.combine([*earlier, grade]) if grade.valid and run == len(task.public_dirs) - 1 else grade
    except Exception as error:
        raise GradingError(
            f"Grading a submission of {len(csv)} bytes failed: {type(error).__name__}: {error}. For an invalid submission, grading must"
            " return Grade(valid=False, reason=...). Fix the competition's metric."
        ) from error


def main(connection: Connection, parent: int, tasks_bytes: bytes) -> None:
    """Grades until the connection closes: receives (task index, CSV, earlier grades) and sends a Grade or a GradingError."""
    children.begin(parent)
    tasks: list[GradedTask] = pickle.loads(tasks_bytes)
    while True:
        try:
            task, csv, earlier = connection.recv()
        except EOFError:
            return
        try:
            reply: Grade | GradingError = judge(tasks[task], csv, earlier)
        except GradingError as error:
            reply = error
        connection.send(reply)


class Graders:
    """Processes that grade for many threads."""

    def __init__(self, tasks_bytes: bytes, *, slots: int, seconds: float) -> None:
        """Starts the processes without waiting for them.

        Args:
          tasks_bytes: the pickled tasks whose submissions are graded.
          slots: number of programs that run at once. The number of processes is the minimum of this and this machine's cores.
          seconds: a process that takes longer for a submission counts as hung and is killed.
        """
        self._children = children.Children()
        self._seconds = seconds
        self._free = self._children.warm_slots(min(slots, len(os.sched_getaffinity(0))), "grading", main, tasks_bytes)

    def verdict(self, task: int, execution: Execution, earlier: Sequence[Grade]) -> Verdict:
        """The verdict on one of a program's runs; for the last run, on the program. `earlier`: the grades of the runs before.

        Raises:
          GradingError: see `judge`.
          SandboxError: the grading process ended or hung.
        """
        if execution.outcome is not Outcome.OK or execution.result is None:
            return Verdict(execution.outcome, Grade(False, execution.detail, None, None), execution)
        with borrowed(self._free) as slot:
            grade: Grade = slot.ask((task, execution.result, list(earlier)), self._seconds)
        grade = dataclasses.replace(grade, reason=printable(grade.reason))  # it may quote the submission
        return Verdict(Outcome.OK if grade.valid else Outcome.INVALID_SUBMISSION, grade, execution)

    def close(self) -> None:
        """Ends the processes; callers that wait for a grade get a SandboxError. Idempotent."""
        self._children.close()

    def release(self) -> None:
        """Releases resources after `close`, once no caller waits any more."""
        self._children.release()
