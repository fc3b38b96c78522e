"""Checkpoints: round trip, retention, mismatches, a failing disk, and kill -9 at random moments."""

import random
import re
import shutil
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


def test_retention(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=3)
    for step in range(1, 9):
        checkpoints.save(step, None, {"step": step})
    assert sorted(int(entry.name) for entry in tmp_path.iterdir()) == [3, 6, 7, 8]
    assert checkpoints.restore(3, None)[1] == {"step": 3}


def test_read_only_touches_nothing(tmp_path):
    writer = Checkpoints(tmp_path, keep=3, every=0)
    for step in (1, 2, 3):
        writer.save(step, train_state(float(step)), HOST)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()  # the other run is writing it
    before = sorted(tmp_path.rglob("*"))
    reader = Checkpoints(tmp_path, keep=1, every=0, read_only=True)
    assert reader.latest() == 3
    assert_equal(reader.restore(3, train_state(0.0))[0], train_state(3.0))
    reader.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=0)
    checkpoints.save(5, train_state(1.0), HOST)
    with pytest.raises(RunError, match=r"\b5\b"):
        checkpoints.save(5, train_state(1.0), HOST)
    with pytest.raises(RunError, match=r"\b4\b.*\[5\]"):
        checkpoints.restore(4, train_state(1.0))
    checkpoints.save(6, None, HOST)
    with pytest.raises(RunError, match="search"):
        checkpoints.restore(6, train_state(1.0))


def test_every_array_that_differs_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=0)
    checkpoints.save(5, train_state(1.0), HOST)
    wanted = train_state(1.0, rank=4)
    del wanted.lora["head"]
    with pytest.raises(RunError) as caught:
        checkpoints.restore(5, wanted)
    message = str(caught.value)
    assert re.search(r"lora/attention/A\b.*float32\[5, 2\].*float32\[5, 4\]", message)
    assert re.search(r"lora/attention/B\b.*float32\[2, 5\].*float32\[4, 5\]", message)
    assert re.search(r"\b7\b", message)  # A and B in the adapter and Adam's two moments, and the head
    half = train_state(1.0)
    half.lora["head"][0] = half.lora["head"][0].astype(jnp.bfloat16)
    with pytest.raises(RunError, match=r"\b1\b(?s:.)*lora/head/0\b.*float32\[3\].*bfloat16\[3\]"):
        checkpoints.restore(5, half)


def test_broken_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=0)
    checkpoints.save(1, train_state(1.0), HOST)
    for data in (tmp_path / "1" / "train_state").rglob("d/*"):
        data.unlink()
    with pytest.raises(RunError, match=r"\b[Cc]heckpoint 1\b"):
        Checkpoints(tmp_path, keep=2, every=0).restore(1, train_state(1.0))


def test_too_little_disk_space_is_reported_before_writing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2, every=0)
    checkpoints.save(1, train_state(1.0), HOST)
    before = sorted(tmp_path.rglob("*"))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))
        with pytest.raises(RunError, match=r"\b1\.\d MB\b.*\b0\.5 MB\b(?s:.)*resumes at checkpoint 1\."):
            checkpoints.save(2, train_state(2.0), HOST)
    assert sorted(tmp_path.rglob("*")) == before
    checkpoints.save(2, train_state(2.0), HOST)
    assert checkpoints.latest() == 2


_FAILING_WRITER = """
import pathlib, resource, sys
import jax.numpy as jnp, numpy as np
from discover_jax.exceptions import RunError
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.runs.checkpoints import Checkpoints
state = init_train_state({"a": jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)}, adam())
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=2, every=0)
checkpoints.save(1, state, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoints.save(2, state, {"step": 2})
except RunError as error:
    sys.exit(str(error))
"""


def test_failing_disk_keeps_earlier_checkpoints(tmp_path):
    """The kernel refuses writes beyond 4 KiB per file, like a full disk. The next process continues."""
    ended = subprocess.run([sys.executable, "-c", _FAILING_WRITER, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "heckpoint 2" in ended.stderr
    assert "resumes at checkpoint 1." in ended.stderr
    assert "_SignalingThread" not in ended.stderr  # orbax's traceback for each array
    again = Checkpoints(tmp_path, keep=2, every=0)
    assert again.latest() == 1
    expected = np.asarray(np.random.default_rng(0).normal(size=(300, 300)), np.float32)
    state = init_train_state({"a": jnp.zeros((300, 300))}, adam())
    restored, host = again.restore(1, state)
    assert restored is not None
    np.testing.assert_array_equal(restored.lora["a"], expected)
    assert host == {"step": 1}
    again.save(2, restored, {"step": 2})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]


_MESH = """
import pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.runs.checkpoints import Checkpoints
path = pathlib.Path(sys.argv[1])
values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
mesh = jax.make_mesh((2, 2), ("data", "tensor"))
places = {
    "one": jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    "rows": NamedSharding(mesh, P(("data", "tensor"))),
    "columns": NamedSharding(mesh, P(None, "tensor")),
}
def state(place, values=values):
    return init_train_state({"a": jax.device_put(jnp.asarray(values), place)}, adam())
for name, place in places.items():
    Checkpoints(path / name, keep=1, every=0).save(1, state(place), {})
    for other in places.values():
        restored, _ = Checkpoints(path / name, keep=1, every=0, read_only=True).restore(1, state(other, 0 * values))
        assert restored.lora["a"].sharding.is_equivalent_to(other, 2), (name, restored.lora["a"].sharding)
        assert np.array_equal(restored.lora["a"], values)
print("all equal")
"""


def test_restored_onto_another_mesh(tmp_path):
    """Saved on one device or sharded over four in several ways: restored arrays have the sharding of the restoring run."""
    ended = subprocess.run([sys.executable, "-c", _MESH, str(tmp_path)], capture_output=True, text=True)
    assert ended.stdout == "all equal\n", ended.stderr


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


@pytest.mark.slow  # tests/faults kills whole runs
def test_kill_at_random_moments(tmp_path):
    """After each kill, the latest checkpoint is complete and not older than the last one reported as saved. Writing continues from it."""
    rng = random.Random(0)
    abstract = init_train_state({"a": jnp.zeros((256, 256))}, adam())
    saved = 0
    for start in range(4):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == f"from {saved}\n"
        # Every other start reaches its first checkpoint, even on a busy machine.
        first = writer.stdout.readline() if start % 2 else ""
        time.sleep(rng.uniform(0.05, 0.8))
        writer.send_signal(signal.SIGKILL)
        reported = [int(line.split()[1]) for line in (first + writer.communicate()[0]).splitlines()]
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
