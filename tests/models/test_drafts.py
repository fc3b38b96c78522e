"""Several tokens of a row read at once: equal to reading them one by one, and rejected ones leave nothing behind."""

import dataclasses

import jax
import numpy as np
import pytest

from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.drafts import keep_in_rings, windows_of

WINDOW = 8
GPT_OSS = ModelConfig(4, 32, 4, 2, 16, 4, 2, 16, 61, sliding_window=WINDOW, eos_id=1, pad_id=0)
DENSE = dataclasses.replace(
    GPT_OSS, num_experts=0, experts_per_token=0, sliding_window=0, pattern=("full",), family="qwen2", sinks=False, o_bias=False, tied=True
)
MODELS = {"gpt-oss": GPT_OSS, "dense": DENSE}
STEPS, TOKENS = 6, 5

# Operation by operation, each would compile dozens of functions.
_keep_in_rings, _windows_of = jax.jit(keep_in_rings), jax.jit(windows_of)


@pytest.mark.parametrize("name", list(MODELS))
def test_drafts_equal_tokens_read_one_by_one(name, random_weights):
    """Rows around the ring's and the pages' ends read tokens ahead, keep some of them, and read others in place of the rest."""
    config, rng = MODELS[name], np.random.default_rng(0)
    model = Model(config, LoraConfig(attention_rank=4, expert_rank=2, head_rank=3, mlp_rank=2, alpha=8.0))
    frozen = random_weights(model.abstract_frozen())
    lora = jax.tree.map(lambda x: jax.device_put((0.1 * rng.normal(size=x.shape)).astype(x.dtype)), model.abstract_lora())
    lengths = np.array([1, WINDOW - 1, 0, 18, 3])
    rows, live = len(lengths), lengths > 0
    tokens_BS = rng.integers(2, 61, (rows, 60)).astype(np.int32)
    cache = jax.jit(model.init_cache, static_argnums=(0, 1, 2))(rows, 60, 4)
    cache = dataclasses.replace(cache, pages_BM=jax.device_put(rng.permutation(cache.pool.pages).reshape(rows, -1)))
    _, cache, _ = jax.jit(model.prefill)(frozen, lora, tokens_BS[:, :20], np.maximum(lengths, 1), cache)
    cache = dataclasses.replace(cache, lengths_B=jax.device_put(lengths.astype(np.int32)))
    one_by_one, decode, decode_drafts, keep = cache, jax.jit(model.decode), jax.jit(model.decode_drafts), jax.jit(model.keep_drafts)
    for _ in range(STEPS):
        counts = rng.integers(1, TOKENS + 1, rows)
        kept = np.where(live, rng.integers(1, counts + 1), 0)
        ahead = rng.integers(2, 61, (rows, TOKENS)).astype(np.int32)  # rejected tokens differ from those that follow
        places = lengths[:, None] + np.arange(TOKENS)
        true = np.arange(TOKENS) < kept[:, None]
        ahead[true] = np.take_along_axis(tokens_BS, places, 1)[true]
        hidden_BTD, read, new, routes = decode_drafts(frozen, lora, ahead, counts, cache)
        hidden_BTD, routes = np.asarray(hidden_BTD), np.asarray(routes)
        cache = keep(read, new, kept)
        for t in range(kept.max()):
            now = dataclasses.replace(one_by_one, lengths_B=jax.device_put(np.where(t < kept, one_by_one.lengths_B, 0)))
            expected_BD, now, expected_routes = decode(frozen, lora, tokens_BS[np.arange(rows), lengths + t], now)
            expected_BD, expected_routes = np.asarray(expected_BD), np.asarray(expected_routes)
            # A row without a token now must keep its ring, which `decode` writes for every row.
            on = (t < kept)[None, :, None, None, None]
            rings = (jax.device_put(np.where(on, a, b)) for a, b in zip(_rings(now), _rings(one_by_one), strict=True))
            one_by_one = dataclasses.replace(one_by_one, pool=now.pool, lengths_B=jax.device_put(one_by_one.lengths_B + np.int32(t < kept)))
            one_by_one = dataclasses.replace(one_by_one, **dict(zip(("ring_k_LBKWH", "ring_v_LBKWH"), rings, strict=True)))
            np.testing.assert_allclose(hidden_BTD[t < kept, t], expected_BD[t < kept], atol=2e-5)
            np.testing.assert_array_equal(routes[t < kept, t], expected_routes[t < kept])
        lengths = lengths + kept
        np.testing.assert_array_equal(cache.lengths_B, lengths)
        for ring, expected in zip(_rings(cache), _rings(one_by_one), strict=True):
            np.testing.assert_allclose(np.asarray(ring)[:, live], np.asarray(expected)[:, live], atol=2e-5)


def _rings(cache):
    return cache.ring_k_LBKWH, cache.ring_v_LBKWH


@pytest.mark.parametrize(("window", "tokens"), [(4, 3), (3, 3), (2, 5), (1, 2)])
def test_rings_hold_the_last_positions(window, tokens):
    """Keys are their positions. The draft may be longer than the window."""
    lengths = np.array([1, 2, 3, 5, 9])
    positions = lengths[:, None] + np.arange(tokens)
    held = np.stack([[max((p for p in range(n) if p % window == w), default=-1) for w in range(window)] for n in lengths])
    ring, new = held[:, None, :, None] * 1.0, positions[:, :, None, None] * 1.0
    windows = np.asarray(_windows_of(ring, new, positions)).reshape(len(lengths), tokens, window)
    for kept in range(tokens + 1):
        ends = lengths + kept
        expected = np.stack([[max((p for p in range(n) if p % window == w), default=-1) for w in range(window)] for n in ends])
        got = np.asarray(_keep_in_rings(ring[None], new[None], lengths, np.full(len(lengths), kept)))
        np.testing.assert_array_equal(got[0, :, 0, :, 0], expected)
        if kept:
            np.testing.assert_array_equal(windows[:, kept - 1], expected)
