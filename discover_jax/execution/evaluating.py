"""Checks solutions of problems: `evaluate` runs in a process of its own, which asks for calls of the program's functions.

The process never executes a program and starts no sandbox. Its time and memory are limited. Whatever a program returns, the result is an
evaluation or a rejection with a reason: values are plain data (`execution.values`), and an exception, a hang or a crash of `evaluate`
rejects the solution.
"""

import dataclasses
import itertools
import logging
import math
import os
import pickle
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from discover_jax.exceptions import GradingError, SandboxError
from discover_jax.execution import children, values
from discover_jax.execution.backend import Call, End, Load, RunTask, Slot, borrowed
from discover_jax.execution.limits import GIB, MIB
from discover_jax.execution.output import normalised
from discover_jax.types import Answer, Evaluation, Execution, Grade, Outcome, Program, Rejection, Timed, Verdict

MOST_FEEDBACK = 2000
"""Characters of a feedback or a reason that are kept."""
_ARGUMENT_BYTES = 64 * MIB
_NAME, _MOST_METRICS = 64, 32
"""Characters of a metric's name, and number of metrics. Further ones are left out, and those that are not finite."""
_HIDDEN_DETAIL = 200
"""Characters of an error that are kept where inputs are hidden: an error may tell them."""
_TRIES = 2
"""How often a solution is checked if the process that checks it ends: once more, because the host may have ended it."""
_log = logging.getLogger(__name__)
_OUT_OF_STEP = 70
"""Exit code of a process whose connection failed in the middle of a message."""


class EvaluatedTask(RunTask, Protocol):
    """A task whose programs' functions are called by `evaluate`. It must be picklable, and has one public folder.

    Attributes:
      evaluate_seconds, evaluate_gib: limits of `evaluate`.
      hidden_inputs: whether no output of programs is kept, because it could tell later programs the inputs.
      least_score: the lowest score that has a reward.
    """

    @property
    def evaluate_seconds(self) -> float: ...
    @property
    def evaluate_gib(self) -> float: ...
    @property
    def hidden_inputs(self) -> bool: ...
    @property
    def least_score(self) -> float: ...
    def evaluate(self, program: Program) -> Evaluation: ...


@dataclasses.dataclass(frozen=True)
class _CallRequest:
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
        if seconds is not None and not seconds > 0:
            raise GradingError(f"The problem's evaluate() called {name}() with seconds = {seconds!r}; it must be positive.")
        try:
            data = values.encode(list(arguments), _ARGUMENT_BYTES)
        except ValueError as error:  # perhaps values that the program has returned
            raise Rejection(f"evaluate() cannot send the arguments of {name}(): {error}") from error
        answer = self._ask(_CallRequest(str(name), data, math.inf if seconds is None else float(seconds), fresh))
        if answer.outcome is Outcome.OK and answer.value is not None:
            try:
                return Timed(values.decode(answer.value), answer.wall_s, answer.cpu_s)
            except ValueError as error:
                answer = dataclasses.replace(answer, outcome=Outcome.INVALID_SUBMISSION, detail=f"{name}() sent no valid value: {error}")
        self._failed = _FailedCall(answer)
        raise self._failed

    def _ask(self, request: _CallRequest) -> Answer:
        """The answer of the process at the other end.

        If this fails midway, the stream is out of step: bytes of the program could be taken for a message and unpickled. So the process
        ends at once, before `evaluate` can catch the error. Memory is not limited meanwhile.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            self._connection.send(request)
            answer: Answer = self._connection.recv()
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        except BaseException:
            os._exit(_OUT_OF_STEP)
        return answer


def check(task: EvaluatedTask, program: Program) -> _Result:
    """The result of a problem's `evaluate`, whatever it does.

    Raises:
      GradingError: `evaluate` did something that no solution can cause, such as returning no Evaluation.
    """
    try:
        evaluation = task.evaluate(program)
        if not isinstance(evaluation, Evaluation):
            raise GradingError(f"evaluate() must return an Evaluation or raise Rejection; it returned {type(evaluation).__name__}.")
        score = evaluation.score
        if isinstance(score, bool) or not isinstance(score, int | float | np.integer | np.floating):
            return _rejected(f"the score is of type {type(score).__name__}, not a real number")
        score = float(score)
        if not math.isfinite(score):
            return _rejected(f"the score is {score}")
        if score < task.least_score:
            return _rejected(f"the score is {score}, below {task.least_score}: the problem's transform has no reward for it")
        numbers = {_text(name)[:_NAME]: float(number) for name, number in itertools.islice(evaluation.metrics.items(), _MOST_METRICS)}
        metrics = {" ".join(normalised(name, ()).split()): number for name, number in numbers.items() if math.isfinite(number)}
        return _Result(Evaluation(score, _text(evaluation.feedback)[:MOST_FEEDBACK], metrics))
    except _FailedCall as failed:
        return _Result(None, failed.outcome, str(failed)[:MOST_FEEDBACK])
    except Rejection as rejection:
        return _rejected(_text(rejection))
    except GradingError:
        raise
    except MemoryError:
        return _rejected(f"checking the solution needed more than {task.evaluate_gib:g} GiB of memory")
    except Exception as error:  # caused by an unexpected value, as far as anyone can tell
        return _rejected(f"checking the solution failed: {type(error).__name__}: {_text(error)}")


def _text(value: Any) -> str:
    """`str` of an object that may fail to become a string, such as an error about a huge integer."""
    try:
        return str(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


def _rejected(reason: str) -> _Result:
    return _Result(None, Outcome.INVALID_SUBMISSION, reason[:MOST_FEEDBACK])


def main(connection: Connection, parent: int, tasks_bytes: bytes) -> None:
    """Checks until the connection closes. Receives a task's index, or None, which it sends back.

    For a task, it sends any number of _CallRequest, each followed by an Answer, then a _Result or a GradingError.
    """
    children.begin(parent)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what `evaluate` prints and numpy's warnings may contain text of a program
    os.dup2(nowhere, 2)
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
        self._free = self._children.warm_slots(slots, "evaluation", main, tasks_bytes)
        self._have_accepted: set[int] = set()  # tasks

    def verdict(self, number: int, task: EvaluatedTask, program: str, slot: Slot, parent_output: bytes = b"") -> Verdict:
        """Runs a program's functions as `evaluate` asks for, and returns the verdict.

        Args:
          number, task: index and task.
          program: its source.
          slot: runs it.
          parent_output: see `Load`.

        Raises:
          GradingError: see `check`; only if `evaluate` has not accepted any solution before. Otherwise, it rejects this one.
          SandboxError: the host failed, or the executor was closed.
        """
        options = {"seconds": self._program_seconds, "hidden": task.hidden_inputs, "parent_output": parent_output}
        tries = 0
        while True:
            session = _Session(number, program, slot, **options)
            with borrowed(self._free) as evaluator:
                try:
                    result = self._result(evaluator, session, task.evaluate_seconds)
                    if result is not None:
                        if result.evaluation is not None:
                            self._have_accepted.add(number)
                        return session.verdict(result)
                except GradingError as error:
                    if number not in self._have_accepted:
                        raise
                    _log.warning("%s It has accepted other solutions, so this one is rejected.", error)
                    return session.verdict(_rejected(str(error)))
                finally:
                    session.end()
            tries += 1
            if tries == _TRIES:  # not the host's fault, since it ended each time
                return session.verdict(_rejected("the process that checks the solution ended"))

    def _result(self, evaluator: children.ChildSlot, session: "_Session", seconds: float) -> _Result | None:
        """The result of a check; None if the process ended.

        Raises:
          GradingError: see `check`.
          SandboxError: the sandbox's host failed, the process is not ready, or the executor was closed.
        """
        limit, message, in_step = seconds, session.number, False
        try:
            if evaluator.ask(None, self._start_seconds) is not None:
                raise SandboxError("A process that checks solutions was out of step.")
            while True:
                started = time.monotonic()
                try:
                    reply = evaluator.ask(message, max(0.0, seconds))
                except children.HungError:
                    return _rejected(f"checking the solution took longer than {limit:g} s")
                except children.EndedError:
                    if self._children.closed:
                        raise
                    return None
                except GradingError:
                    in_step = True
                    raise
                seconds -= time.monotonic() - started
                if isinstance(reply, _Result):
                    in_step = True
                    return reply
                message = session.answer(reply)
        finally:
            if not in_step:  # it may wait for an answer that will not come
                evaluator.drop()

    def close(self) -> None:
        """Ends the processes; callers get a SandboxError. Idempotent."""
        self._children.close()

    def release(self) -> None:
        """Releases resources after `close`, once no caller waits any more."""
        self._children.release()


class _Session:
    """The calls of one program. Loads it on the first call."""

    def __init__(self, number: int, program: str, slot: Slot, *, seconds: float, hidden: bool, parent_output: bytes) -> None:
        self.number = number
        self._program, self._parent_output, self._slot = program, parent_output, slot
        self._limit, self._left, self._hidden = seconds, seconds, hidden
        self._loaded, self._ended = False, False
        self._killed: Answer | None = None
        self._value: bytes | None = None
        self._stdout = ""

    def answer(self, request: _CallRequest) -> Answer:
        """The program's answer to a call.

        Raises:
          SandboxError: the host failed.
        """
        if request.fresh or not self._loaded:
            loaded = self._served(lambda seconds: Load(self.number, self._program, self._parent_output, seconds), self._left)
            if loaded.outcome is not Outcome.OK:
                return loaded
            self._loaded = True
        answer = self._served(lambda seconds: Call(request.name, request.arguments, seconds), request.seconds)
        if answer.outcome is Outcome.OK:
            self._value = answer.value
        return answer

    def _served(self, request: Callable[[float], Load | Call], seconds: float) -> Answer:
        if self._left <= 0:
            return Answer(Outcome.TIMEOUT, None, self._over_time(), 0.0, 0.0)
        try:
            answer: Answer = self._slot.ask(request(min(seconds, self._left)))
        except SandboxError:
            self._ended = True
            raise
        if answer.outcome is Outcome.TIMEOUT and seconds >= self._left:  # the time that was left differs from run to run
            answer = dataclasses.replace(answer, detail=self._over_time())
        if answer.outcome is Outcome.KILLED:
            self._killed = answer
        if self._hidden:
            answer = dataclasses.replace(answer, detail=answer.detail[-_HIDDEN_DETAIL:])
        self._left -= answer.wall_s
        return answer

    def _over_time(self) -> str:
        return f"its calls took longer than {self._limit:g} s in all"

    def end(self) -> None:
        """Ends the program. May be called repeatedly."""
        if not self._ended:
            self._ended = True
            said = self._slot.ask(End())
            self._stdout = "" if self._hidden else said

    def verdict(self, result: _Result) -> Verdict:
        """Ends the program, and returns the verdict on it.

        If a signal killed the program, the verdict says so, also if `evaluate` returned a result: the executor then decides whether to
        run the program again.
        """
        self.end()
        seconds = self._limit - self._left
        if self._killed is not None:
            result = _Result(None, Outcome.KILLED, self._killed.detail)
        reason = normalised(result.reason, ())
        if result.evaluation is None:
            execution = Execution(result.outcome, None, self._stdout, reason, seconds)
            if result.outcome is Outcome.INVALID_SUBMISSION:  # it ran, but its solution is not valid
                execution = Execution(Outcome.OK, self._value or b"", self._stdout, "", seconds)
            return Verdict(result.outcome, Grade(False, reason, None, None), execution)
        evaluation = result.evaluation
        grade = Grade(True, "", evaluation.score, evaluation.score, normalised(evaluation.feedback, ()), dict(evaluation.metrics))
        return Verdict(Outcome.OK, grade, Execution(Outcome.OK, self._value or b"", self._stdout, "", seconds))
