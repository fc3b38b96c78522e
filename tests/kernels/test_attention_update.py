"""The update's attention: in Triton's interpreter, its kernels match the reference's outputs and gradients for any packing."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_interpreter import needs_interpreter, results_of

from discover_jax.kernels.kernel_set import REFERENCE, kernel_set


@pytest.mark.slow  # run it after changing the kernels
@needs_interpreter
@pytest.mark.parametrize("options", [[], ["--all"]])
def test_interpreted_kernels_match_the_reference_gradients(options):
    found = results_of("interpreted_attention_update.py", *options)[-1]
    assert len(found) == (13 if options else 7)
    for case, errors in found.items():
        assert set(errors) == {"output", "q", "k", "v"}
        limit = 0.02 if case.startswith("bfloat16") else 1e-5
        assert all(error < limit for error in errors.values()), (case, errors)  # false for NaN
        assert max(errors.values()) > 0, case


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_last_query_that_sees_a_key():
    from discover_jax.kernels.attention_update import last_seeing

    first = np.array([[0, 0, 1, 3, 3, 5], [0, 1, 2, 3, 4, 5]], np.int32)
    seen = (np.arange(6)[:, None] >= first[..., None].swapaxes(1, 2)) & (np.arange(6)[:, None] <= np.arange(6))
    expected = [[max(q for q in range(6) if row[key, q]) for key in range(6)] for row in seen]
    np.testing.assert_array_equal(last_seeing(jnp.asarray(first)), expected)


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "sink"),
    [
        (64, 8, 64, None),
        *((*heads, -1e30) for heads in ((14, 2, 64), (12, 2, 128), (28, 4, 128), (32, 8, 128), (5, 1, 128), (3, 1, 64), (2, 2, 128))),
    ],
)
def test_kernels_are_as_accurate_as_the_reference_in_bfloat16(heads, kv_heads, size, sink, window):
    """Errors of outputs and gradients against float32. One row has segments and padding, one only padding."""
    operation, options = ("packed_attention", {}) if window is None else ("windowed_attention", {"window": window})
    attend, reference = getattr(kernel_set("gpu"), operation), getattr(REFERENCE, operation)
    assert attend is not reference
    keys = jax.random.split(jax.random.key(heads), 5)
    q, k, v, d_out = (
        jax.random.normal(key, (2, 1500, n, size), jnp.bfloat16) for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=False)
    )
    segments = np.zeros((2, 1500), np.int32)
    segments[0, :1390] = np.repeat([1, 2, 3, 4], [700, 1, 89, 600])
    real = jnp.asarray(segments > 0)[..., None, None]
    sinks = jax.random.normal(keys[4], (heads,), jnp.bfloat16) if sink is None else jnp.full(heads, sink, jnp.bfloat16)

    def passes(attend, dtype):
        @jax.jit
        def both(d_out, *inputs):
            out, pull = jax.vjp(lambda *x: attend(*x, segments, sinks, **options), *inputs)
            return out, *pull(d_out.astype(out.dtype))

        found = both(d_out * real, *(x.astype(dtype) for x in (q, k, v)))
        assert all(bool(jnp.isfinite(x).all()) for x in found)
        return [x.astype(jnp.float32) * real for x in found]

    with jax.default_matmul_precision("highest"):
        expected = passes(reference, jnp.float32)

    def errors(found):
        return [float(jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())) for x, y in zip(found, expected, strict=True)]

    for own, theirs in zip(errors(passes(attend, jnp.bfloat16)), errors(passes(reference, jnp.bfloat16)), strict=True):
        assert own < 1.5 * theirs
        assert own < 1e-2
