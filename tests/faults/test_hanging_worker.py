"""A worker that hangs: its program runs again, and nobody waits for it at the end."""

import multiprocessing
import os
import re
import signal
import threading
import time

import pytest
from phrase_config import get_config

from discover_jax.execution import Executor, ResourceLimits, sandbox_spec
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Outcome

PROGRAM = """
import time
import pandas as pd
time.sleep(0.5)
def run():
    return pd.read_csv("data/sample_submission.csv")
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())
    return prepare_task(get_config().task.competition, raw="", reward="grade", folder=tmp_path / "task")


def stop_worker(pool: Executor, others: set[int | None]):
    """Submits a program and, while it runs, stops the worker that waits for it. Returns the future and the worker."""
    future = pool.submit(PROGRAM)
    deadline = time.monotonic() + 60
    while not future.running():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (worker,) = (c for c in multiprocessing.active_children() if c.name.startswith("execution-") and c.pid not in others)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    return future, worker


def test_hanging_worker_is_killed_and_its_program_runs_again(task, tmp_path, caplog):
    others = {child.pid for child in multiprocessing.active_children()}
    limits = ResourceLimits(seconds=8, cores=1)  # enough on a busy machine: pandas is imported again
    with Executor([task], limits, workers=1, cache_dir=tmp_path / "cache", grace_seconds=2) as pool:
        future, worker = stop_worker(pool, others)
        verdict = future.result(120)
        assert verdict.outcome is Outcome.OK
        assert not worker.is_alive()
    assert re.search(rf"process {worker.pid} did not reply within 10 s.*try 2 of 3", caplog.text)


def test_close_does_not_wait_for_a_hanging_worker(task, tmp_path, monkeypatch):
    """The worker's grace period would be ten minutes."""
    monkeypatch.setattr("discover_jax.execution.children._LEAVING_SECONDS", 0.5)
    others = {child.pid for child in multiprocessing.active_children()}
    pool = Executor([task], ResourceLimits(seconds=60, cores=1), workers=1, cache_dir=tmp_path / "cache")
    future, worker = stop_worker(pool, others)
    closing = threading.Thread(target=pool.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    assert not worker.is_alive()
    assert future.exception(1) is not None
