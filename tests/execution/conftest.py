"""The competition that the tests run programs for, and one pool that most of them share."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

# Worker processes import the competition by name, from the same path.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_competition import LIMITS, TinyTask, make

from discover_jax.execution import Executor, bubblewrap, memory, sandbox
from discover_jax.types import Verdict


@pytest.fixture(scope="session", autouse=True)
def light_sandboxes():
    """Sandboxes that preload no more than pandas, which saves a second each; `full_plan` preloads everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "PRELOAD", ())
        yield


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return make(tmp_path_factory.mktemp("competition"))


@pytest.fixture(scope="session")
def pool(task: TinyTask, tmp_path_factory: pytest.TempPathFactory):
    """Two slots of one core each."""
    # What the environment of a training host may hold; no program may see it.
    os.environ["DISCOVER_TEST_SECRET"] = "hunter2"
    with Executor([task], LIMITS, workers=2, cache_dir=tmp_path_factory.mktemp("cache")) as executor:
        yield executor
    del os.environ["DISCOVER_TEST_SECRET"]


@pytest.fixture(scope="session")
def ask(pool: Executor):
    """Runs one program in the pool and waits."""

    def run(program: str) -> Verdict:
        return pool.submit(program).result(timeout=120)

    return run


@pytest.fixture(scope="session")
def plan(task: TinyTask) -> sandbox.Plan:
    """How a single sandbox is made, for tests below the pool."""
    cores = tuple(sorted(os.sched_getaffinity(0)))[:1]
    return sandbox.Plan("bubblewrap", bubblewrap.inspect_host(), memory.find_cgroups(), task.public_dir, LIMITS, 7, cores, ())


@pytest.fixture(scope="session")
def full_plan(plan: sandbox.Plan) -> sandbox.Plan:
    """The same with all that is preloaded in a real run."""
    return dataclasses.replace(plan, preload=dataclasses.fields(sandbox.Plan)[-1].default)
