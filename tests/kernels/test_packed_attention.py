"""Attention of packed rows, forward and backward, compared with an explicit masked softmax that jax differentiates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.kernels import packed_attention
from discover_jax.kernels.packed_attention import packed_attention_reference, windowed_attention_reference


def _direct(q, k, v, segments, sinks, window=None):
    """[B, T, N, H], with a full matrix of scores per head."""
    b, t, n, h = q.shape
    keys, values = (jnp.repeat(x, n // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, keys) / np.sqrt(h)
    distance = np.arange(t)[:, None] - np.arange(t)
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = jnp.concatenate([jnp.where(seen[:, None], scores, -jnp.inf), jnp.broadcast_to(sinks[:, None, None], (b, n, t, 1))], axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1)[..., :-1], values)


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

    def loss(q, k, v):
        out = function(q, k, v, segments, sinks)
        return jnp.sum(out * d_out), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


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


@functools.cache
def _direct_of_rows(number):
    """Output and gradients for these rows, which do not depend on the size of a block."""
    return _output_and_gradients(_direct, _problem(*ROWS[number]))


@pytest.mark.parametrize("number", range(len(ROWS)))
@pytest.mark.parametrize("block", [8, *(pytest.param(size, marks=pytest.mark.slow) for size in (16, 512))])
def test_full_attention(monkeypatch, number, block):
    monkeypatch.setattr(packed_attention, "BLOCK", block)
    _check(packed_attention_reference, _direct_of_rows(number), _problem(*ROWS[number]), alone=block == 8)


# The window of one token and its blocks of three are tested on the rows of many segments.
_WINDOWS = [
    *((number, 4, 4, 2) for number in range(len(ROWS))),
    *((number, 1, 3, 5) for number in (1, 3)),
    *(pytest.param(number, 1, 3, 5, marks=pytest.mark.slow) for number in (0, 2, 4)),
    *(pytest.param(number, *sizes, marks=pytest.mark.slow) for number in range(len(ROWS)) for sizes in ((8, 64, 16), (200, 64, 16))),
]


@pytest.mark.parametrize(("number", "window", "least", "at_once"), _WINDOWS)
def test_a_window(monkeypatch, number, window, least, at_once):
    monkeypatch.setattr(packed_attention, "LEAST_WINDOW_BLOCK", least)
    monkeypatch.setattr(packed_attention, "WINDOW_BLOCKS", at_once)

    def attend(*arguments):
        return windowed_attention_reference(*arguments, window=window)

    problem = _problem(*ROWS[number])
    _check(attend, _output_and_gradients(lambda *arguments: _direct(*arguments, window), problem), problem, alone=number == 3)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 3), (7, 1)])
def test_heads(monkeypatch, heads):
    monkeypatch.setattr(packed_attention, "BLOCK", 16)
    problem = _problem([[20, 30]], 50, *heads)
    _check(packed_attention_reference, _output_and_gradients(_direct, problem), problem)


@pytest.mark.parametrize(("dtype", "window"), [(jnp.bfloat16, None), (jnp.float32, 8)])
def test_a_sink_of_minus_1e30_is_a_softmax_without_sinks(monkeypatch, dtype, window):
    """Padding, also a whole row of it, gets finite results and gradients."""
    monkeypatch.setattr(packed_attention, "BLOCK", 16)
    q, k, v, segments, _, d_out = _problem([[20, 12], []], 40, 7, 1)
    options = {} if window is None else {"window": window}
    attend = packed_attention_reference if window is None else windowed_attention_reference

    def expected(q, k, v, segments, _):
        """Without a column for the sink; padding sees itself, so that no row is empty."""
        scores = jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0]) / np.sqrt(q.shape[-1])
        distance = np.arange(40)[:, None] - np.arange(40)
        seen = (segments[:, :, None] == segments[:, None]) & (distance >= 0) & (distance < (window or 40))
        return jnp.einsum("bnts,bsh->btnh", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1), v[:, :, 0])

    problem = (q, k, v, segments, jnp.full(7, -1e30, dtype), d_out)
    _check(functools.partial(attend, **options), _output_and_gradients(expected, problem), problem)
    out, pull = jax.vjp(lambda *x: attend(*x, segments, problem[4], **options), q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *pull(jnp.ones_like(out))))


def test_memory_is_not_quadratic_in_the_length():
    """For 4,096 tokens, both passes together take less than a quarter of one matrix of scores."""
    q, k, v, segments, sinks, d_out = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _problem([[4096]], 4096, 1, 1, 4))

    for attend in (packed_attention_reference, lambda *a: windowed_attention_reference(*a, window=128)):

        def loss(q, k, v, segments, sinks, d_out, attend=attend):
            return jnp.sum(attend(q, k, v, segments, sinks) * d_out)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, segments, sinks, d_out).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4096**2 * 4 / 4
