"""Tiles, compared with the unpacking of the packed form and, in numpy, with the bit formulas of the kernels."""

import jax
import numpy as np
import pytest

from discover_jax.exceptions import ConfigError
from discover_jax.kernels.mxfp4_tiles import HIGHEST, LOWEST, SHIFT, Slab, lay_out, restore, words_shape
from discover_jax.models.mxfp4 import dequantise

EXPERTS, OUT, INTO = 2, 192, 128


def _packed(low=LOWEST, high=HIGHEST, out=OUT, into=INTO):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (EXPERTS, out, into // 32, 16), dtype=np.uint8)
    return blocks, rng.integers(low, high + 1, (EXPERTS, out, into // 32), dtype=np.uint8)


def _unpacked(words, factors, paired):
    """[E, out, in] by shift and mask, lane by lane, as in the module's docstring."""
    words, factors = np.asarray(words).view(np.uint32), np.ascontiguousarray(factors).view(np.uint8)
    _, slabs, columns, m16, _ = words.shape
    out = np.zeros((EXPERTS, slabs * m16 * 16, columns * 64))
    mask = np.uint32(0x81C081C0)
    for e, slab, k64, m, lane in np.ndindex(EXPERTS, slabs, columns, m16, 32):
        g, q = divmod(lane, 4)
        for block, h in np.ndindex(2, 2):
            word = words[e, slab, k64, m, 4 * lane + 2 * block + h]
            pairs = [
                (word << np.uint32(6)) & mask,
                (word << np.uint32(2)) & mask,
                ((word >> np.uint32(4)) | (word << np.uint32(28))) & mask,
                (word & np.uint32(0x81808180)) | ((word >> np.uint32(8)) & np.uint32(0x00400040)),
            ]
            values = np.array([[p << np.uint32(16), p & np.uint32(0xFFFF0000)] for p in pairs], np.uint32).view(np.float32)
            exponent = int(factors[e, slab, k64, m, 4 * g + 2 * block + h]) - 127 + SHIFT
            row = m * 16 + 8 * h + g
            if paired:
                half = m16 * 8
                row = 2 * (row % half) + row // half
            for pair, number in np.ndindex(4, 2):
                column = 64 * k64 + 32 * block + 16 * (pair // 2) + 4 * q + 2 * (pair % 2) + number
                out[e, slab * m16 * 16 + row, column] = np.ldexp(np.float64(values[pair, number]), exponent)
    return out


@pytest.mark.parametrize(("rows", "paired"), [(64, False), (64, True), (96, True)])
def test_tiles_have_the_layout_that_the_kernels_read(rows, paired):
    blocks, scales = _packed()
    words, factors = lay_out(blocks, scales, Slab(rows, paired))
    assert words.shape == (EXPERTS, OUT // rows, INTO // 64, rows // 16, 128)
    assert words.shape[1:] == words_shape(OUT, INTO, Slab(rows, paired))
    assert words.nbytes + factors.nbytes == blocks.nbytes + scales.nbytes
    np.testing.assert_array_equal(_unpacked(words, factors, paired), np.asarray(jax.jit(dequantise)(blocks, scales), np.float32))


@pytest.mark.parametrize("paired", [False, True])
def test_restoring_returns_the_same_bytes(paired):
    packed = _packed()
    restoring = jax.jit(restore, static_argnames="paired")
    for restored, original in zip(restoring(*lay_out(*packed, Slab(64, paired)), paired=paired), packed, strict=True):
        np.testing.assert_array_equal(restored, original)


def test_indivisible_sizes_are_refused():
    with pytest.raises(ConfigError, match="192 rows and 96 columns"):
        lay_out(*_packed(into=96), Slab(64, False))
    with pytest.raises(ConfigError, match="slabs of 128 x 64"):
        lay_out(*_packed(), Slab(128, False))


@pytest.mark.parametrize("scales", [(LOWEST - 1, LOWEST - 1), (HIGHEST + 1, HIGHEST + 1)])
def test_invalid_scales_are_refused(scales):
    with pytest.raises(ConfigError, match=f"between {scales[0]} and {scales[0]}"):
        lay_out(*_packed(*scales), Slab(64, False))
