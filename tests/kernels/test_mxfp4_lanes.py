"""MXFP4 in the layout of TPU kernels, compared with the packed form's unpacking, and the kernels' unpacking of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.exceptions import ConfigError
from discover_jax.kernels import experts_decode_pallas, mxfp4_lanes
from discover_jax.kernels.mxfp4_lanes import HIGHEST, INPUTS, LOWEST, lay_out_blocks, lay_out_scales, powers_shape, restore, words_shape
from discover_jax.models.mxfp4 import dequantise

SIZES = [(192, 128, 2), (130, 192, 1), (96, 64, 2), (40, 320, 1)]
CASES = [*SIZES[:2], *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in SIZES[2:])]


def _packed(out, into):
    """Random codes, among them both zeros, at the extremes of the scales."""
    rng = np.random.default_rng(out)
    blocks, scales = rng.integers(0, 256, (2, out, into // 32, 16)), rng.integers(LOWEST, HIGHEST + 1, (2, out, into // 32))
    scales[:, :2] = [[LOWEST], [HIGHEST]]
    return blocks.astype(np.uint8), scales.astype(np.uint8)


@pytest.mark.parametrize(("out", "into", "parts"), CASES)
def test_restoring_returns_the_same_bytes_but_for_negative_zeros(out, into, parts):
    blocks, scales = _packed(out, into)
    lanes, powers = lay_out_blocks(blocks, parts), lay_out_scales(scales, parts)
    assert lanes.shape[1:] == words_shape(out, into, parts)
    assert powers.shape[1:] == powers_shape(out, into, parts)
    nibbles = [np.asarray(blocks) & 15, np.asarray(blocks) >> 4]
    assert all((nibble == 8).any() for nibble in nibbles)
    low, high = (np.where(nibble == 8, 0, nibble) for nibble in nibbles)
    for found, given in zip(jax.jit(restore, static_argnums=2)(lanes, powers, out), (low | high << 4, scales), strict=True):
        np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize(("out", "into", "parts"), CASES)
def test_the_kernels_unpack_every_weight_exactly(out, into, parts):
    blocks, scales = _packed(out, into)
    lanes, powers = lay_out_blocks(blocks, parts), lay_out_scales(scales, parts)
    exponents = (np.asarray(powers).astype(np.int32) - 1) << 7
    factors = exponents | (exponents << 16)
    unpack = jax.jit(jax.vmap(jax.vmap(jax.vmap(_unpack))))
    weights = np.asarray(unpack(lanes, factors), np.float32)  # E, part, piece, input, output
    weights = weights.reshape(*weights.shape[:2], into, -1)[..., : out // parts]
    expected = np.asarray(jax.jit(dequantise)(blocks, scales), np.float32).reshape(2, out // parts, parts, into)
    np.testing.assert_array_equal(weights, expected.transpose(0, 2, 3, 1))


def _unpack(words, factors):
    tiles = []
    for group in range(words.shape[0] * 8 // INPUTS):
        pair = (jnp.broadcast_to(factors[2 * group + i], (8, words.shape[1])) for i in range(2))
        tiles.append(experts_decode_pallas.unpack(words[8 * group : 8 * group + 8], *pair))
    return jnp.concatenate(tiles, axis=0)


def test_gpt_oss_takes_little_more_memory_than_packed():
    """Of the 2,880 outputs and inputs, padding to lanes and to tiles of bytes adds 2.6%."""
    for out, into, parts in ((5760, 2880, 2), (2880, 2880, 1)):
        held = 4 * np.prod(words_shape(out, into, parts)) + np.prod(powers_shape(out, into, parts))
        assert held < 1.028 * out * into * (1 / 2 + 1 / 32)


@pytest.mark.parametrize(("out", "into", "parts", "said"), [(64, 96, 1, "96"), (63, 64, 2, "63")])
def test_sizes_that_are_not_divisible_are_refused(out, into, parts, said):
    with pytest.raises(ConfigError, match=rf"\b{said}\b.*reference"):
        mxfp4_lanes.check_sizes(out, into, parts)


@pytest.mark.parametrize("scale", [LOWEST - 1, HIGHEST + 1])
def test_scales_that_need_other_exponents_are_refused(scale):
    with pytest.raises(ConfigError, match=rf"\b{scale}\b"):
        mxfp4_lanes.check_scales(jnp.array([120, scale], jnp.uint8))
