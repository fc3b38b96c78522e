"""Attention of packed rows, forward and backward, compared with an explicit masked softmax and its gradients in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from discover_jax.kernels import packed_attention
from discover_jax.kernels.packed_attention import packed_attention_reference, windowed_attention_reference


def _direct(problem, window=None):
    """The output and the gradients of queries, keys and values, in float64, with a full matrix of scores per head. Padding sees itself."""
    q, k, v, segments, sinks, d_out = (np.asarray(x, np.float64) for x in problem)
    (b, t, n, h), kv_heads = q.shape, k.shape[2]
    keys, values = (np.repeat(x, n // kv_heads, axis=2) for x in (k, v))
    distance = np.arange(t)[:, None] - np.arange(t)
    seen = (segments[:, :, None] == segments[:, None]) & (distance >= 0) & (distance < (window or t))
    scores = np.where(seen[:, None], np.einsum("btnh,bsnh->bnts", q, keys) / np.sqrt(h), -np.inf)
    if np.isfinite(sinks).all():  # otherwise there are no sinks
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (b, n, t, 1))], axis=-1)
    chosen = special.softmax(scores, axis=-1)[..., :t]
    d_chosen = np.einsum("btnh,bsnh->bnts", d_out, values)
    d_scores = chosen * (d_chosen - (chosen * d_chosen).sum(axis=-1, keepdims=True)) / np.sqrt(h)
    d_keys, d_values = (np.einsum("bnts,btnh->bsnh", x, y).reshape(b, t, kv_heads, -1, h) for x, y in ((d_scores, q), (chosen, d_out)))
    d_q = np.einsum("bnts,bsnh->btnh", d_scores, keys)
    return np.einsum("bnts,bsnh->btnh", chosen, values), (d_q, d_keys.sum(axis=3), d_values.sum(axis=3))


def _problem(lengths_of_rows, tokens, heads=4, kv_heads=2, size=8, seed=0):
    rng = np.random.default_rng(seed)
    batch = len(lengths_of_rows)
    q, k, v, d_out = (rng.normal(size=(batch, tokens, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads))
    segments = np.zeros((batch, tokens), np.int32)
    for row, lengths in enumerate(lengths_of_rows):
        ends = np.cumsum(lengths)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True), 1):
            segments[row, end - length : end] = number
    return 2 * q, k, v, segments, rng.normal(size=heads).astype(np.float32), d_out * (segments > 0)[..., None, None]


def _output_and_gradients(function, problem):
    q, k, v, segments, sinks, d_out = problem

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(lambda *qkv: function(*qkv, segments, sinks), q, k, v)
        return out, pull(d_out)

    return both(q, k, v, d_out)


def _check(attend, expected, problem, *, alone=True):
    """`expected` is the output and the gradients. `alone`: also checks the output without gradients, which is compiled again."""
    q, k, v, segments, sinks, _ = problem
    real, (out, gradients) = (segments > 0)[..., None, None], expected
    out_with, found = _output_and_gradients(attend, problem)
    for each in (out_with, jax.jit(attend)(q, k, v, segments, sinks)) if alone else (out_with,):
        np.testing.assert_allclose(each * real, out * real, atol=2e-6)
    for got, want in zip(found, gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(want).max() > 0.1


ROWS = [
    ([[37]], 37),
    ([[1, 1, 5, 20], [30]], 33),
    ([[64]], 64),
    ([[70, 10, 90], [5, 160]], 190),
    ([[1], [0]], 1),
]


_SLOW_ROWS = (0, 3)  # each case compiles: row 1 has several segments, blocks and a last block that is not full, too
_ROWS = [pytest.param(number, marks=pytest.mark.slow if number in _SLOW_ROWS else []) for number in range(len(ROWS))]


@pytest.mark.parametrize("number", _ROWS)
@pytest.mark.parametrize("block", [8, *(pytest.param(size, marks=pytest.mark.slow) for size in (16, 512))])
def test_full_attention(monkeypatch, number, block):
    monkeypatch.setattr(packed_attention, "BLOCK", block)
    problem = _problem(*ROWS[number])
    _check(packed_attention_reference, _direct(problem), problem, alone=block == 8)


# The window of one token and its blocks of three are tested on a row of many segments.
_WINDOWS = [
    *(pytest.param(number, 4, 4, 2, marks=pytest.mark.slow if number in _SLOW_ROWS else []) for number in range(len(ROWS))),
    *(pytest.param(number, 1, 3, 5, marks=[] if number == 1 else pytest.mark.slow) for number in range(len(ROWS))),
    *(pytest.param(number, *sizes, marks=pytest.mark.slow) for number in range(len(ROWS)) for sizes in ((8, 64, 16), (200, 64, 16))),
]


@pytest.mark.parametrize(("number", "window", "least", "at_once"), _WINDOWS)
def test_a_window(monkeypatch, number, window, least, at_once):
    monkeypatch.setattr(packed_attention, "LEAST_WINDOW_BLOCK", least)
    monkeypatch.setattr(packed_attention, "WINDOW_BLOCKS", at_once)

    def attend(*arguments):
        return windowed_attention_reference(*arguments, window=window)

    problem = _problem(*ROWS[number])
    _check(attend, _direct(problem, window), problem, alone=number == 1)


@pytest.mark.parametrize("heads", [*(pytest.param(pair, marks=pytest.mark.slow) for pair in ((1, 1), (6, 2))), (3, 3), (7, 1)])
def test_heads(monkeypatch, heads):
    monkeypatch.setattr(packed_attention, "BLOCK", 16)
    problem = _problem([[20, 30]], 50, *heads)
    _check(packed_attention_reference, _direct(problem), problem, alone=False)


@pytest.mark.parametrize(("dtype", "window"), [(jnp.bfloat16, None), (jnp.float32, 8)])
def test_a_sink_of_minus_1e30_is_a_softmax_without_sinks(monkeypatch, dtype, window):
    """Padding, also a whole row of it, gets finite results and gradients."""
    monkeypatch.setattr(packed_attention, "BLOCK", 16)
    q, k, v, segments, _, d_out = _problem([[20, 12], []], 40, 7, 1)
    options = {} if window is None else {"window": window}
    attend = packed_attention_reference if window is None else windowed_attention_reference
    sinks = np.full(7, -1e30, dtype)
    attend = functools.partial(attend, **options)
    _check(attend, _direct((q, k, v, segments, np.full(7, -np.inf), d_out), window), (q, k, v, segments, sinks, d_out), alone=False)
    out, gradients = _output_and_gradients(attend, (q, k, v, segments, sinks, np.ones_like(q)))
    assert all(np.isfinite(x).all() for x in (out, *gradients))


def test_memory_is_not_quadratic_in_the_length():
    """For 4,096 tokens, both passes together take less than a quarter of one matrix of scores."""
    q, k, v, segments, sinks, d_out = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _problem([[4096]], 4096, 1, 1, 4))

    for attend in (packed_attention_reference, lambda *a: windowed_attention_reference(*a, window=128)):

        def loss(q, k, v, segments, sinks, d_out, attend=attend):
            return jnp.sum(attend(q, k, v, segments, sinks) * d_out)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, segments, sinks, d_out).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4096**2 * 4 / 4
