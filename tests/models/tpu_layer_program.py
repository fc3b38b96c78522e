"""Decodes with the parts of a layer spread over simulated devices, and with separate operations. Prints the largest difference.

The parts are plain JAX with the interface of the TPU kernels, since Pallas's interpreter would take many minutes.

Usage: XLA_FLAGS=--xla_force_host_platform_device_count=4 python tpu_layer_program.py DATA EXPERT
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.kernels import layer_parts
from discover_jax.kernels.exchange import exchanged
from discover_jax.kernels.experts import moe_reference
from discover_jax.kernels.kernel_set import Spread
from discover_jax.kernels.layer_parts import Branch, LayerKernels
from discover_jax.kernels.spread import SPREAD_LAYER
from discover_jax.models.cache import Pool
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.sharding import make_mesh

SIZES = ModelConfig(2, 64, 4, 2, 64, 8, 4, 64, 97, sliding_window=128)
LORA = LoraConfig(attention_rank=4, expert_rank=2, head_rank=3, alpha=8.0)
ROWS, LENGTHS = 8, (130, 3, 0, 127, 128, 200, 1, 0)


def random_like(tree, scale, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), tree)


def decoded(model, frozen, lora):
    """Hidden states, routes and caches of three steps of rows of these lengths; 0 is an empty row."""
    cache = model.init_cache(ROWS, 256, page_size=128)
    full, *rings = random_like((cache.pool.keys_LPKsH, cache.ring_k_LBKWH, cache.ring_v_LBKWH), 1.0, 0)
    cache = dataclasses.replace(
        cache, pool=Pool(full, full[::-1]), ring_k_LBKWH=rings[0], ring_v_LBKWH=rings[1], lengths_B=jnp.array(LENGTHS, jnp.int32)
    )
    decode, seen, alive = jax.jit(model.decode), [], np.array(LENGTHS) > 0
    for tokens_B in np.random.default_rng(1).integers(0, SIZES.vocab_size, (3, ROWS)).astype(np.int32):
        hidden_BD, cache, routes_BLX = decode(frozen, lora, tokens_B, cache)
        cache = dataclasses.replace(cache, lengths_B=jnp.where(alive, cache.lengths_B, 0))
        seen.append((hidden_BD[alive], routes_BLX[alive]))
    rings = [ring[:, alive] for ring in (cache.ring_k_LBKWH, cache.ring_v_LBKWH)]
    return jax.tree.map(lambda x: np.asarray(x, np.float32), (seen, cache.pool, rings))


def rotate_and_write(parts, turns, keys, values, layer, pages, places, sizes, *, first_page):
    own = pages - first_page
    own = jnp.where((own >= 0) & (own < keys.shape[1]), own, keys.shape[1])
    return layer_parts.rotate_and_write(parts, turns, keys, values, layer, own, places, sizes)


def attend(q, keys, values, layer, pages, counts, sinks, *, first_page):
    return layer_parts.attend(q, keys, values, layer, jnp.clip(pages - first_page, 0, keys.shape[1] - 1), counts, sinks)


def route(x, router, experts_per_token, layer):
    index, weights, _ = layer_parts.route(x, router, experts_per_token, layer)
    return index, None, weights


def experts(x, index, weights, *matrices, rows, axis, **options):
    if not axis:
        return Branch(moe_reference(x, index, rows, *matrices, **options)[None, :, None])
    return Branch(exchanged(moe_reference, axis, x, index, rows, *matrices, **options)[None, :, None])


PARTS = LayerKernels(rotate_and_write=rotate_and_write, attend=attend, route=route, experts=experts)


def main(data, expert):
    mesh = make_mesh(data, expert, 1)
    model = Model(SIZES, LORA, experts="lanes", mesh=mesh)
    parts = {name: Spread(spread, getattr(PARTS, name), mesh) for name, spread in SPREAD_LAYER.items()}
    fused = dataclasses.replace(model, kernels=dataclasses.replace(model.kernels, layer=LayerKernels(**parts, mesh=mesh)))
    frozen, lora = model.init_frozen(jax.random.key(0)), random_like(model.abstract_lora(), 0.05, 7)
    expected = decoded(model, frozen, lora)
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), decoded(fused, frozen, lora), expected)
    print(json.dumps({"difference": max(jax.tree.leaves(differences)), "largest": float(np.abs(expected[0][-1][0]).max())}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
