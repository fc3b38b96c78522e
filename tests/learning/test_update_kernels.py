"""On a GPU: gradients by kernels are as close to the float32 reference as gradients by the bfloat16 reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.kernels.kernel_set import REFERENCE, kernel_set
from discover_jax.learning.logprobs import token_logprobs
from discover_jax.learning.packing import pack
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.rounding import EXACT_ROUNDING
from discover_jax.types import Rollout, StopReason

SIZES = ModelConfig(
    num_layers=2,
    width=384,
    num_heads=8,
    num_kv_heads=2,
    head_size=64,
    num_experts=8,
    experts_per_token=2,
    mlp_width=384,
    vocab_size=512,
    sliding_window=128,
)
LENGTHS = (700, 300, 37, 129)


def _rollout(rng, index, length, routes):
    tokens = rng.integers(0, SIZES.vocab_size, length + 1).astype(np.int32)
    new = length - 9
    return Rollout(
        group=0,
        index=index,
        prompt_tokens_P=tokens[:10],
        tokens_T=tokens[10:],
        logprobs_T=np.full(new, -6.0, np.float32),
        chosen_T=np.ones(new, bool),
        stop=StopReason.STOP_TOKEN,
        routes_SLX=routes(length),
    )


def _any(rng):
    """Random, distinct experts for every token. The last expert gets exactly one token, the one before it none."""

    def routes(length):
        order = np.argsort(rng.random((length, SIZES.num_layers, SIZES.num_experts - 2)), axis=-1)[..., : SIZES.experts_per_token]
        if length == LENGTHS[0]:
            order[0, :, 0] = SIZES.num_experts - 1
        return order.astype(np.uint8)

    return routes


def _same(rng):
    """All tokens go to the same experts."""
    return lambda length: np.broadcast_to(np.array([3, 5], np.uint8), (length, SIZES.num_layers, SIZES.experts_per_token)).copy()


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(("routing", "adapter"), [(_any, LoraConfig(8, 4, 8)), (_same, LoraConfig(8, 4, 8)), (_any, LoraConfig(8, 0, 0))])
def test_gradients_by_kernels_are_within_the_error_of_the_reference(routing, adapter):
    rng = np.random.default_rng(0)
    model = Model(SIZES, adapter, dtype="bfloat16", experts="tiled", kernels=kernel_set("gpu"))
    frozen, lora = model.init_frozen(jax.random.key(0)), model.init_lora(jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), lora)
    rollouts = [_rollout(rng, index, length, routing(rng)) for index, length in enumerate(LENGTHS)]
    (batch,) = pack(rollouts, np.ones(len(rollouts)), row_tokens=1280, rows=1)
    weights_BT = jax.device_put((rng.normal(size=batch.mask_BT.shape) * batch.mask_BT).astype(np.float32))

    def gradient(model):
        def loss(lora, frozen):
            return jnp.sum(weights_BT * token_logprobs(model, frozen, lora, batch, chunk_tokens=512)[0])

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss), compiler_options=EXACT_ROUNDING)(lora, frozen)

    by_kernels = gradient(model)
    reference = dataclasses.replace(model, kernels=REFERENCE)
    plain, exact = gradient(dataclasses.replace(reference, remat="none")), gradient(dataclasses.replace(reference, dtype="float32"))

    def error(got):
        return jax.tree.map(lambda a, b: float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())), got, exact)

    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(lora)]
    for name, ours, theirs in zip(names, jax.tree.leaves(error(by_kernels)), jax.tree.leaves(error(plain)), strict=True):
        print(f"{name}: kernels {ours:.2e}, reference {theirs:.2e}")
        assert 0 < ours < 1.3 * theirs + 1e-4, name
