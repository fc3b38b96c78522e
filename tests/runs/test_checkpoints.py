"""Checkpoints: round trip, what is kept, mismatches, a disk that fails, and kill -9 at random moments."""

import random
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.exceptions import RunError
from discover_jax.learning.train_state import TrainState, adam, init_train_state
from discover_jax.runs.checkpoints import Checkpoints


def train_state(value: float, rank: int = 2) -> TrainState:
    lora = {"attention": {"A": jnp.full((5, rank), value), "B": jnp.full((rank, 5), -value)}, "head": [jnp.full(3, value)]}
    state = init_train_state(lora, adam(max_grad_norm=1.0))
    return TrainState(state.lora, jax.tree.map(lambda leaf: leaf + int(value), state.opt_state), jnp.int32(value))


def assert_equal(a: TrainState | None, b: TrainState) -> None:
    assert isinstance(a, TrainState)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


HOST = {"archive": [{"id": "0-0-1", "value": 0.1 + 0.2, "code": "ä\n\ud800", "parent_id": None}], "position": 12345678901, "seed": 3}


def test_round_trip(tmp_path):
    writer = Checkpoints(tmp_path / "c", keep=2, every=0)
    assert writer.latest() is None
    writer.save(1, train_state(1.0), HOST)
    writer.save(2, train_state(2.0), HOST | {"seed": 4})
    reader = Checkpoints(tmp_path / "c", keep=2, every=0)
    assert reader.latest() == 2
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), train_state(0.0))
    restored, host = reader.restore(2, shapes)
    assert_equal(restored, train_state(2.0))
    assert host == HOST | {"seed": 4}
    restored, host = reader.restore(1, train_state(0.0))
    assert_equal(restored, train_state(1.0))
    assert host == HOST


def test_without_train_state(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, every=0)
    checkpoints.save(3, None, HOST)
    assert checkpoints.restore(3, None) == (None, HOST)


def test_what_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=3)
    for step in range(1, 9):
        checkpoints.save(step, None, {"step": step})
    assert sorted(int(entry.name) for entry in tmp_path.iterdir()) == [3, 6, 7, 8]
    assert checkpoints.restore(3, None)[1] == {"step": 3}


def test_read_only_touches_nothing(tmp_path):
    writer = Checkpoints(tmp_path, keep=3, every=0)
    for step in (1, 2, 3):
        writer.save(step, train_state(float(step)), HOST)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()  # the other run is just writing it
    before = sorted(tmp_path.rglob("*"))
    reader = Checkpoints(tmp_path, keep=1, every=0, read_only=True)
    assert reader.latest() == 3
    assert_equal(reader.restore(3, train_state(0.0))[0], train_state(3.0))
    reader.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=0)
    checkpoints.save(5, train_state(1.0), HOST)
    with pytest.raises(RunError, match="would not come after"):
        checkpoints.save(5, train_state(1.0), HOST)
    with pytest.raises(RunError, match=r"Checkpoint 4 .*cannot be restored"):
        checkpoints.restore(4, train_state(1.0))
    with pytest.raises(RunError, match="other adapter ranks"):
        checkpoints.restore(5, train_state(1.0, rank=4))


def test_full_disk_leaves_the_earlier_ones(tmp_path):
    """The kernel refuses writes beyond 4 KiB a file, as a full disk would (with EFBIG instead of ENOSPC)."""
    checkpoints = Checkpoints(tmp_path, keep=2, every=0)
    checkpoints.save(1, train_state(1.0), HOST)
    big = train_state(2.0)
    big.lora["attention"]["A"] = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(RunError, match=r"Checkpoint 2 could not be written.*(?s:.)*resumes at step 1"):
            checkpoints.save(2, big, HOST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = Checkpoints(tmp_path, keep=2, every=0)
    assert again.latest() == 1
    assert_equal(again.restore(1, train_state(0.0))[0], train_state(1.0))
    again.save(2, big, HOST)
    assert_equal(again.restore(2, big)[0], big)


_WRITER = """
import pathlib, sys
import jax.numpy as jnp
from discover_jax.learning.train_state import TrainState, adam, init_train_state
from discover_jax.runs.checkpoints import Checkpoints
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=2, every=0)
step = checkpoints.latest() or 0
print("from", step, flush=True)
while True:
    step += 1
    checkpoints.save(step, init_train_state({"a": jnp.full((256, 256), float(step))}, adam()), {"step": step, "filler": "x" * 100_000})
    print("saved", step, flush=True)
"""


def test_kill_at_random_moments(tmp_path):
    """After each kill the latest checkpoint is whole, no older than the last one reported as saved, and writing goes on from it."""
    rng = random.Random(0)
    abstract = init_train_state({"a": jnp.zeros((256, 256))}, adam())
    saved = 0
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == f"from {saved}\n"
        time.sleep(rng.uniform(0.05, 0.8))
        writer.send_signal(signal.SIGKILL)
        reported = [int(line.split()[1]) for line in writer.communicate()[0].splitlines()]
        checkpoints = Checkpoints(tmp_path, keep=2, every=0)
        latest = checkpoints.latest() or 0
        assert latest in ({reported[-1], reported[-1] + 1} if reported else {saved, saved + 1})
        if latest:
            restored, host = checkpoints.restore(latest, abstract)
            assert restored is not None
            np.testing.assert_array_equal(restored.lora["a"], np.full((256, 256), latest))
            assert host["step"] == latest
        assert [entry.name for entry in tmp_path.iterdir() if not entry.name.isdigit()] == []
        saved = latest
    assert saved > 0
