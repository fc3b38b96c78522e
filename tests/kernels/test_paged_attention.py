"""Attention over pages, compared with an explicit softmax in float64, one row and head at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.kernels.attention import PLACES, paged_attention_reference, prefill_attention_reference

_attend = jax.jit(paged_attention_reference)

LAYERS = 2


def _problem(size, counts, spare=0, heads=6, kv_heads=2, head_size=8, seed=0):
    """Pools with NaN in unused places, and a table whose unused entries are not valid pages. The pages of a row are scattered."""
    rng = np.random.default_rng(seed)
    used = [-(-count // size) for count in counts]
    pages = np.full((len(counts), max(used) + spare), 2**31 - 1, np.int32)
    own = np.split(rng.permutation(sum(used) + 3).astype(np.int32), np.cumsum(used))
    keys, values = np.full((2, LAYERS, sum(used) + 3, kv_heads, size, head_size), np.nan, np.float32)
    for row, (count, numbers) in enumerate(zip(counts, own, strict=False)):
        pages[row, : used[row]] = numbers
        for j, page in enumerate(numbers):
            filled = min(size, count - j * size)
            keys[:, page, :, :filled], values[:, page, :, :filled] = rng.normal(size=(2, LAYERS, kv_heads, filled, head_size))
    q = 3 * rng.normal(size=(len(counts), heads, head_size)).astype(np.float32)
    return q, keys, values, pages, np.array(counts, np.int32), rng.normal(size=heads).astype(np.float32)


def _expected(q_BNH, keys, values, layer, pages_BM, counts_B, sinks_N=None):
    out, size = np.zeros(q_BNH.shape), keys.shape[3]
    for b, n in np.ndindex(*q_BNH.shape[:2]):
        kv = n // (q_BNH.shape[1] // keys.shape[2])
        k, v = (np.array([x[layer, pages_BM[b, j // size], kv, j % size] for j in range(counts_B[b])], np.float64) for x in (keys, values))
        weights = np.exp(k @ q_BNH[b, n].astype(np.float64) / np.sqrt(q_BNH.shape[-1]))
        out[b, n] = weights @ v / (weights.sum() + (0 if sinks_N is None else np.exp(float(sinks_N[n]))))
    return out


def _call(attend, problem, layer):
    q, keys, values, pages, counts, sinks = problem
    return attend(q, keys, values, jnp.int32(layer), pages, counts, sinks)


@pytest.mark.parametrize(
    ("size", "counts", "spare"),
    [
        (128, [128, 1, 77], 0),  # rings: one page per row
        (128, [1, 129, 700], 3),
        (5, [1, 5, 6, 23], 1),
        (1, [1, 2, 9], 0),
        (PLACES + 8, [PLACES + 9, 3], 0),
        (16, [3 * PLACES + 1, 16, PLACES], 0),
    ],
)
def test_matches_the_softmax_with_a_sink(size, counts, spare):
    problem = _problem(size, counts, spare)
    for layer in range(LAYERS):
        np.testing.assert_allclose(_call(_attend, problem, layer), _expected(*problem[:3], layer, *problem[3:]), atol=5e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (16, 2), (6, 2), (5, 1), (14, 2)])
def test_query_heads_of_one_kv_head_are_adjacent(heads, kv_heads):
    problem = _problem(16, [40, 7], heads=heads, kv_heads=kv_heads)
    np.testing.assert_allclose(_call(_attend, problem, 1), _expected(*problem[:3], 1, *problem[3:]), atol=5e-6)


@pytest.mark.parametrize(("dtype", "heads"), [(jnp.bfloat16, 6), (jnp.float32, 7)])
def test_a_sink_of_minus_1e30_is_a_softmax_without_sinks(dtype, heads):
    """Also at scores near -100, where a sink of 0 would take all the weight. A row without tokens gets 0."""
    q, keys, values, pages, counts, _ = _problem(16, [PLACES + 5, 40, 1, 1], heads=heads, kv_heads=1, head_size=16)
    q, keys = np.abs(q), keys - 10
    sinks = jnp.full(heads, -1e30, dtype)
    expected = _expected(q, keys, values, 1, pages, counts)
    np.testing.assert_allclose(_call(_attend, (q, keys, values, pages, counts, sinks), 1), expected, atol=1e-4)
    counts[3], expected[3] = 0, 0
    np.testing.assert_allclose(_call(_attend, (q, keys, values, pages, counts, sinks), 1), expected, atol=1e-4)


def test_rows_may_share_pages():
    q, keys, values, pages, counts, sinks = _problem(8, [40, 40, 40])
    pages[1:, :3] = pages[0, :3]
    problem = (q, keys, values, pages, counts, sinks)
    np.testing.assert_allclose(_call(_attend, problem, 0), _expected(q, keys, values, 0, pages, counts, sinks), atol=5e-6)


def test_extreme_scores_and_sinks_stay_finite():
    q, keys, values, pages, counts, _ = _problem(16, [600, 3, 1])
    for sink in (-1e4, 1e4):
        out = np.asarray(_call(_attend, (q * 1e3, keys, values, pages, counts, np.full(6, sink, np.float32)), 0))
        assert np.isfinite(out).all()
        assert (np.abs(out) < np.nanmax(np.abs(values)) + 1e-3).all()
    # A sink above every score takes all the weight.
    np.testing.assert_array_equal(np.asarray(_call(_attend, (q, keys, values, pages, counts, np.full(6, 1e4, np.float32)), 0)), 0)


def test_bfloat16_is_as_accurate_as_its_inputs():
    q, keys, values, *rest = _problem(16, [600, 100, 1])
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, keys, values)]
    out = _call(_attend, (*low, *rest), 1)
    assert out.dtype == jnp.bfloat16
    expected = _expected(*(np.asarray(x, np.float32) for x in low), 1, *rest)
    np.testing.assert_allclose(out.astype(np.float32), expected, atol=0.02)


def test_all_lengths_share_one_compilation():
    traces = 0

    @jax.jit
    def attend(*arguments):
        nonlocal traces
        traces += 1
        return paged_attention_reference(*arguments)

    q, keys, values, pages, _, sinks = _problem(16, [2000, 2000])
    for count in (1, PLACES, 2 * PLACES + 1):
        counts = np.full(2, count, np.int32)
        got = _call(attend, (q, keys, values, pages, counts, sinks), 0)
        np.testing.assert_allclose(got, _expected(q, keys, values, 0, pages, counts, sinks), atol=5e-6)
    assert traces == 1


@pytest.mark.parametrize(
    ("size", "lengths", "tokens"), [(4, [0, 0, 0], 8), (8, [16, 0, 40], 5), (128, [640, 128, 0], 3), (3, [1, 7, 30], 1)]
)
def test_tokens_of_a_chunk_attend_to_earlier_tokens(size, lengths, tokens):
    """Each token has the result that it has as the last one of its row."""
    q, keys, values, pages, counts, sinks = _problem(size, [length + tokens for length in lengths], spare=2)
    rng = np.random.default_rng(1)
    q_BTNH = 3 * rng.normal(size=(len(lengths), tokens, *q.shape[1:])).astype(np.float32)
    chunk = jax.jit(prefill_attention_reference)(q_BTNH, keys, values, jnp.int32(1), pages, jnp.array(lengths, jnp.int32), sinks)
    for t in range(tokens):
        alone = _attend(q_BTNH[:, t], keys, values, jnp.int32(1), pages, counts - tokens + t + 1, sinks)
        np.testing.assert_allclose(chunk[:, t], alone, atol=5e-6)
