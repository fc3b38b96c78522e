"""Cached attention against the softmax written out in float64, one row and head at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.kernels.attention import BLOCK, cached_attention_reference

_attend = jax.jit(cached_attention_reference)


def _inputs(capacity, batch=3, layers=2, heads=6, kv_heads=2, size=8, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, heads, size)) * 3
    keys, values = rng.normal(size=(2, layers, batch, kv_heads, capacity, size))
    return [x.astype(np.float32) for x in (q, keys, values, rng.normal(size=heads))]


def _expected(q_BNH, keys_LBKSH, values_LBKSH, layer, counts_B, sinks_N):
    out = np.zeros(q_BNH.shape)
    for b, n in np.ndindex(*q_BNH.shape[:2]):
        kv, seen = n // (q_BNH.shape[1] // keys_LBKSH.shape[2]), slice(counts_B[b])
        scores = keys_LBKSH[layer, b, kv, seen].astype(np.float64) @ q_BNH[b, n] / np.sqrt(q_BNH.shape[-1])
        weights = np.exp(scores)
        out[b, n] = weights @ values_LBKSH[layer, b, kv, seen] / (weights.sum() + np.exp(float(sinks_N[n])))
    return out


@pytest.mark.parametrize("capacity", [1, 96, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 50])
def test_equals_the_softmax_with_a_sink(capacity):
    q, keys, values, sinks = _inputs(capacity)
    for counts in ([1, 1, 1], [1, max(1, capacity // 2), capacity], [min(BLOCK, capacity), min(BLOCK + 1, capacity), 1]):
        for layer in (0, 1):
            actual = _attend(q, keys, values, jnp.int32(layer), jnp.array(counts, jnp.int32), sinks)
            np.testing.assert_allclose(actual, _expected(q, keys, values, layer, counts, sinks), atol=2e-6)


def test_places_that_are_not_in_use_may_hold_anything():
    q, keys, values, sinks = _inputs(2 * BLOCK)
    counts = jnp.array([1, BLOCK, BLOCK + 7], jnp.int32)
    clean = _attend(q, keys, values, jnp.int32(0), counts, sinks)
    for b, count in enumerate(counts.tolist()):
        keys[:, b, :, count:] = 1e30
        values[:, b, :, count:] = -1e30
    np.testing.assert_array_equal(_attend(q, keys, values, jnp.int32(0), counts, sinks), clean)


def test_extreme_scores_and_sinks_stay_finite():
    q, keys, values, _ = _inputs(BLOCK + 5)
    counts = jnp.array([BLOCK + 5, 3, 1], jnp.int32)
    for sink in (-1e4, 1e4):
        out = np.asarray(_attend(q * 1e3, keys, values, jnp.int32(0), counts, np.full(6, sink, np.float32)))
        assert np.isfinite(out).all()
        assert (np.abs(out) < np.abs(values).max() + 1e-3).all()
    # A sink above every score takes the whole weight; one far below takes none, and the best key wins.
    np.testing.assert_array_equal(np.asarray(_attend(q, keys, values, jnp.int32(0), counts, np.full(6, 1e4, np.float32))), 0)


def test_bfloat16_is_as_near_as_its_inputs_allow():
    q, keys, values, sinks = _inputs(2 * BLOCK)
    counts = [2 * BLOCK, 100, 1]
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, keys, values)]
    out = _attend(*low, jnp.int32(1), jnp.array(counts, jnp.int32), sinks)
    assert out.dtype == jnp.bfloat16
    expected = _expected(*(np.asarray(x, np.float32) for x in low), 1, counts, sinks)
    np.testing.assert_allclose(out.astype(np.float32), expected, atol=0.02)


def test_one_program_serves_all_lengths():
    traces = 0

    @jax.jit
    def attend(*arguments):
        nonlocal traces
        traces += 1
        return cached_attention_reference(*arguments)

    q, keys, values, sinks = _inputs(3 * BLOCK)
    for count in (1, BLOCK, 2 * BLOCK + 1):
        attend(q, keys, values, jnp.int32(0), jnp.full(3, count, jnp.int32), sinks)
    assert traces == 1
