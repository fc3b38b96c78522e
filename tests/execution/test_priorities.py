"""The order in which an executor starts programs; the sandbox is replaced by a function."""

import threading
import types

import pytest

from discover_jax.execution import executor as module
from discover_jax.execution.executor import Executor
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.types import Execution, Grade, Outcome, Verdict


class Started(Executor):
    """One slot. Programs run until `go` is set, and are listed as they start."""

    def __init__(self, folder):
        self.started, self.go = [], threading.Event()
        task = types.SimpleNamespace(fingerprint="boats", public_dirs=("public",), calls=False)
        super().__init__([task], ResourceLimits(seconds=1, cores=1, memory_bytes=MIB), cache_dir=folder)  # pyright: ignore

    def _execute(self, job):
        self.started.append(job.program)
        assert self.go.wait(60)
        return Verdict(Outcome.OK, Grade(True, "", 1.0, None), Execution(Outcome.OK, b"", "", "", 0.1))


@pytest.fixture
def executor(monkeypatch, tmp_path):
    idle = types.SimpleNamespace(slots=1, close=lambda: None, release=lambda: None)
    for name in ("LocalBackend", "Graders", "Evaluators"):
        monkeypatch.setattr(module, name, lambda *_, **__: idle)
    with Started(tmp_path / "cache") as executor:
        yield executor


def results(futures):
    return [(future.result(60).outcome, future.result().execution.cached) for future in futures]


def test_programs_start_by_priority_then_in_the_order_of_submission(executor):
    submitted = [("first", 5), ("a", 1), ("b", 0), ("c", 1), ("d", 0), ("e", 2)]
    futures = [executor.submit("first", priority=5)]
    while not executor.started:
        pass
    futures += [executor.submit(program, priority=priority) for program, priority in submitted[1:]]
    executor.go.set()
    assert results(futures) == [(Outcome.OK, False)] * 6
    assert executor.started == ["first", "b", "d", "a", "c", "e"]


def test_a_program_that_is_submitted_again_gets_its_lowest_priority_and_runs_once(executor):
    futures = [executor.submit("first")]
    while not executor.started:
        pass
    futures += [
        executor.submit(program, priority=priority) for program, priority in (("a", 2), ("b", 1), ("a", 0), ("a", 3), ("first", -1))
    ]
    executor.go.set()
    assert [outcome for outcome, _ in results(futures)] == [Outcome.OK] * 6
    assert executor.started == ["first", "a", "b"]
    assert [cached for _, cached in results(futures)] == [False, False, False, True, True, True]
    assert results([executor.submit("a", priority=9)]) == [(Outcome.OK, True)]


def test_programs_that_wait_twice_are_cancelled_when_the_executor_closes(executor):
    futures = [executor.submit("first")]
    while not executor.started:
        pass
    futures += [executor.submit("a", priority=priority) for priority in (2, 1)]
    executor.go.set()
    executor.close()
    assert all(future.done() for future in futures)
    assert executor.started in (["first"], ["first", "a"])
