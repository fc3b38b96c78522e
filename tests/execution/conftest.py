"""The test competition, and one executor that most tests share."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

# Worker processes import the competition by name, from the same path.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_competition import GOOD, GOOD_SCORE, LIMITS, TinyTask, make

from discover_jax.execution import Executor, bubblewrap, leases, memory, sandbox, sandbox_spec
from discover_jax.types import Execution, Outcome, Verdict


@pytest.fixture(scope="session", autouse=True)
def light_sandboxes():
    """Sandboxes that preload only numpy, which saves a second each; `full_spec` preloads everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_spec, "PRELOAD", ())
        yield


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return make(tmp_path_factory.mktemp("competition"))


@pytest.fixture(scope="session")
def pool(task: TinyTask, tmp_path_factory: pytest.TempPathFactory):
    """Two slots of one core each."""
    # Variables as on a training host; no program may see them.
    os.environ["DISCOVER_TEST_SECRET"] = "hunter2"
    with Executor([task], LIMITS, workers=2, cache_dir=tmp_path_factory.mktemp("cache")) as executor:
        yield executor
    del os.environ["DISCOVER_TEST_SECRET"]


def worker_pids() -> set[int]:
    """The worker processes of all executors of this process."""
    return {child.pid for child in multiprocessing.active_children() if child.name.startswith("execution-") and child.pid}


@pytest.fixture(scope="session")
def beside(pool: Executor):
    """A context in which a good program also runs in the pool. On exit, it must have its score and all workers must be alive."""
    numbers = itertools.count()

    @contextlib.contextmanager
    def neighbour():
        workers = worker_pids()
        future = pool.submit(f"{GOOD}# neighbour {next(numbers)}\n")
        yield
        verdict = future.result(timeout=120)
        assert (verdict.outcome, verdict.grade.score, verdict.execution.cached) == (Outcome.OK, GOOD_SCORE, False), verdict.execution
        assert workers <= worker_pids()

    return neighbour


@pytest.fixture(scope="session")
def ask(pool: Executor, beside):
    """Runs one program in the pool, next to a neighbour, and returns its verdict."""

    def run(program: str) -> Verdict:
        with beside():
            return pool.submit(program).result(timeout=120)

    return run


@pytest.fixture(scope="session")
def run_with(beside):
    """Runs one program in a sandbox with its own limits, next to a neighbour in the pool."""

    def run(spec: sandbox_spec.SandboxSpec, program: str, **limits) -> Execution:
        with beside():
            box = sandbox.start(dataclasses.replace(spec, limits=dataclasses.replace(spec.limits, **limits)))
            try:
                box.wait_ready()
                return box.run(program)
            finally:
                box.close()

    return run


@pytest.fixture(scope="session")
def spec(task: TinyTask) -> sandbox_spec.SandboxSpec:
    """The spec of a single sandbox, for tests below the executor."""
    cores = tuple(sorted(os.sched_getaffinity(0)))[:1]
    host, uid = (
        bubblewrap.inspect_host(),
        leases.UIDS[-1] if os.geteuid() == 0 else None,
    )  # the last one; no executor of these tests uses it
    return sandbox_spec.SandboxSpec("bubblewrap", host, memory.find_cgroups(), task.public_dir, LIMITS, 7, cores, uid, ())


@pytest.fixture(scope="session")
def full_spec(spec: sandbox_spec.SandboxSpec) -> sandbox_spec.SandboxSpec:
    """The same with everything that a real run preloads."""
    return dataclasses.replace(
        spec, preload=next(field.default for field in dataclasses.fields(sandbox_spec.SandboxSpec) if field.name == "preload")
    )
