"""Grading in separate processes on the machine that has the answers. They never execute a program and start no sandbox.

Their memory and time are limited. Whatever a program submits, the result is a grade: a submission that exceeds the limits, ends the process
or makes the grading fail is invalid. A grading that fails for the sample submission, too, is the competition's fault, and so raises.
"""

import dataclasses
import logging
import os
import pickle
import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Protocol

from discover_jax.exceptions import GradingError
from discover_jax.execution import children
from discover_jax.execution.backend import RunTask, borrowed
from discover_jax.execution.limits import GIB
from discover_jax.types import Execution, Grade, Outcome, Verdict
from discover_jax.untrusted_text import printable

_TRIES = 2
"""How often a submission is graded if the process ends: once more, because the host may have ended it."""
_LEAST_BYTES, _BYTES_PER_BYTE = 4 * GIB, 64
"""Memory for the grading of a submission: at least this, and this many bytes for each of its own. pandas needs up to 30 for short cells."""
_log = logging.getLogger(__name__)


class GradedTask(RunTask, Protocol):
    """A task whose programs return submissions. It must be picklable.

    A program runs once for each of `public_dirs`, in order, as long as its submissions are valid. `grade` grades the submission of one
    run; `combine` turns the grades of all runs into one. `prepare_grading` loads what these need, before memory is limited. `sample` is
    the sample submission of a run.
    """

    def prepare_grading(self) -> None: ...
    def sample(self, run: int) -> bytes: ...
    def grade(self, csv: bytes, run: int) -> Grade: ...
    def combine(self, grades: Sequence[Grade]) -> Grade: ...


@dataclasses.dataclass(frozen=True)
class _Failed:
    """The grading raised this error. The submission may have caused it, or not."""

    text: str


def judge(task: GradedTask, csv: bytes, earlier: Sequence[Grade]) -> Grade | _Failed:
    """The grade of a submission: of one run, or, for the last run, of the whole program.

    Args:
      task: holds the answers.
      csv: the submission.
      earlier: the valid grades of the program's earlier runs.
    """
    run = len(earlier)
    try:
        grade = task.grade(csv, run)
        return task.combine([*earlier, grade]) if grade.valid and run == len(task.public_dirs) - 1 else grade
    except MemoryError:
        return _invalid(f"grading the submission of {len(csv):,} bytes needs more than {memory_for(csv) / GIB:.1f} GiB of memory")
    except Exception as error:
        return _Failed(f"Grading a submission of {len(csv)} bytes failed: {_described(error)}.")


def memory_for(csv: bytes) -> int:
    """Memory in bytes that the grading of a submission may take."""
    return max(_LEAST_BYTES, _BYTES_PER_BYTE * len(csv))


def _described(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # for example an error about an integer of too many digits
        return type(error).__name__


def _invalid(reason: str) -> Grade:
    return Grade(False, reason, None, None)


def main(connection: Connection, parent: int, tasks_bytes: bytes) -> None:
    """Grades until the connection closes.

    Receives a task's index, then (CSV, earlier grades); instead of the CSV, None for the sample submission. Sends None when it is ready to
    grade for the task, or a GradingError; then a Grade or _Failed.
    """
    children.begin(parent)
    tasks: list[GradedTask] = pickle.loads(tasks_bytes)
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    while True:
        try:
            task = tasks[connection.recv()]
            try:
                task.prepare_grading()
            except Exception as error:
                connection.send(GradingError(f"The answers of a competition cannot be loaded: {_described(error)}"))
                continue
            connection.send(None)
            csv, earlier = connection.recv()
        except EOFError:
            return
        if csv is None:
            csv = task.sample(len(earlier))
        # What this process writes to, not its address space: threads of packages reserve much more than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + memory_for(csv), unlimited[1]))
        reply = judge(task, csv, earlier)
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)
        connection.send(reply)


def _data_bytes() -> int:
    """Memory that counts for RLIMIT_DATA."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")


class Graders:
    """Processes that grade for many threads."""

    def __init__(self, tasks_bytes: bytes, *, slots: int, seconds: float) -> None:
        """Starts one process without waiting for it. The others start if as many submissions are graded at once.

        Args:
          tasks_bytes: the pickled tasks whose submissions are graded.
          slots: number of programs that run at once. There are at most this many processes, and at most one for each of this machine's
            cores.
          seconds: limit for a submission, and for the process to become ready.
        """
        self._children = children.Children()
        self._seconds = seconds
        self._free = self._children.slots_on_demand(min(slots, len(os.sched_getaffinity(0))), "grading", main, tasks_bytes)

    def verdict(self, task: int, execution: Execution, earlier: Sequence[Grade]) -> Verdict:
        """The verdict on one of a program's runs; for the last run, on the program. `earlier`: the grades of the runs before.

        Raises:
          GradingError: the task's grading failed, also for the sample submission, or its answers cannot be loaded.
          SandboxError: the host failed, or the executor was closed.
        """
        if execution.outcome is not Outcome.OK or execution.result is None:
            return Verdict(execution.outcome, Grade(False, execution.detail, None, None), execution)
        grade = self._grade(task, execution.result, earlier)
        grade = dataclasses.replace(grade, reason=printable(grade.reason))  # it may quote the submission
        return Verdict(Outcome.OK if grade.valid else Outcome.INVALID_SUBMISSION, grade, execution)

    def _grade(self, task: int, csv: bytes, earlier: Sequence[Grade]) -> Grade:
        reply = self._reply(task, csv, earlier)
        if isinstance(reply, Grade):
            return reply
        if isinstance(self._reply(task, None, earlier), _Failed):
            raise GradingError(
                f"{reply.text} So does grading the sample submission. For an invalid submission, grading must return"
                " Grade(valid=False, reason=...). Fix the competition's metric."
            )
        _log.warning("%s The sample submission can be graded, so this one counts as invalid.", reply.text)
        return _invalid(reply.text)

    def _reply(self, task: int, csv: bytes | None, earlier: Sequence[Grade]) -> Grade | _Failed:
        """What the process says about a submission; None: the sample submission."""
        name = "the sample submission" if csv is None else f"the submission of {len(csv):,} bytes"
        for _ in range(_TRIES):
            with borrowed(self._free) as slot:
                slot.ask(task, self._seconds)
                try:
                    return slot.ask((csv, list(earlier)), self._seconds)
                except children.HungError:
                    return _invalid(f"grading {name} takes longer than {self._seconds:g} s")
                except children.EndedError:
                    if self._children.closed:
                        raise
        return _invalid(f"the process that grades {name} ended")  # not the host's fault, since it ended each time

    def close(self) -> None:
        """Ends the processes; callers that wait for a grade get a SandboxError. Idempotent."""
        self._children.close()

    def release(self) -> None:
        """Releases resources after `close`, once no caller waits any more."""
        self._children.release()
