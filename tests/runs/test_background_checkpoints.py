"""Checkpoints that are written in the background: when they count, how their errors and Ctrl-C surface, and what is logged."""

import errno
import logging
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging

from discover_jax.exceptions import RunError
from discover_jax.learning.train_state import TrainState, adam, init_train_state
from discover_jax.runs import background
from discover_jax.runs.checkpoints import Checkpoints, _wait_for_others
from discover_jax.runs.quiet_logs import quiet_orbax


def state_of(value: float) -> TrainState:
    return init_train_state({"A": jnp.full((20, 3), value), "B": jnp.full(7, value, jnp.bfloat16)}, adam())


class Slow:
    """Checkpoints whose writes in the background wait until `go`, and fail with `error` if there is one."""

    def __init__(self, folder: Path, keep: int = 1):
        self.checkpoints = Checkpoints(folder, keep=keep, every=0)
        self.checkpoints.save(0, state_of(0), {"step": 0})
        self.started, self.go, self.error = threading.Event(), threading.Event(), None
        self._save, self.checkpoints._manager.save = self.checkpoints._manager.save, self._wait

    def _wait(self, *args, **options):
        self.started.set()
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return self._save(*args, **options)


@pytest.fixture
def slow(tmp_path):
    found = Slow(tmp_path / "c")
    yield found
    found.go.set()


def test_counts_only_when_it_is_complete(slow, tmp_path):
    checkpoints, state = slow.checkpoints, state_of(1)
    checkpoints.begin(1, state, {"step": 1})
    assert slow.started.wait(60)
    checkpoints.check()
    assert checkpoints.writing == 1
    assert background.is_running()
    assert checkpoints.latest() == Checkpoints(tmp_path / "c", keep=1, every=0, read_only=True).latest() == 0
    slow.go.set()
    seconds = checkpoints.finish()
    assert seconds is not None
    assert seconds > 0
    assert checkpoints.writing is checkpoints.finish() is None
    assert not background.is_running()
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["1"]  # the one before was deleted only now
    for leaf in jax.tree.leaves(state):  # what the next update does
        leaf.delete()
    restored, host = Checkpoints(tmp_path / "c", keep=1, every=0).restore(1, state_of(9))
    assert host == {"step": 1}
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(state_of(1)), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_a_second_one_waits_for_the_first(slow):
    checkpoints = slow.checkpoints
    checkpoints.begin(1, None, {"step": 1})
    threading.Timer(0.1, slow.go.set).start()
    checkpoints.begin(2, None, {"step": 2})
    assert checkpoints.writing == 2
    assert checkpoints.latest() in (1, 2)
    with pytest.raises(RunError, match=r"\b2\b"):
        checkpoints.begin(2, None, {"step": 2})
    checkpoints.close()
    assert checkpoints.latest() == 2


@pytest.mark.parametrize("way", ["check", "finish"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("UNAVAILABLE: disk"), RuntimeError("gone")])
def test_failure_surfaces_once_and_changes_nothing(slow, tmp_path, error, way):
    checkpoints, slow.error = slow.checkpoints, error
    checkpoints.begin(1, state_of(1), {"step": 1})
    slow.go.set()
    assert checkpoints._writing.work._ended.wait(60)
    with pytest.raises(RunError, match=rf"(?s)Cannot write checkpoint 1 to .*{error.args[-1]}.*resumes at checkpoint 0\."):
        getattr(checkpoints, way)()
    checkpoints.check()
    assert checkpoints.writing is checkpoints.finish() is None
    assert Checkpoints(tmp_path / "c", keep=1, every=0).restore(0, None)[1] == {"step": 0}


@pytest.mark.parametrize("way", ["check", "finish"])
@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS"), MemoryError()])
def test_failure_of_device_or_memory_is_not_taken_for_one_of_the_disk(slow, error, way):
    """The command line knows these errors: they have exit codes and advice of their own."""
    slow.error = error
    slow.checkpoints.begin(1, state_of(1), {"step": 1})
    slow.go.set()
    assert slow.checkpoints._writing.work._ended.wait(60)
    with pytest.raises(type(error)) as raised:
        getattr(slow.checkpoints, way)()
    assert raised.value is error
    assert slow.checkpoints.writing is None


def test_failure_surfaces_when_the_next_one_begins(slow):
    slow.error = OSError(errno.EDQUOT, "Disk quota exceeded")
    slow.checkpoints.begin(1, None, {"step": 1})
    slow.go.set()
    with pytest.raises(RunError, match="Cannot write checkpoint 1"):
        slow.checkpoints.begin(2, None, {"step": 2})


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, even if the tests run in a shell's background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_wait_but_not_the_checkpoint(slow):
    slow.checkpoints.begin(1, None, {"step": 1})
    threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        slow.checkpoints.finish()
    assert slow.checkpoints.writing == 1
    slow.go.set()
    slow.checkpoints.finish()
    assert slow.checkpoints.latest() == 1


def test_only_orbax_is_silenced(caplog, monkeypatch):
    """Warnings of programs that run again, for example, are logged while a checkpoint is written. Contexts overlap in two threads."""
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)  # to caplog
    first, second = quiet_orbax(), quiet_orbax()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    logger = logging.getLogger("absl")
    path = "/lib/python3/site-packages/orbax/checkpoint/futures.py"
    logger.handle(logger.makeRecord("absl", logging.ERROR, path, 1, "a traceback of orbax", (), None))
    logging.getLogger("asyncio").error("never retrieved")
    absl_logging.warning("program 3 runs again")
    second.__exit__(None, None, None)
    logging.getLogger("asyncio").error("later")
    assert [record.getMessage() for record in caplog.records] == ["program 3 runs again", "later"]


def test_a_process_that_failed_does_not_wait_for_the_others(monkeypatch):
    """Orbax meets the others in a `finally`. They never come: they wait for the part that this process could not write."""
    waited: list[str] = []
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: lambda *, key, timeout_ms: waited.append(key))

    def finalize(error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
        finally:
            _wait_for_others(key=str(error), timeout_ms=1)

    finalize(None)
    with pytest.raises(OSError, match="the disk is gone"):
        finalize(OSError("the disk is gone"))
    assert waited == ["None"]
