"""Checks solutions of problems: `evaluate` runs in a process of its own, which asks for calls of the program's functions.

The process never executes a program and starts no sandbox. Its time and memory are limited. Whatever a program returns, the result is an
evaluation or a rejection with a reason: values are plain data (`execution.values`), and an exception, a hang or a crash of `evaluate`
rejects the solution.
"""

import dataclasses
import math
import os
import pickle
import queue
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from discover_jax.exceptions import GradingError
from discover_jax.execution import children, values
from discover_jax.execution.backend import Call, End, Load, RunTask, Slot, borrowed
from discover_jax.execution.limits import GIB, MIB
from discover_jax.execution.output import normalised
from discover_jax.types import Answer, Evaluation, Execution, Grade, Outcome, Program, Rejection, Timed, Verdict

MOST_FEEDBACK = 2000
"""Characters of a feedback or a reason that are kept."""
_ARGUMENT_BYTES = 64 * MIB


class EvaluatedTask(RunTask, Protocol):
    """A task whose programs' functions are called by `evaluate`. It must be picklable, and has one public folder."""

    @property
    def evaluate_seconds(self) -> float: ...
    @property
    def evaluate_gib(self) -> float: ...
    def evaluate(self, program: Program) -> Evaluation: ...


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A call that `evaluate` asks for; see `Program.call`."""

    name: str
    arguments: bytes
    seconds: float
    fresh: bool


@dataclasses.dataclass(frozen=True)
class _Result:
    """The end of a check: an evaluation, or the outcome and the reason of a rejection."""

    evaluation: Evaluation | None
    outcome: Outcome = Outcome.OK
    reason: str = ""


class _FailedCall(Rejection):
    """A call failed; ends `evaluate` unless it catches Rejection."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.detail)
        self.outcome = answer.outcome


class _RemoteProgram:
    """See `tasks.problem.Program`. Its calls are served by the process at the other end of the connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._failed: _FailedCall | None = None

    def call(self, name: str, *arguments: Any, seconds: float | None = None, fresh: bool = False) -> Any:
        return self.time(name, *arguments, seconds=seconds, fresh=fresh).value

    def time(self, name: str, *arguments: Any, seconds: float | None = None, fresh: bool = False) -> Timed:
        if self._failed is not None:  # the program has ended
            raise self._failed
        try:
            data = values.encode(list(arguments), _ARGUMENT_BYTES)
        except ValueError as error:
            raise GradingError(f"The problem's evaluate() called {name}() with arguments that cannot be sent: {error}.") from error
        self._connection.send(_Asked(name, data, math.inf if seconds is None else seconds, fresh))
        answer: Answer = self._connection.recv()
        if answer.outcome is Outcome.OK and answer.value is not None:
            try:
                return Timed(values.decode(answer.value), answer.wall_s, answer.cpu_s)
            except ValueError as error:
                answer = dataclasses.replace(answer, outcome=Outcome.INVALID_SUBMISSION, detail=f"{name}() sent no valid value: {error}")
        self._failed = _FailedCall(answer)
        raise self._failed


def check(task: EvaluatedTask, program: Program) -> _Result:
    """The result of a problem's `evaluate`, whatever it does.

    Raises:
      GradingError: `evaluate` did something that no solution can cause, such as returning no Evaluation.
    """
    try:
        evaluation = task.evaluate(program)
    except _FailedCall as failed:
        return _Result(None, failed.outcome, str(failed)[:MOST_FEEDBACK])
    except Rejection as rejection:
        return _rejected(str(rejection))
    except GradingError:
        raise
    except MemoryError:
        return _rejected(f"checking the solution needed more than {task.evaluate_gib:g} GiB of memory")
    except Exception as error:  # caused by an unexpected value, as far as anyone can tell
        return _rejected(f"checking the solution failed: {type(error).__name__}: {error}")
    if not isinstance(evaluation, Evaluation):
        raise GradingError(f"evaluate() must return an Evaluation or raise Rejection; it returned {type(evaluation).__name__}.")
    try:
        score = float(evaluation.score)
        metrics = {str(name): float(number) for name, number in evaluation.metrics.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise GradingError(f"evaluate() returned a score or a metric that is not a number: {error}.") from error
    if not math.isfinite(score):
        return _rejected(f"the score is {score}")
    return _Result(Evaluation(score, str(evaluation.feedback)[:MOST_FEEDBACK], metrics))


def _rejected(reason: str) -> _Result:
    return _Result(None, Outcome.INVALID_SUBMISSION, reason[:MOST_FEEDBACK])


def main(connection: Connection, parent: int, tasks_bytes: bytes) -> None:
    """Checks until the connection closes. Receives a task's index, or None, which it sends back.

    For a task, it sends any number of _Asked, each followed by an Answer, then a _Result or a GradingError.
    """
    children.begin(parent)
    tasks: list[EvaluatedTask] = pickle.loads(tasks_bytes)
    base = _virtual_bytes()
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        if number is None:
            connection.send(None)
            continue
        limit = base + int(tasks[number].evaluate_gib * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            reply: _Result | GradingError = check(tasks[number], _RemoteProgram(connection))
        except GradingError as error:
            reply = error
        connection.send(reply)


def _virtual_bytes() -> int:
    """Address space that this process uses."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class Evaluators:
    """Processes that check solutions for many threads."""

    def __init__(self, tasks_bytes: bytes, *, slots: int, program_seconds: float, start_seconds: float) -> None:
        """Starts the processes without waiting for them.

        Args:
          tasks_bytes: the pickled tasks. Only those of problems are used.
          slots: number of programs that run at once, and of processes: a check waits while the program runs.
          program_seconds: limit of a program, over all of its calls.
          start_seconds: a process that is not ready within this time counts as hung.
        """
        self._children = children.Children()
        self._program_seconds, self._start_seconds = program_seconds, start_seconds
        self._free: queue.SimpleQueue[children.ChildSlot] = queue.SimpleQueue()
        for number in range(slots):
            slot = self._children.slot("evaluation", f"evaluation-{number}", main, tasks_bytes)
            slot.warm()
            self._free.put(slot)

    def verdict(self, number: int, task: EvaluatedTask, program: str, slot: Slot) -> Verdict:
        """Runs a program's functions as `evaluate` asks for, and returns the verdict.

        Args:
          number, task: index and task.
          program: its source.
          slot: runs it.

        Raises:
          GradingError: see `check`.
          SandboxError: the host failed, or the executor was closed.
        """
        for last in (False, True):
            session = _Session(number, program, slot, self._program_seconds)
            with borrowed(self._free) as evaluator:
                evaluator.ask(None, self._start_seconds)  # it is ready
                try:
                    return session.verdict(self._converse(evaluator, session, task.evaluate_seconds))
                except children.HungError:
                    return session.verdict(_rejected(f"checking the solution took longer than {task.evaluate_seconds:g} s"))
                except children.EndedError as error:
                    if self._children.closed:
                        raise
                    if last:  # not the host's fault, since it ended twice
                        return session.verdict(_rejected(f"the process that checks the solution ended: {error}"))
                finally:
                    session.end()
        raise AssertionError("unreachable")

    @staticmethod
    def _converse(evaluator: children.ChildSlot, session: "_Session", seconds: float) -> _Result:
        message: Any = session.number
        while True:
            started = time.monotonic()
            reply = evaluator.ask(message, max(0.0, seconds))
            seconds -= time.monotonic() - started
            if isinstance(reply, _Result):
                return reply
            message = session.answer(reply)

    def close(self) -> None:
        """Ends the processes; callers get a SandboxError. Idempotent."""
        self._children.close()

    def release(self) -> None:
        """Releases resources after `close`, once no caller waits any more."""
        self._children.release()


class _Session:
    """The calls of one program. Loads it on the first call."""

    def __init__(self, number: int, program: str, slot: Slot, seconds: float) -> None:
        self.number = number
        self._program, self._slot, self._limit, self._left = program, slot, seconds, seconds
        self._loaded, self._ended = False, False
        self._value: bytes | None = None
        self._stdout = ""

    def answer(self, asked: _Asked) -> Answer:
        """The program's answer to a call.

        Raises:
          SandboxError: the host failed.
        """
        if asked.fresh or not self._loaded:
            loaded = self._served(lambda seconds: Load(self.number, self._program, seconds), self._left)
            if loaded.outcome is not Outcome.OK:
                return loaded
            self._loaded = True
        answer = self._served(lambda seconds: Call(asked.name, asked.arguments, seconds), asked.seconds)
        if answer.outcome is Outcome.OK:
            self._value = answer.value
        return answer

    def _served(self, request: Callable[[float], Load | Call], seconds: float) -> Answer:
        if self._left <= 0:
            return Answer(Outcome.TIMEOUT, None, self._over_time(), 0.0, 0.0)
        answer: Answer = self._slot.ask(request(min(seconds, self._left)))
        if answer.outcome is Outcome.TIMEOUT and seconds >= self._left:  # the time that was left differs from run to run
            answer = dataclasses.replace(answer, detail=self._over_time())
        self._left -= answer.wall_s
        return answer

    def _over_time(self) -> str:
        return f"its calls took longer than {self._limit:g} s in all"

    def end(self) -> None:
        """Ends the program. May be called repeatedly."""
        if not self._ended:
            self._ended = True
            self._stdout = self._slot.ask(End())

    def verdict(self, result: _Result) -> Verdict:
        """Ends the program, and returns the verdict on it."""
        self.end()
        seconds = self._limit - self._left
        reason = normalised(result.reason, ())
        if result.evaluation is None:
            execution = Execution(result.outcome, None, self._stdout, reason, seconds)
            if result.outcome is Outcome.INVALID_SUBMISSION:  # it ran, but its solution is not valid
                execution = Execution(Outcome.OK, self._value or b"", self._stdout, "", seconds)
            return Verdict(result.outcome, Grade(False, reason, None, None), execution)
        evaluation = result.evaluation
        grade = Grade(True, "", evaluation.score, evaluation.score, normalised(evaluation.feedback, ()), dict(evaluation.metrics))
        return Verdict(Outcome.OK, grade, Execution(Outcome.OK, self._value or b"", self._stdout, "", seconds))
