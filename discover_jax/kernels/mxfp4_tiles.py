"""MXFP4 in tiles for the tensor cores: the bits are arranged so that a shift and a mask unpack a weight to bfloat16.

A tile holds ROWS x COLUMNS = 16 x 64 weights as 128 words of 32 bits, in the order in which the lanes of a warp hold the left operand of an
`mma.m16n8k16`. Lane (g, q) owns four words, for rows g and g + 8 of both blocks of 32 columns. Each word holds the eight weights
16 i + 4 q + (0..3), i = 0, 1, of its block. The eight weights form four pairs, one weight for each half of the word; BITS gives the bits of
each pair. In bfloat16 the four bits are the sign, the two lowest bits of the exponent and the highest of the mantissa (bits 15, 8, 7, 6).
This represents the value times 2^-126, exactly (0.5 becomes subnormal). So:

    pair 0: (w << 6) & M      pair 2: rotate_right(w, 4) & M            M = 0x81c081c0
    pair 1: (w << 2) & M      pair 3: (w & 0x81808180) | ((w >> 8) & 0x00400040)

Scales are bytes, one per 32 columns of a row, four to a word (rows g and g + 8, first and second block). A byte is the bfloat16 exponent
of the factor 2^(scale - 1 - SHIFT), which multiplies the unpacked pairs. Results are multiplied by 2^SHIFT at the end. The shift keeps
factors and products within the range of bfloat16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from discover_jax.exceptions import ConfigError

ROWS, COLUMNS = 16, 64
BLOCK = 32
SHIFT = 32
LOWEST, HIGHEST = 34, 160
"""Scales that tiles can hold: they represent weights between 2^-93 and 2^33 exactly."""

BITS = ((0, 1, 2, 9), (4, 5, 6, 13), (10, 11, 12, 19), (14, 7, 8, 15))
"""For each pair the bit positions of its lower weight in a word, from the mantissa to the sign. The upper weight's are 16 higher."""

_EXPONENT = 126 - SHIFT  # added to a scale: the exponent field of 2^(scale - 1 - SHIFT), which is scale - 1 - SHIFT + 127


class Slab(NamedTuple):
    """Layout of a matrix: rows stored together for each 64 columns, and whether its rows alternate between two matrices (gate, up)."""

    rows: int
    paired: bool


SLABS = {"gate_up": Slab(128, True), "down": Slab(64, False)}
"""The fastest for both of gpt-oss's matrices. Their widths are 64 times an odd number, so a slab can hold at most 64 outputs, and 64 gates
are next to their 64 ups."""


def check_sizes(out: int, into: int, slab: Slab) -> None:
    """Checks that a matrix [out, in] can be laid out.

    Raises:
      ConfigError: the sizes are not divisible by those of a slab.
    """
    if out % slab.rows or slab.rows % (2 * ROWS if slab.paired else ROWS) or into % COLUMNS:
        raise ConfigError(
            f"A matrix of {out} rows and {into} columns is not divisible into slabs of {slab.rows} x {COLUMNS}."
            " Use the reference kernel for such a model."
        )


def words_shape(out: int, into: int, slab: Slab) -> tuple[int, ...]:
    """Shape of one expert's words, [out/rows, in/64, rows/16, 128]. The last axis of the factors is 8 instead."""
    return out // slab.rows, into // COLUMNS, slab.rows // ROWS, 8 * ROWS


def _split_pairs(x_oi: jax.Array, slab: Slab) -> jax.Array:
    """Rows in the order of the tiles. If paired, the first half of each slab holds even rows, the second half the odd rows next to them."""
    if not slab.paired:
        return x_oi
    out = x_oi.shape[0]
    return x_oi.reshape(out // slab.rows, slab.rows // 2, 2, -1).swapaxes(1, 2).reshape(out, -1)


@functools.partial(jax.jit, static_argnames="slab")
def lay_out_blocks(blocks: jax.Array, slab: Slab) -> jax.Array:
    """The words of `lay_out`, for sizes that `check_sizes` allows."""

    def one(packed: jax.Array) -> jax.Array:
        out, groups, _ = packed.shape
        nibbles = _split_pairs(jnp.stack([packed & 0xF, packed >> 4], axis=-1).reshape(out, groups * BLOCK), slab)
        # rows: tile, m16, h, g; columns: k64, block, i, q, j, half
        nibbles = nibbles.reshape(out // slab.rows, slab.rows // ROWS, 2, 8, groups // 2, 2, 2, 4, 2, 2).astype(jnp.uint32)
        words = jnp.zeros((*nibbles.shape[:6], 4), jnp.uint32)
        for pair, places in enumerate(BITS):
            for half in range(2):
                weights = nibbles[..., pair // 2, :, pair % 2, half]
                for bit, place in enumerate(places):
                    words |= ((weights >> bit) & 1) << ((place + 16 * half) % 32)
        # tile m16 h g k64 block q -> tile k64 m16 g q block h
        words = words.transpose(0, 4, 1, 3, 6, 5, 2).reshape(words_shape(out, groups * BLOCK, slab))
        return jax.lax.bitcast_convert_type(words, jnp.int32)

    return jax.lax.map(one, blocks)


@functools.partial(jax.jit, static_argnames="slab")
def lay_out_scales(scales: jax.Array, slab: Slab) -> jax.Array:
    """The factors of `lay_out`, for scales that `check_scales` allows."""

    def one(scales: jax.Array) -> jax.Array:
        out, groups = scales.shape
        exponents = _split_pairs(scales, slab).astype(jnp.uint32) + _EXPONENT
        exponents = exponents.reshape(out // slab.rows, slab.rows // ROWS, 2, 8, groups // 2, 2)
        shifts = (8 * (2 * jnp.arange(2)[None, :] + jnp.arange(2)[:, None])).astype(jnp.uint32)  # [h, block]
        factors = jnp.sum(exponents << shifts[:, None, None, :], axis=(2, 5), dtype=jnp.uint32)  # tile m16 g k64
        return jax.lax.bitcast_convert_type(factors.transpose(0, 3, 1, 2), jnp.int32)

    return jax.lax.map(one, scales)


def check_scales(scales: jax.Array) -> None:
    """Checks that tiles can hold these scales.

    Raises:
      ConfigError: a scale is not between LOWEST and HIGHEST.
    """
    check_range(scales, LOWEST, HIGHEST, "tiles hold")


def check_range(scales: jax.Array, least: int, most: int, limit: str) -> None:
    """Checks that scales are within the range of a layout, which `limit` names in the message.

    Raises:
      ConfigError: a scale is not between `least` and `most`.
    """
    lowest, highest = int(scales.min()), int(scales.max())
    if lowest < least or highest > most:
        raise ConfigError(
            f"MXFP4 scales are between {lowest} and {highest}; {limit} {least} to {most} (2^{least - 127} to 2^{most - 127})."
            " Check the checkpoint, or use the reference kernel."
        )


def lay_out(blocks: jax.Array, scales: jax.Array, slab: Slab) -> tuple[jax.Array, jax.Array]:
    """Packs experts into tiles of the same total size; called once, when weights are loaded.

    Args:
      blocks, scales: uint8 [E, out, in/32, 16] and [E, out, in/32], see models.mxfp4.
      slab: its rows are a multiple of 16 (32 if paired) that divides `out`.

    Returns:
      words int32 [E, out/rows, in/64, rows/16, 128] and factors int32 [E, out/rows, in/64, rows/16, 8].

    Raises:
      ConfigError: the sizes are not divisible, or a scale is not between LOWEST and HIGHEST.
    """
    out, groups = scales.shape[-2:]
    check_sizes(out, groups * BLOCK, slab)
    check_scales(scales)
    return lay_out_blocks(blocks, slab), lay_out_scales(scales, slab)


def restore(words: jax.Array, factors: jax.Array, *, paired: bool = False) -> tuple[jax.Array, jax.Array]:
    """The exact inverse of `lay_out`: `blocks` and `scales` of [E, out, in]. May be called inside jit, also on one expert's slice."""
    experts, slabs, columns, m16, _ = words.shape
    words = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(experts, slabs, columns, m16, 8, 4, 2, 2)  # g q block h
    pairs = [
        [sum((((words >> ((place + 16 * half) % 32)) & 1) << bit for bit, place in enumerate(places)), jnp.uint32(0)) for half in range(2)]
        for places in BITS
    ]
    nibbles = jnp.stack([jnp.stack(pair, axis=-1) for pair in pairs], axis=-2).astype(jnp.uint8)
    nibbles = nibbles.reshape(*words.shape, 2, 2, 2)  # E slab k64 m16 g q block h i j half
    # to E slab m16 h g k64 block i q j half; the two weights of a pair share a byte, the lower nibble first
    nibbles = nibbles.transpose(0, 1, 3, 7, 4, 2, 6, 8, 5, 9, 10)
    blocks = nibbles[..., 0] | (nibbles[..., 1] << 4)
    rows = m16 * ROWS
    blocks = blocks.reshape(experts, slabs, rows, 2 * columns, BLOCK // 2)
    shifts = (8 * (2 * jnp.arange(2)[:, None] + jnp.arange(2)[None, :])).astype(jnp.uint32)  # [block, h]
    exponents = (jax.lax.bitcast_convert_type(factors, jnp.uint32)[..., None, None] >> shifts) & 0xFF  # E slab k64 m16 g block h
    scales = (exponents - _EXPONENT).astype(jnp.uint8).transpose(0, 1, 3, 6, 4, 2, 5).reshape(experts, slabs, rows, 2 * columns)
    if paired:
        blocks, scales = (x.reshape(experts, slabs, 2, rows // 2, *x.shape[3:]).swapaxes(2, 3) for x in (blocks, scales))
    return blocks.reshape(experts, slabs * rows, 2 * columns, BLOCK // 2), scales.reshape(experts, slabs * rows, 2 * columns)
