"""The update on a mesh of simulated devices equals the update on one device, and its results keep the adapter's layout."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from discover_jax.exceptions import ShardingError
from discover_jax.learning.packing import pack, pack_substeps
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.learning.update import Update
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.sharding import make_mesh
from discover_jax.types import Rollout, StopReason

config = ModelConfig(2, 32, 4, 2, 16, 4, 2, 32, 64, sliding_window=8)
rng = np.random.default_rng(0)
rollouts = [
    Rollout(0, i, np.int32(rng.integers(0, 64, 3)), np.int32(rng.integers(0, 64, n)), np.float32(-rng.uniform(3, 5, n)), np.ones(n, bool),
            StopReason.MAX_TOKENS) for i, n in enumerate([9, 14, 5, 12, 7])
]
loss, kl_coefficient = sys.argv[1], float(sys.argv[2])
advantages = rng.normal(size=5)
batches = pack(rollouts, advantages, row_tokens=24, rows=2)
parts = pack_substeps(rollouts, advantages, substeps=2, row_tokens=24, rows=2)
alone = Model(config, LoraConfig(2, 2, 2, 4.0))
spread = Model(config, LoraConfig(2, 2, 2, 4.0), mesh=make_mesh(data=2, expert=2, tensor=2))
frozen = jax.tree.map(np.asarray, alone.init_frozen(jax.random.key(0)))
lora = jax.tree.map(lambda leaf: np.float32(0.2 * rng.normal(size=leaf.shape)), alone.abstract_lora())
results = []
for model in (alone, spread):
    put = lambda tree, structs: jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), tree, structs)
    update = Update(model, adam(1e-2), loss=loss, kl_coefficient=kl_coefficient)
    state = init_train_state(put(lora, model.abstract_lora()), adam(1e-2))
    weights = put(frozen, model.abstract_frozen())
    (shaped,), _ = update.shape(weights, [batches])
    gradient, _ = update.gradient(weights, state.lora, shaped)
    gradient = jax.tree.map(np.asarray, gradient)
    state, metrics = update.update_in_substeps(weights, state, parts)
    assert int(state.step) == 2
    if model.mesh is not None:
        expected = [s.sharding for s in jax.tree.leaves(model.abstract_lora())]
        assert sum(not s.is_fully_replicated for s in expected) > 10
        for tree in (state.lora, state.opt_state[0].mu, state.opt_state[0].nu):
            for leaf, sharding in zip(jax.tree.leaves(tree), expected, strict=True):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)
        state, _ = update.update(weights, state, batches)
        assert update._accumulate._cache_size() == update._apply._cache_size() == 1
        assert update._base_gap._cache_size() == (kl_coefficient > 0)
        try:
            update.update(weights, state, pack(rollouts, np.ones(5), row_tokens=24, rows=3))
        except ShardingError as error:
            assert "size 3" in str(error)
        else:
            raise AssertionError("3 rows were accepted on 2 devices")
    results.append((gradient, metrics))
(one, one_metrics), (many, many_metrics) = results
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    assert np.linalg.norm(a) > 1e-4
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)
assert ("kl_base/mean" in one_metrics) == (kl_coefficient > 0)
# Adam's first step divides each entry by its size, so rounding errors of small entries affect the second substep.
for key, value in one_metrics.items():
    assert abs(value - many_metrics[key]) <= 1e-3 * max(1, abs(value)), key
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "kl_coefficient"), [("importance_sampling", 0), ("truncated_importance_sampling", 0), ("ppo", 0.1), ("reinforce", 0)]
)
def test_a_mesh_of_eight_devices_gives_the_same_update(loss, kl_coefficient):
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", PROGRAM, loss, str(kl_coefficient)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "equal"
