"""The pool: takes programs, gives futures of verdicts. One thread and one worker process a slot; equal programs share one execution."""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import types
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol, Self

from discover_jax.exceptions import ConfigError, RunError, SandboxError
from discover_jax.execution import bubblewrap, canary, memory, sandbox, summary, worker
from discover_jax.execution.admission import Admission
from discover_jax.execution.cache import VerdictCache, packages
from discover_jax.execution.leases import lease_cores, lease_uids
from discover_jax.execution.limits import Limits
from discover_jax.types import Grade, Outcome, Verdict

_TRIES = 3  # a fault of the host is tried again twice, each time in a fresh sandbox
GRACE_SECONDS = 600.0
"""On top of a program's own time, for warming up and grading; then a worker counts as hung."""
_LEAVING_SECONDS = 5.0
"""For a worker that was asked to end, in which it ends its sandboxes."""
_start_lock = threading.Lock()
_log = logging.getLogger(__name__)


class GradedTask(Protocol):
    """What the executor needs of a task; it must be picklable.

    A program runs once for each of `public_dirs`, in their order, as long as its submissions are valid; `grade` judges the submission of
    one run, `combine` makes one grade of all. `fingerprint` covers the data and all settings that decide a grade.
    """

    @property
    def public_dirs(self) -> Sequence[Path]: ...
    @property
    def fingerprint(self) -> str: ...
    def grade(self, csv: bytes, run: int) -> Grade: ...
    def combine(self, grades: Sequence[Grade]) -> Grade: ...


@dataclasses.dataclass
class _Job:
    key: str
    task: int
    program: str
    futures: list[Future[Verdict]]
    running: bool = False


@contextlib.contextmanager
def _without_main_module():
    """Hides the main script while a process is spawned, which would import it again, and jax with it."""
    with _start_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class _Worker:
    """The main process's end of one worker process."""

    def __init__(self, plan: sandbox.Plan, tasks_bytes: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=worker.main, args=(theirs, plan, tasks_bytes, os.getpid()), name=f"execution-{plan.slot}", daemon=True
        )
        with _without_main_module():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def ask(self, task: int, program: str, seconds: float) -> Verdict | Exception:
        """The worker's reply to a program for the task of that index.

        A SandboxError if the worker ended, or did not reply within `seconds`, for which it is ended.
        A timer does that rather than a limit on waiting: a process that was stopped may hang amid taking the program or sending its reply.
        """
        hung = threading.Event()

        def end() -> None:
            hung.set()
            self._process.kill()  # its sandboxes die with it

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            self._connection.send((task, program))
            if self._connection in wait([self._connection, self._process.sentinel]):
                return self._connection.recv()
        except (EOFError, OSError):  # the connection broke: the worker ended
            pass
        finally:
            timer.cancel()
        self._process.join(5)
        if hung.is_set():
            return SandboxError(f"The worker process {self.pid} did not reply within {seconds:g} s and was ended.")
        return SandboxError(f"The worker process {self.pid} ended unexpectedly (exit code {self._process.exitcode}).")

    def interrupt(self) -> None:
        """Asks the process to end, and returns at once; whoever waits for its reply is told that it ended. Any thread may call it."""
        self._process.terminate()

    def end(self) -> None:
        """Ends the process, and so its sandboxes. Any thread may call it."""
        self.interrupt()
        if not wait([self._process.sentinel], _LEAVING_SECONDS):  # it hangs, or was stopped
            self._process.kill()

    def stop(self) -> None:
        """Ends the process and lets go of it."""
        self._connection.close()
        self.end()
        self._process.join()


class Executor:
    """Runs programs in sandboxes and grades their submissions. A context manager; `close` ends everything."""

    def __init__(
        self,
        tasks: Sequence[GradedTask],
        limits: Limits,
        *,
        workers: int | None = None,
        cache_dir: Path | str,
        backend: str = "bubblewrap",
        allow_weaker: bool = False,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        """Checks that isolation holds here, then starts the workers without waiting for them.

        Args:
          tasks: at least one; each gives the data that programs see (public_dirs) and grades what they return.
          limits: of each program.
          workers: programs at once; None or 0: as many as the machine's cores allow.
          cache_dir: folder of verdicts, which later executors and runs may share.
          backend: "bubblewrap", or "unsafe-subprocess" for programs that are trusted.
          allow_weaker: accept a backend that isolates less than bubblewrap.
          grace_seconds: a worker that takes so much longer than a program's own time limit is hung: it is ended and replaced, and its
            program is tried again.

        Raises:
          ConfigError: a setting is not allowed.
          SandboxError: bubblewrap cannot start or does not isolate, or not every slot can have a uid of its own; with the remedy.
          RunError: the cache cannot be kept.
        """
        if backend not in sandbox.BACKENDS:
            raise ConfigError(f"backend = {backend!r} is not known; allowed: {', '.join(sandbox.BACKENDS)}.")
        if backend != "bubblewrap" and not allow_weaker:
            raise ConfigError(
                f"backend = {backend!r} runs programs without isolation: they can read the answers, write files and use the network. Pass"
                " allow_weaker=True (execution.allow_weaker) if you accept that, or use 'bubblewrap'."
            )
        if workers is not None and workers < 0:
            raise ConfigError(f"workers = {workers}: must be positive, or 0 or None for as many as the cores allow.")
        if not tasks:
            raise ConfigError("An executor was given no task, so there is nothing that programs could be run for.")
        publics, cache_dir = [Path(task.public_dirs[0]).resolve() for task in tasks], Path(cache_dir).resolve()
        host = bubblewrap.inspect_host() if backend == "bubblewrap" else None
        cgroups = memory.find_cgroups()
        if cgroups is not None:
            memory.remove_stale(cgroups)
        settings = {"limits": dataclasses.asdict(limits), "backend": backend, "packages": packages()}
        self._caches = [VerdictCache(cache_dir, {"task": task.fingerprint, **settings}) for task in tasks]
        self._tasks_bytes = pickle.dumps(list(tasks))
        self._cpus = len(os.sched_getaffinity(0))
        cores_of_slots = lease_cores(sorted(os.sched_getaffinity(0)), limits.cores, workers)
        with contextlib.ExitStack() as held:
            uids: Sequence[int | None] = [None] * len(cores_of_slots)
            if host is not None and host.root:
                uids = held.enter_context(lease_uids(len(cores_of_slots)))
            self._plans = [
                sandbox.Plan(backend, host, cgroups, publics[0], limits, slot, cores, uid, sandbox.PRELOAD)
                for slot, (cores, uid) in enumerate(zip(cores_of_slots, uids, strict=True))
            ]
            if host is not None:
                hidden = {path for public in publics for path in canary.hidden_paths(host, public, cache_dir)}
                for public in publics:
                    canary.check(dataclasses.replace(self._plans[0], public=public), sorted(hidden))
            self._uid_leases = held.pop_all()
        # A control group bounds each program; where there is none they wait for memory.
        self._admission = Admission(limits.memory_bytes) if cgroups is None else None
        self._limits = limits
        self._runs = [len(task.public_dirs) for task in tasks]
        self._grace_seconds = grace_seconds
        self._lock = threading.Lock()
        self._closed = False
        self._retries = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._in_flight: dict[str, _Job] = {}
        self._workers: list[_Worker | None] = [None] * len(self._plans)
        # Threads that last as long as their workers: the kernel ends a worker when the thread that started it ends.
        self._threads = [
            threading.Thread(target=self._serve, args=(plan,), name=f"execution-{plan.slot}", daemon=True) for plan in self._plans
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, program: str, task: int = 0) -> Future[Verdict]:
        """Queues a program; returns at once.

        A program that was run before with the same data and settings is answered from the cache, and one that waits or runs now is not run
        twice; both are marked by `execution.cached`.

        Args:
          program: Python source that defines `run()`.
          task: index of the task that it is for.

        Returns:
          A future of the verdict. It raises SandboxError if the host failed three times, GradingError if the task's grading failed,
          RunError if the verdict could not be kept.

        Raises:
          SandboxError: the executor is closed.
        """
        future: Future[Verdict] = Future()
        key = self._caches[task].key(program)
        with self._lock:
            if self._closed:
                raise SandboxError("The executor is closed; programs can be submitted only before close().")
            if (job := self._in_flight.get(key)) is not None:
                if job.running:
                    future.set_running_or_notify_cancel()
                job.futures.append(future)
                return future
            if (verdict := self._caches[task].get(key)) is None:
                self._in_flight[key] = job = _Job(key, task, program, [future])
                self._jobs.put(job)
                return future
        future.set_result(verdict)
        return future

    @property
    def isolated(self) -> bool:
        """Whether programs run in sandboxes; False for the unsafe backend."""
        return self._plans[0].host is not None

    def describe(self) -> str:
        """One line for summaries: how programs are isolated and bounded, and what is weaker than it could be."""
        return summary.describe(self._plans, self._limits, max(self._runs), self._cpus)

    @property
    def slots(self) -> int:
        """How many programs run at once."""
        return len(self._plans)

    @property
    def retries(self) -> int:
        """How often a program was run again so far because of what was, or may have been, the host's fault."""
        with self._lock:
            return self._retries

    def close(self) -> None:
        """Ends workers and sandboxes. Programs that wait are cancelled; those that run end in SandboxError. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = [job for job in self._in_flight.values() if not job.running]
            for job in waiting:
                del self._in_flight[job.key]
            workers = [w for w in self._workers if w is not None]
        for job in waiting:
            for future in job.futures:
                future.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for process in workers:
            process.interrupt()
        for process in workers:
            process.end()
        for thread in self._threads:
            thread.join()
        cgroups = self._plans[0].cgroups
        if cgroups is not None:
            memory.remove_stale(cgroups)
        self._uid_leases.close()

    def _begin(self, job: _Job) -> bool:
        """Marks a job as running; False if nobody waits for it any more."""
        with self._lock:
            if self._in_flight.get(job.key) is not job:
                return False
            job.futures = [future for future in job.futures if future.set_running_or_notify_cancel()]
            job.running = bool(job.futures)
            if not job.running:
                del self._in_flight[job.key]
            return job.running

    def _finish(self, job: _Job, reply: Verdict | Exception) -> None:
        if isinstance(reply, Verdict):
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

    def _serve(self, plan: sandbox.Plan) -> None:
        """One slot's thread: starts its worker, hands it programs, replaces it when it ends."""
        try:
            with contextlib.suppress(OSError):  # no process to be had now: the first program tries again and tells why
                self._worker(plan)
            while (job := self._jobs.get()) is not None:
                if self._begin(job):
                    try:
                        reply = self._execute(plan, job.task, job.program)
                    except Exception as error:  # a fault of this class itself: whoever waits for the program must hear of it
                        reply = error
                    self._finish(job, reply)
        finally:
            self._drop(plan)

    def _worker(self, plan: sandbox.Plan) -> _Worker | None:
        """The slot's worker, started if there is none; None once the executor is closed."""
        current = self._workers[plan.slot]
        if current is None:
            current = _Worker(plan, self._tasks_bytes)
            with self._lock:
                self._workers[plan.slot] = current
                if self._closed:
                    return None
        return current

    def _drop(self, plan: sandbox.Plan) -> None:
        with self._lock:
            current, self._workers[plan.slot] = self._workers[plan.slot], None
        if current is not None:
            current.stop()

    def _execute(self, plan: sandbox.Plan, task: int, program: str) -> Verdict | Exception:
        """A program's verdict, or the error of the last of `_TRIES`; each but the last fault is told by the log."""
        reply: Verdict | Exception = SandboxError("no try was made")
        for number in range(1, _TRIES + 1):
            try:
                current = None if self._closed else self._worker(plan)
                if current is None:
                    return SandboxError("The executor was closed while the program ran.")
                with self._admission.program(lambda: self._closed) if self._admission else contextlib.nullcontext():
                    reply = current.ask(task, program, self._runs[task] * (self._limits.seconds + self._grace_seconds))
            except OSError as error:
                reply = SandboxError(f"A worker process could not be started: {error}.")
            if isinstance(reply, SandboxError):
                fault = str(reply)
                self._drop(plan)
            elif isinstance(reply, Verdict) and _killed_perhaps_from_outside(reply):
                fault = f"A program's sandbox was ended by {signal.SIGKILL.name}, by the program itself or from outside."
            else:
                return reply
            if number < _TRIES and not self._closed:
                with self._lock:
                    self._retries += 1
                _log.warning("%s The program runs again (try %d of %d).", fault, number + 1, _TRIES)
        if isinstance(reply, Verdict):
            return reply
        if self._closed:
            return SandboxError("The executor was closed while the program ran.")
        return SandboxError(f"A program could not be run: {_TRIES} tries failed, each in a fresh sandbox. The last: {reply}")


def _killed_perhaps_from_outside(verdict: Verdict) -> bool:
    """Whether a program died by SIGKILL, which it can send to itself, and then does so in every try.

    Else the host did it, an administrator or the kernel short of memory, which must not become the program's verdict.
    """
    return verdict.outcome is Outcome.KILLED and verdict.execution.detail.endswith(signal.SIGKILL.name)
