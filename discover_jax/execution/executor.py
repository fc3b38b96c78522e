"""The executor: takes programs and returns futures of verdicts. It has one thread per slot; equal programs share one execution."""

import dataclasses
import importlib.metadata
import itertools
import logging
import math
import pickle
import queue
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self, cast

from discover_jax.exceptions import ConfigError, RunError, SandboxError
from discover_jax.execution import sandbox_spec
from discover_jax.execution.backend import Backend, End, Execute, Load, NoSlots, RunTask, ShownTask
from discover_jax.execution.cache import VerdictCache, packages
from discover_jax.execution.evaluating import EvaluatedTask, Evaluators
from discover_jax.execution.grading import Graders
from discover_jax.execution.imports import module_of, program_importing
from discover_jax.execution.limits import ResourceLimits
from discover_jax.execution.local import LocalBackend
from discover_jax.types import Answer, Execution, Grade, Outcome, Verdict

_TRIES = 3  # after a failure of the host, a program runs up to two more times, each time in a fresh sandbox
BACKENDS = {"bubblewrap": "bubblewrap", "ray": "bubblewrap", "unsafe-subprocess": "unsafe-subprocess"}
"""Backends and their isolation (one of sandbox_spec.BACKENDS)."""
GRACE_SECONDS = 600.0
"""Time for warming up and grading, in addition to the program's own; after that, a worker counts as hung."""
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Job:
    key: str
    task: int
    program: str
    parent_output: bytes
    futures: list[Future[Verdict]]
    priority: int = 0
    running: bool = False


class Executor:
    """Runs programs in sandboxes and grades their submissions. A context manager; `close` ends all processes."""

    def __init__(
        self,
        tasks: Sequence[RunTask],
        limits: ResourceLimits,
        *,
        workers: int | None = None,
        cache_dir: Path | str,
        backend: str = "bubblewrap",
        allow_weaker: bool = False,
        ray_address: str = "auto",
        leads: bool = True,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        """Checks the isolation, then starts the workers without waiting for them.

        Args:
          tasks: at least one; each a GradedTask, or an EvaluatedTask if `calls`.
          limits: of each program.
          workers: number of programs at once; None or 0: as many as the cores of the machine or the cluster allow.
          cache_dir: folder of verdicts, which later executors and runs may share.
          backend: one of BACKENDS: "bubblewrap" on this machine, "ray" for bubblewrap on the nodes of a cluster, or "unsafe-subprocess" for
            trusted programs.
          allow_weaker: accept a backend that isolates less than bubblewrap.
          ray_address: of the cluster, see `cluster.RayBackend`.
          leads: whether this is the run's first process, which sends all programs to a cluster. In the others, an executor for "ray" has no
            slots.
          grace_seconds: a worker that exceeds a program's time limit by more than this counts as hung: it is replaced, and its program is
            tried again.

        Raises:
          ConfigError: a setting is not allowed, or a package is missing.
          SandboxError: bubblewrap cannot start or does not isolate, or there are not enough uids; the message says what to do.
          RunError: the cache cannot be used, or there is no cluster.
        """
        _check_settings(backend, allow_weaker, workers)
        if not tasks:
            raise ConfigError("tasks must have at least one element; got none.")
        cache_dir = Path(cache_dir).resolve()
        # The isolation, not the backend: a verdict does not depend on the machine that ran the program.
        settings = {"limits": dataclasses.asdict(limits), "backend": BACKENDS[backend], "packages": packages()}
        self._caches = [VerdictCache(cache_dir, {"task": task.fingerprint, **settings}) for task in tasks]
        self._runs = [len(task.public_dirs) for task in tasks]
        tasks_bytes = pickle.dumps(list(tasks))
        shown = [ShownTask(list(task.public_dirs), task.calls) for task in tasks]
        self._tasks = list(tasks)
        self._seconds = limits.seconds
        self._backend: Backend
        if backend == "ray":
            from discover_jax.execution.cluster import RayBackend  # ray is an extra

            ray_settings = {"workers": workers, "address": ray_address, "preload": sandbox_spec.PRELOAD, "grace_seconds": grace_seconds}
            self._backend = RayBackend(shown, limits, **ray_settings) if leads else NoSlots()
        else:
            self._backend = LocalBackend(
                shown,
                limits,
                workers=workers,
                isolation=BACKENDS[backend],
                hidden=[cache_dir],
                preload=sandbox_spec.PRELOAD,
                grace_seconds=grace_seconds,
            )
        competitions = sum(not task.calls for task in tasks)
        self._graders = Graders(tasks_bytes, slots=self._backend.slots if competitions else 0, seconds=grace_seconds)
        self._evaluators = Evaluators(
            tasks_bytes,
            slots=self._backend.slots if competitions < len(tasks) else 0,
            program_seconds=limits.seconds,
            start_seconds=grace_seconds,
        )
        self._lock = threading.Lock()
        self._closed = False
        self._retries = 0
        self._jobs: queue.PriorityQueue[tuple[float, int, _Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._in_flight: dict[str, _Job] = {}
        self._threads = [
            threading.Thread(target=self._serve, name=f"execution-{number}", daemon=True) for number in range(self._backend.slots)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, program: str, task: int = 0, parent_output: bytes = b"", priority: int = 0) -> Future[Verdict]:
        """Queues a program; returns at once. Programs start in the order of their priorities, lowest first, then of submission.

        The cache answers for a program that ran before with the same data and settings. A program that is already queued or running does
        not run twice. Both set `execution.cached`.

        Args:
          program: Python source that defines `run()`, or the functions that a problem calls.
          task: index of its task.
          parent_output: the value that its parent returned (see `execution.values`), which it can read from a file; empty for none. Only
            for programs whose functions are called.
          priority: see above. A program that is submitted several times gets the lowest of its priorities.

        Returns:
          A future of the verdict. It raises SandboxError if the host failed three times, GradingError if the task's grading failed, and
          RunError if the verdict could not be stored.

        Raises:
          SandboxError: the executor is closed.
        """
        future: Future[Verdict] = Future()
        key = self._caches[task].key(program, parent_output)
        with self._lock:
            if self._closed:
                raise SandboxError("The executor is closed. Submit programs before close().")
            if (job := self._in_flight.get(key)) is not None:
                if job.running:
                    future.set_running_or_notify_cancel()
                job.futures.append(future)
                if priority < job.priority and not job.running:  # its earlier entry in the queue finds it running or finished
                    self._queue(job, priority)
                return future
            if (verdict := self._caches[task].get(key)) is None:
                self._in_flight[key] = job = _Job(key, task, program, parent_output, [future])
                self._queue(job, priority)
                return future
        future.set_result(verdict)
        return future

    def _queue(self, job: _Job, priority: int) -> None:
        """Queues a job. The caller holds the lock."""
        job.priority = priority
        self._jobs.put((priority, next(self._numbers), job))

    def unusable_packages(self, names: Sequence[str]) -> dict[str, str]:
        """Those of the packages that are installed but that a program cannot import, with the error.

        Runs a program for each package that sandboxes do not import anyway, on any slot, thus on one node of a cluster. An executor without
        slots finds nothing.

        Args:
          names: for pip. Those that are not installed are left out.

        Raises:
          SandboxError: the host failed.
        """
        imported = {"numpy", "pandas", "scipy", *(module.partition(".")[0] for module in sandbox_spec.PRELOAD)}
        modules = {}
        for name in names if self._backend.slots else ():
            try:
                modules[name] = module_of(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        asked = {name: module for name, module in modules.items() if module not in imported}
        if not asked:
            return {}
        with ThreadPoolExecutor(len(asked)) as threads:
            errors = dict(zip(asked, threads.map(self._import_error, asked.values()), strict=True))
        return {name: error for name, error in errors.items() if error}

    def _import_error(self, module: str) -> str:
        """Why a program cannot import the module; empty if it can."""
        program = program_importing(module)
        with self._backend.slot() as slot:
            if self._tasks[0].calls:
                reply: Answer | Execution = slot.ask(Load(0, program, b"", self._seconds))
                slot.ask(End())
            else:
                reply = slot.ask(Execute(0, 0, program))
        if reply.outcome is Outcome.OK:
            return ""
        return (reply.detail.strip().splitlines() or [reply.outcome.value])[-1]

    @property
    def isolated(self) -> bool:
        """Whether programs run in sandboxes; False for the unsafe backend."""
        return self._backend.isolated

    def describe(self) -> str:
        """One line for summaries: isolation, limits, and anything weaker than the best setup."""
        return self._backend.describe()

    @property
    def slots(self) -> int:
        """Number of programs that run at once."""
        return self._backend.slots

    @property
    def retries(self) -> int:
        """Number of repeated runs so far because the host failed or may have failed."""
        with self._lock:
            return self._retries

    def close(self) -> None:
        """Ends workers and sandboxes. Queued programs are cancelled; running ones raise SandboxError. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = [job for job in self._in_flight.values() if not job.running]
            for job in waiting:
                del self._in_flight[job.key]
        for job in waiting:
            for future in job.futures:
                future.cancel()
        for _ in self._threads:
            self._jobs.put((-math.inf, next(self._numbers), None))
        self._backend.close()
        self._graders.close()
        self._evaluators.close()
        for thread in self._threads:
            thread.join()
        self._backend.release()
        self._graders.release()
        self._evaluators.release()

    def _begin(self, job: _Job) -> bool:
        """Marks a job as running; False if no caller waits for it any more, or if it was queued twice and is running or finished."""
        with self._lock:
            if self._in_flight.get(job.key) is not job or job.running:
                return False
            job.futures = [future for future in job.futures if future.set_running_or_notify_cancel()]
            job.running = bool(job.futures)
            if not job.running:
                del self._in_flight[job.key]
            return job.running

    def _finish(self, job: _Job, reply: Verdict | Exception) -> None:
        if isinstance(reply, Verdict):
            if reply.outcome is not Outcome.OK:  # nothing reads an invalid submission, and a step may have hundreds
                reply = dataclasses.replace(reply, execution=dataclasses.replace(reply.execution, result=None))
            try:
                self._caches[job.task].put(job.key, reply)
            except RunError as error:
                reply = error
        with self._lock:
            del self._in_flight[job.key]
        for index, future in enumerate(job.futures):
            if isinstance(reply, Exception):
                future.set_exception(reply)
            elif index == 0:
                future.set_result(reply)
            else:
                future.set_result(dataclasses.replace(reply, execution=dataclasses.replace(reply.execution, cached=True)))

    def _serve(self) -> None:
        """Runs queued programs one at a time; there is one such thread per slot."""
        while (job := self._jobs.get()[2]) is not None:
            if self._begin(job):
                try:
                    reply = self._execute(job)
                except Exception as error:  # callers that wait for the program must get it, even if it is a bug in this class
                    reply = error
                self._finish(job, reply)

    def _execute(self, job: _Job) -> Verdict:
        """A program's verdict. Failures of the host are logged, except the last one, which is raised.

        Raises:
          SandboxError: all `_TRIES` failed.
          GradingError, RunError: see `submit`.
        """
        last: Verdict | SandboxError = SandboxError("The program was not tried.")
        for number in range(1, _TRIES + 1):
            try:
                last = self._try(job.task, job.program, job.parent_output)
                if not _killed_perhaps_from_outside(last):
                    return last
                what = f"A program's sandbox was ended by {signal.SIGKILL.name}, sent by the program itself or from outside."
            except SandboxError as error:
                last, what = error, str(error)
            if self._closed:
                raise SandboxError("The executor was closed while the program ran.")
            if number < _TRIES:
                with self._lock:
                    self._retries += 1
                _log.warning("%s The program runs again (try %d of %d).", what, number + 1, _TRIES)
        if isinstance(last, Verdict):
            return last
        raise SandboxError(f"Cannot run a program: {_TRIES} tries failed, each in a fresh sandbox. The last error: {last}") from last

    def _try(self, task: int, program: str, parent_output: bytes) -> Verdict:
        """The verdict on all of a program's runs or on the first that failed, with the seconds of all and the output of the first.

        Raises:
          SandboxError: the host failed.
        """
        grades: list[Grade] = []
        seconds, stdout = 0.0, None
        with self._backend.slot() as slot:
            if self._tasks[task].calls:
                return self._evaluators.verdict(task, cast(EvaluatedTask, self._tasks[task]), program, slot, parent_output)
            while True:
                execution: Execution = slot.ask(Execute(task, len(grades), program))
                seconds += execution.seconds
                verdict = self._graders.verdict(task, execution, grades)
                stdout = execution.stdout if stdout is None else stdout
                grades.append(verdict.grade)
                if verdict.outcome is not Outcome.OK:
                    return dataclasses.replace(verdict, execution=dataclasses.replace(execution, seconds=seconds))
                if len(grades) == self._runs[task]:
                    return dataclasses.replace(verdict, execution=dataclasses.replace(execution, seconds=seconds, stdout=stdout))


def _check_settings(backend: str, allow_weaker: bool, workers: int | None) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    if BACKENDS[backend] != "bubblewrap" and not allow_weaker:
        raise ConfigError(
            f"backend = {backend!r} runs programs without isolation: they can read the answers, write files and use the network. Pass"
            " allow_weaker=True (execution.allow_weaker) if you accept that, or use 'bubblewrap'."
        )
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be positive, or 0 or None for as many as the cores allow; got {workers}.")


def _killed_perhaps_from_outside(verdict: Verdict) -> bool:
    """Whether a program died by SIGKILL.

    A program that sends it to itself does so in every try. Otherwise an administrator sent it, or the kernel for lack of memory. This must
    not become the program's verdict.
    """
    return verdict.outcome is Outcome.KILLED and verdict.execution.detail.endswith(signal.SIGKILL.name)
