"""The kernels of paged attention: in Triton's interpreter, on a GPU against float32, and the fallback to the reference."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from triton_interpreter import needs_interpreter, results_of

from discover_jax.kernels.attention import paged_attention_reference
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.kernel_set import kernel_set

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

LAYERS = 3
DENSE = [
    {"counts": counts, "heads": heads, "kv_heads": kv_heads, "head_size": size, "sink": -1e30}
    for heads, kv_heads, size in ((14, 2, 64), (12, 2, 128), (28, 4, 128), (32, 8, 128), (5, 1, 128), (3, 1, 64), (4, 4, 128))
    for counts in ([2048, 700, 33, 1, 0, 129, 5000], [128, 0, 1, 77])
]
"""Heads of dense models (Qwen2.5 0.5B, 1.5B and 7B, Llama 3.1 8B) and other groups, without sinks, with empty rows."""


@pytest.fixture(scope="module", params=[[], ["--all"]])
def errors(request):
    return results_of("interpreted_attention.py", *request.param)[-1]


@needs_interpreter
@pytest.mark.slow
def test_kernels_are_accurate_to_bfloat16_rounding(errors):
    assert len(errors) in (4, 11)
    for name, error in errors.items():
        assert error < 1.2e-2, name  # false for NaN, from an unused place that was read or an output that was not written


def _problem(counts, page=128, heads=64, kv_heads=8, head_size=64, spare=1, dtype=jnp.bfloat16, sink=None):
    """Pools with NaN in unused places, and a table whose unused entries are not valid pages. `sink`: all sinks; None for random ones."""
    rng = np.random.default_rng(len(counts))
    used = -(-np.array(counts) // page)
    pages = np.full((len(counts), used.max() + spare), 2**31 - 1, np.int32)
    seen = np.zeros((used.sum() + 2, page), bool)
    for row, own in enumerate(np.split(rng.permutation(used.sum() + 2), np.cumsum(used))[:-1]):
        pages[row, : used[row]] = own
        seen[own] = (np.arange(used[row] * page) < counts[row]).reshape(-1, page)
    pools = (rng.standard_normal((LAYERS, len(seen), kv_heads, page, head_size), np.float32) for _ in range(2))
    pools = (np.where(seen[None, :, None, :, None], pool, np.float32(np.nan)) for pool in pools)
    q = 3 * rng.standard_normal((len(counts), heads, head_size), np.float32)
    sinks = rng.standard_normal(heads, np.float32) if sink is None else np.full(heads, sink, np.float32)
    q, keys, values, sinks = (jnp.asarray(x.astype(dtype)) for x in (q, *pools, sinks))
    return q, keys, values, jnp.asarray(pages), jnp.array(counts, jnp.int32), sinks


def _float32(problem):
    return [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in problem]


def _attend(attend, problem, layer):
    q, keys, values, *rest = problem
    return jax.jit(attend)(q, keys, values, jnp.int32(layer), *rest)


def _relative(got, expected):
    return float(jnp.abs(got.astype(jnp.float32) - expected).max() / jnp.abs(expected).max())


@pytest.mark.accelerator
@on_gpu
@pytest.mark.parametrize(
    "problem",
    [
        {"counts": [128, 1, 77, 127, 64, 65], "spare": 0},
        {"counts": [1]},
        {"counts": [8192]},
        {"counts": [26000, *(range(1, 1200, 50))]},
        {"counts": list(range(1, 4000, 31)), "spare": 40},
        {"counts": [700, 33, 1], "page": 16, "heads": 8, "kv_heads": 8},
        {"counts": [700, 33, 1], "page": 48, "heads": 32, "kv_heads": 1},
        {"counts": [1000, 2, 300], "page": 256, "heads": 4, "kv_heads": 2, "head_size": 128},
        *DENSE,
    ],
    ids=str,
)
def test_any_lengths_match_the_float32_reference(problem):
    problem = _problem(**problem)
    attend = kernel_set("gpu").paged_attention
    assert attend is not paged_attention_reference
    with jax.default_matmul_precision("highest"):
        expected = _attend(paged_attention_reference, _float32(problem), 2)
    got = _attend(attend, problem, 2)
    assert got.dtype == jnp.bfloat16
    assert _relative(got, expected) < 6e-3


@pytest.mark.accelerator
@on_gpu
def test_scan_reads_each_layer_in_place():
    q, *rest = _problem([300, 1, 129, 2000])

    def layers(attend, q, keys, values, pages, counts, sinks):
        def layer(q, i):
            return attend(q, keys, values, i, pages, counts, sinks).astype(q.dtype), None

        return jax.jit(lambda q: jax.lax.scan(layer, q, jnp.arange(LAYERS))[0])(q)

    with jax.default_matmul_precision("highest"):
        expected = layers(paged_attention_reference, *_float32((q, *rest)))
    assert _relative(layers(kernel_set("gpu").paged_attention, q, *rest), expected) < 2e-2


def test_kernels_lower_for_an_absent_gpu():
    pytest.importorskip("jax_triton", reason="needs the extra `kernels` and jax's plugin for CUDA", exc_type=ImportError)
    for heads, (counts, calls) in itertools.product(({}, DENSE[2]), (([128, 5], 1), ([600, 1], 2))):
        q, keys, values, *rest = _problem(**heads | {"counts": counts, "spare": 0})
        traced = jax.jit(kernel_set("gpu").paged_attention).trace(q, keys, values, jnp.int32(0), *rest)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call") == calls


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"page": 8}, "pages .* 8"),
        ({"head_size": 32}, "head size .* 32"),
        ({"dtype": jnp.float32}, "float32"),
    ],
)
def test_unsupported_shapes_use_the_reference_and_are_logged(logged, given, said):
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    from discover_jax.kernels import attention_decode

    warn_reference.cache_clear()
    q, keys, values, *rest = _problem([20, 3], heads=4, kv_heads=2, **given)
    functions = (attention_decode.paged_attention, attention_decode.paged_attention, paged_attention_reference)
    found = jax.jit(lambda *arguments: [function(*arguments) for function in functions])(q, keys, values, jnp.int32(1), *rest)
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[2])
    (line,) = logged
    assert re.search(f"paged_attention .* {said}", line)
