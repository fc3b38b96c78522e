"""MXFP4 against a slow implementation of the format's definition, and properties of quantisation."""

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.models import mxfp4

# Operation by operation, each would compile dozens of functions.
dequantise, quantise, fake_quantise = jax.jit(mxfp4.dequantise, static_argnums=2), jax.jit(mxfp4.quantise), jax.jit(mxfp4.fake_quantise)
_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def _slow(blocks, scales):
    """The definition, byte by byte: the low nibble comes first, bit 3 is the sign, and the value is multiplied by 2^(scale - 127)."""
    out = np.zeros((*scales.shape, 32))
    for index in np.ndindex(*scales.shape):
        for i, byte in enumerate(blocks[index]):
            for j, nibble in enumerate((byte & 15, byte >> 4)):
                value = _VALUES[nibble & 7] * (-1 if nibble & 8 else 1)
                out[(*index, 2 * i + j)] = value * 2.0 ** (int(scales[index]) - 127)
    return out.reshape(*scales.shape[:-1], -1)


def test_dequantise_follows_the_definition_and_bfloat16_is_exact():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 2, 16)).astype(np.uint8)
    scales = rng.integers(100, 150, (2, 3, 2)).astype(np.uint8)
    expected = _slow(blocks, scales)
    np.testing.assert_array_equal(dequantise(blocks, scales, jnp.float32), expected)
    np.testing.assert_array_equal(np.asarray(dequantise(blocks, scales, jnp.bfloat16), np.float64), expected)


def test_quantising_exact_values_is_lossless():
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (4, 5, 3, 16)).astype(np.uint8)
    blocks[..., 0] = (blocks[..., 0] & 0xF0) | 7  # a 6 in each block determines its scale
    scales = rng.integers(90, 160, (4, 5, 3)).astype(np.uint8)
    weights = dequantise(blocks, scales, jnp.float32)
    np.testing.assert_array_equal(dequantise(*quantise(weights), jnp.float32), weights)


def test_quantisation_error_is_at_most_that_of_the_usual_scale():
    weights = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    got = np.asarray(dequantise(*quantise(weights), jnp.float32))
    blocks = weights.reshape(8, 2, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2
    grid = np.array([s * v for v in _VALUES for s in (1, -1)])
    usual = grid[np.abs(blocks[..., None] / 2.0 ** exponent[..., None] - grid).argmin(-1)] * 2.0**exponent
    assert np.square(got - weights).sum() <= np.square(usual.reshape(8, 64) - weights).sum() + 1e-6
    assert np.square(got - weights).mean() < 0.02


def test_zeros_and_extremes():
    weights = np.stack([np.full(32, value, np.float32) for value in (0, 1e-40, 1e30)])
    restored = np.asarray(dequantise(*quantise(weights), jnp.float32))
    assert np.isfinite(restored).all()
    np.testing.assert_array_equal(restored[0], 0)
    np.testing.assert_allclose(restored[2], 1e30, rtol=0.25)


def test_fake_quantise_equals_the_round_trip_and_has_the_gradient_of_the_identity():
    weights = np.random.default_rng(3).normal(size=(3, 64)).astype(np.float32) * np.float32(0.037)
    np.testing.assert_array_equal(fake_quantise(weights), dequantise(*quantise(weights), jnp.float32))
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(fake_quantise(w) * jnp.arange(64))))(weights)
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.arange(64), (3, 64)))
