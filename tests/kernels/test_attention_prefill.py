"""Attention over prompts: the windowed reference against an explicit softmax, the kernels in Triton's interpreter, and the fallback.

`test_paged_attention.py` has the reference for pages, and `test_compiling.py` compiles the kernels for each card.
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from triton_interpreter import needs_interpreter, results_of

from discover_jax.kernels.attention import prefill_attention_reference, prefill_windowed_attention_reference, ring_positions
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.kernel_set import kernel_set

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra `parity` or `kernels`)")
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
ROUNDING = {"float32": 1e-5, "bfloat16": 1.2e-2}


@pytest.mark.slow  # test_interpreted.py has a few of them
@needs_interpreter
def test_kernels_match_float64():
    errors = results_of("interpreted_prefill.py", "--all")[-1]
    assert len(errors) == 16
    for name, error in errors.items():
        assert error < ROUNDING["bfloat16" if "bfloat16" in name else "float32"], name  # false for NaN


@pytest.mark.parametrize(("length", "window"), [(0, 4), (3, 4), (4, 4), (9, 4), (5, 1)])
def test_a_ring_holds_the_last_positions(length, window):
    ring = [-1] * window
    for position in range(length):
        ring[position % window] = position
    found = np.asarray(ring_positions(jnp.array([length]), window))[0]
    np.testing.assert_array_equal(np.where(found < 0, -1, found), ring)


def _window_problem(lengths, chunk, window, heads, kv_heads, head_size=8, dtype=jnp.float32):
    """Queries of the chunk; rings, with NaN in unused places; keys and values of the chunk; and all keys and values of each row."""
    rng = np.random.default_rng(chunk)
    rings = np.full((2, len(lengths), kv_heads, window, head_size), np.nan)
    rows = [rng.normal(size=(2, length + chunk, kv_heads, head_size)) for length in lengths]
    for b, length in enumerate(lengths):
        for place in range(max(0, length - window), length):
            rings[:, b, :, place % window] = rows[b][:, place]
    chunks = np.stack([row[:, length:] for row, length in zip(rows, lengths, strict=True)], axis=1)
    q = 2 * rng.normal(size=(len(lengths), chunk, heads, head_size))
    arrays = [x.astype(dtype) for x in (q, *rings, *chunks)]
    return arrays, rows, np.array(lengths, np.int32), rng.normal(size=heads).astype(dtype)


@pytest.mark.parametrize(
    ("lengths", "chunk", "window", "heads", "kv_heads"),
    [((0, 5, 24), 7, 8, 6, 2), ((100,), 1, 16, 4, 4), ((3, 16, 17), 40, 16, 5, 1)],
)
def test_windowed_reference_matches_the_softmax(lengths, chunk, window, heads, kv_heads):
    (q, *keys_and_values), rows, lengths_B, sinks = _window_problem(lengths, chunk, window, heads, kv_heads)
    attend = jax.jit(prefill_windowed_attention_reference)
    got = np.asarray(attend(q, *keys_and_values, lengths_B, 0, sinks))
    for b, t, n in np.ndindex(len(lengths), chunk, heads):
        place = lengths[b] + t
        k, v = rows[b][:, max(0, place - window + 1) : place + 1, n // (heads // kv_heads)]
        weights = np.exp(k @ np.asarray(q[b, t, n], np.float64) * q.shape[3] ** -0.5)
        np.testing.assert_allclose(got[b, t, n], weights @ v / (weights.sum() + np.exp(float(sinks[n]))), atol=1e-5)
    # Any tokens of the chunk have the same results alone.
    for first, last in ((0, 1), (chunk // 2, chunk)):
        part = attend(q[:, first:last], *keys_and_values, lengths_B, first, sinks)
        np.testing.assert_allclose(part, got[:, first:last], atol=1e-6)


@needs_triton
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"page": 8}, "prefill_attention .* pages .* 8"),
        ({"head_size": 32}, "prefill_attention .* head size .* 32"),
        ({"dtype": jnp.float32}, "prefill_attention .* float32"),
        ({"window": 16, "head_size": 32}, "prefill_windowed_attention .* head size .* 32"),
        ({"window": 16, "dtype": jnp.float32}, "prefill_windowed_attention .* float32"),
    ],
)
def test_unsupported_shapes_use_the_reference_and_are_logged(monkeypatch, given, said):
    from discover_jax.kernels import attention_prefill

    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    warn_reference.cache_clear()
    shape = {"page": 16, "head_size": 64, "dtype": jnp.bfloat16, "window": 0} | given
    if shape["window"]:
        (q, *rest), _, lengths, sinks = _window_problem((9,), 4, 16, 4, 2, shape["head_size"], shape["dtype"])
        arguments = (q, *rest, lengths, 0, sinks)
        kernel, reference = attention_prefill.prefill_windowed_attention, prefill_windowed_attention_reference
    else:
        rng, sizes = np.random.default_rng(0), ((1, 4, 4), (1, 4, 2, shape["page"]), (1, 4, 2, shape["page"]))
        arrays = [rng.normal(size=(*size, shape["head_size"])).astype(shape["dtype"]) for size in sizes]
        arguments = (*arrays, np.int32(0), np.array([[2, 0]]), np.array([3]), np.zeros(4, shape["dtype"]))
        kernel, reference = attention_prefill.prefill_attention, prefill_attention_reference
    found = jax.jit(lambda *arguments: [function(*arguments) for function in (kernel, kernel, reference)])(*arguments)
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[2])
    (line,) = lines
    assert re.search(said, line)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "rows", "tokens", "places", "shares"),
    [
        (64, 8, 64, 1, 512, 20_000, 1),  # gpt-oss: 256 tiles
        (12, 2, 128, 1, 512, 20_000, 2),  # Qwen2.5 1.5B: 48 tiles
        (12, 2, 128, 1, 512, 512, 1),  # too short to split
        (64, 8, 64, 8, 8, 20_000, 4),  # eight rows of eight tokens
        (14, 2, 64, 1, 1, 200_000, 16),  # no more than the merging kernel reads at once
    ],
)
def test_a_context_is_split_only_to_fill_the_gpu(heads, kv_heads, head_size, rows, tokens, places, shares):
    from discover_jax.kernels.attention_prefill import choose_prefill

    assert choose_prefill(rows, tokens * heads // kv_heads, kv_heads, head_size, places).shares == shares


def test_kernels_lower_for_an_absent_gpu():
    pytest.importorskip("jax_triton", reason="needs the extra `kernels` and jax's plugin for CUDA", exc_type=ImportError)
    kernels = kernel_set("gpu")
    for heads, kv_heads, head_size, calls in ((64, 8, 64, 1), (12, 2, 128, 2)):  # the second merges shares of the context
        q = jnp.zeros((1, 512, heads, head_size), jnp.bfloat16)
        pool, ring = (jnp.zeros(shape, jnp.bfloat16) for shape in ((1, 8, kv_heads, 128, head_size), (1, kv_heads, 128, head_size)))
        new, lengths, sinks = jnp.zeros((1, 512, kv_heads, head_size), jnp.bfloat16), jnp.zeros(1, jnp.int32), jnp.zeros(heads)
        pages = jax.jit(kernels.prefill_attention).trace(q, pool, pool, jnp.int32(0), jnp.zeros((1, 8), jnp.int32), lengths, sinks)
        assert pages.lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call") == calls
        window = jax.jit(kernels.prefill_windowed_attention).trace(q, ring, ring, new, new, lengths, jnp.int32(0), sinks)
        assert window.lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call") == 1


@pytest.mark.accelerator
@on_gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page", "lengths", "tokens"),
    [
        (64, 8, 64, 128, [1024], 512),
        (64, 8, 64, 128, [0, 130, 4000], 8),
        (12, 2, 128, 128, [0], 512),
        (28, 4, 128, 48, [3000, 77], 61),
        (14, 2, 64, 16, [5000, 0, 15, 16], 1),
        (5, 1, 128, 256, [640, 255], 300),
    ],
)
def test_pages_match_the_float32_reference_on_a_gpu(heads, kv_heads, head_size, page, lengths, tokens):
    rng = np.random.default_rng(tokens)
    used = [-(-(length + tokens) // page) for length in lengths]
    table = np.full((len(lengths), max(used) + 2), 2**31 - 1, np.int32)
    for row, own in enumerate(np.split(rng.permutation(sum(used) + 2), np.cumsum(used))[:-1]):
        table[row, : used[row]] = own
    keys = jax.random.split(jax.random.key(0), 4)
    pools = [jax.random.normal(key, (2, sum(used) + 2, kv_heads, page, head_size), jnp.bfloat16) for key in keys[:2]]
    q = 2 * jax.random.normal(keys[2], (len(lengths), tokens, heads, head_size), jnp.bfloat16)
    sinks = jax.random.normal(keys[3], (heads,), jnp.bfloat16)
    rest = (jnp.int32(1), jnp.asarray(table), jnp.array(lengths, jnp.int32))
    attend = kernel_set("gpu").prefill_attention
    assert attend is not prefill_attention_reference
    got = jax.jit(attend)(q, *pools, *rest, sinks)
    with jax.default_matmul_precision("highest"):
        q, *pools, sinks = (x.astype(jnp.float32) for x in (q, *pools, sinks))
        expected = jax.jit(prefill_attention_reference)(q, *pools, *rest, sinks)
    assert float(jnp.abs(got.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()) < 6e-3


@pytest.mark.accelerator
@on_gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "window", "lengths", "chunk", "first"),
    [(64, 8, 64, 128, (1000,), 512, 0), (64, 8, 64, 128, (0, 127, 128, 129), 40, 8), (7, 1, 128, 100, (60, 101), 1, 0)],
)
def test_windows_match_the_float32_reference_on_a_gpu(heads, kv_heads, head_size, window, lengths, chunk, first):
    (q, *rest), _, lengths, sinks = _window_problem(lengths, chunk, window, heads, kv_heads, head_size, jnp.bfloat16)
    attend = kernel_set("gpu").prefill_windowed_attention
    assert attend is not prefill_windowed_attention_reference
    got = jax.jit(attend)(q[:, first:], *rest, lengths, first, sinks)
    with jax.default_matmul_precision("highest"):
        q, *rest, sinks = (x.astype(jnp.float32) for x in (q, *rest, sinks))
        expected = jax.jit(prefill_windowed_attention_reference)(q[:, first:], *rest, lengths, first, sinks)
    assert float(jnp.abs(got.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()) < 6e-3
