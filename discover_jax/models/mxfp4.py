"""MXFP4: blocks of 32 four-bit floats that share a power-of-two scale (OCP Microscaling Formats specification; gpt-oss's checkpoints).

A packed matrix [..., out, in] consists of `blocks` uint8 [..., out, in/32, 16], with the even element in the low nibble, and `scales`
uint8 [..., out, in/32]: value = FP4[nibble] * 2^(scale - 127). Every such value is exact in bfloat16.
"""

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_MIDPOINTS = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
_BIAS = 127


def _power_of_two(exponents: jax.Array) -> jax.Array:
    """2^exponent in float32, exact for integers from -127 to 127; XLA's exp2 is off by one ulp on some CPUs.

    128, which E8M0 reserves for NaN, gives infinity.
    """
    exponents = exponents.astype(jnp.int32)
    bits = jnp.where(exponents > -_BIAS, (exponents + _BIAS) << 23, 1 << 22)  # 2^-127 is subnormal
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def dequantise(blocks: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """Converts blocks [..., out, in/32, 16] and scales [..., out, in/32] to [..., out, in]; exact in bfloat16 and float32."""
    nibbles = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = jnp.take(jnp.asarray(_FP4), nibbles.astype(jnp.int32), axis=0)
    scaled = values * _power_of_two(scales.astype(jnp.int32) - _BIAS)[..., None]
    return scaled.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK).astype(dtype)


def _round_to_scale(blocks: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of the nearest magnitudes at the scale 2^exponent, and their values. Ties round to the smaller magnitude."""
    scale = _power_of_two(exponent)
    index = jnp.searchsorted(jnp.asarray(_MIDPOINTS), jnp.abs(blocks) / scale)
    return index, jnp.sign(blocks) * jnp.asarray(_MAGNITUDES)[index] * scale


def _nearest_blocks(weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The closest representation of each block: blocks [..., out, in/32, 32], indices of magnitudes, values, and exponents.

    Two exponents are compared: the one that scales the block's largest magnitude into [4, 8), where 6 may clip it, and the next one, which
    clips nothing. The one with the smaller squared error is used.
    """
    blocks = weights.astype(jnp.float32).reshape(*weights.shape[:-1], -1, BLOCK)
    largest = jnp.abs(blocks).max(axis=-1, keepdims=True)
    # frexp's exponent is exact and is floor(log2) + 1.
    low = jnp.clip(jnp.frexp(largest)[1] - 3, -_BIAS, _BIAS - 1)
    (index_low, values_low), (index_high, values_high) = _round_to_scale(blocks, low), _round_to_scale(blocks, low + 1)
    error_low, error_high = (jnp.square(v - blocks).sum(axis=-1, keepdims=True) for v in (values_low, values_high))
    pick = error_high < error_low
    return blocks, jnp.where(pick, index_high, index_low), jnp.where(pick, values_high, values_low), jnp.where(pick, low + 1, low)


def quantise(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Converts [..., out, in] to `blocks` and `scales`; `in` must be a multiple of 32. Lossless for values that MXFP4 can represent."""
    blocks, index, _, exponent = _nearest_blocks(weights)
    nibbles = (index | jnp.where(blocks < 0, 8, 0)).astype(jnp.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), (exponent[..., 0] + _BIAS).astype(jnp.uint8)


def fake_quantise(weights: jax.Array) -> jax.Array:
    """`dequantise(*quantise(weights))`, with the gradient of the identity (straight-through)."""
    values = jax.lax.stop_gradient(_nearest_blocks(weights)[2].reshape(weights.shape).astype(weights.dtype))
    # weights - weights is exactly zero, so in this order the forward value equals the rounded one bit by bit.
    return values + (weights - jax.lax.stop_gradient(weights))
