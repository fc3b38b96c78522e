"""MXFP4 for a TPU's vector units: outputs are along the lanes, and a shift and a mask unpack two weights of each word to bfloat16.

A word holds eight inputs of one output. Eight rows of words are 64 inputs: half h (the lower is 0) of pair k of row r is input
16 k + 2 r + h. So a pair of eight rows, read as bfloat16, is 16 consecutive inputs in order, and inputs of pairs 0 and 1 share one scale,
those of pairs 2 and 3 the next. `mxfp4_tiles.BITS` gives the bits of each pair, and that module's docstring the operations that move them
to bits 15 (sign), 8, 7 and 6 of each half.

A code is a nibble of the checkpoint, except that the codes of 0 and 0.5 are exchanged, and -0 has the code of 0. Then adding
(scale - 1) << 7 to the four bits gives the bfloat16 of the weight exactly, for all codes but that of 0, which the kernel replaces. Without
the exchange, 0.5 would need a subnormal number, and TPUs flush those to zero. With a code for -0, finding zeros would take one more vector
operation for each pair.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from discover_jax.exceptions import ConfigError
from discover_jax.kernels.mxfp4_tiles import BITS, BLOCK, check_range

INPUTS = 64
"""Inputs of eight rows of words."""
LANES = 128
MOST_PIECES = 3
"""Limit on the pieces of the inputs that a kernel reads one after another."""
LOWEST, HIGHEST = 2, 252
"""Scales for which every weight is a normal bfloat16: they represent weights between 2^-126 and 2^127."""
_NEGATIVE_ZERO = 8
PARTS = {"gate_up": 2, "down": 1}
"""Matrices whose rows alternate in one matrix of the checkpoint: gates and ups."""


class Lanes(NamedTuple):
    """A matrix that is laid out: its rows, its columns, and how many matrices its rows alternate between."""

    out: int
    into: int
    parts: int


def check_sizes(out: int, into: int, parts: int) -> None:
    """Checks that a matrix [out, in] can be laid out.

    Raises:
      ConfigError: the sizes are not divisible.
    """
    if into % INPUTS or out % parts:
        raise ConfigError(
            f"A matrix of {out} rows and {into} columns cannot be laid out for TPUs. Columns must be a multiple of {INPUTS}, and rows of"
            f" {parts}."
            " Use the reference kernel for such a model."
        )


def check_scales(scales: jax.Array) -> None:
    """Checks that the layout can hold these scales.

    Raises:
      ConfigError: a scale is not between LOWEST and HIGHEST.
    """
    check_range(scales, LOWEST, HIGHEST, "TPU kernels support")


def _pieces(into: int) -> int:
    return next(n for n in range(MOST_PIECES, 0, -1) if into // INPUTS % n == 0)


def words_shape(out: int, into: int, parts: int) -> tuple[int, ...]:
    """Shape of one expert's words, [parts, pieces, in/pieces/8, N], where N is out/parts, padded to LANES."""
    return parts, _pieces(into), into // _pieces(into) // 8, -(-out // parts // LANES) * LANES


def powers_shape(out: int, into: int, parts: int) -> tuple[int, ...]:
    """Shape of one expert's scales, [parts, pieces, s, N]: s is in/pieces/32, padded to a multiple of 32, the rows of a tile of bytes."""
    _, pieces, _, lanes = words_shape(out, into, parts)
    return parts, pieces, -(-into // pieces // BLOCK // 32) * 32, lanes


def _by_outputs(x_oi: jax.Array, parts: int, pieces: int) -> jax.Array:
    """[out, in, ...] to [parts, pieces, in/pieces, ..., N], padded with zeros."""
    out, into, *rest = x_oi.shape
    x = jnp.moveaxis(x_oi.reshape(out // parts, parts, pieces, into // pieces, *rest), 0, -1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def _exchange(nibbles: jax.Array) -> jax.Array:
    """The codes of 0 and 0.5, of either sign, exchanged. This is its own inverse."""
    return jnp.where(nibbles & 6, nibbles, nibbles ^ 1)


@functools.partial(jax.jit, static_argnames="parts")
def lay_out_blocks(blocks: jax.Array, parts: int) -> jax.Array:
    """The words of `blocks` uint8 [E, out, in/32, 16], for sizes that `check_sizes` allows: int32 [E, *words_shape].

    Args:
      blocks: see models.mxfp4.
      parts: see PARTS.
    """

    def one(packed: jax.Array) -> jax.Array:
        out, groups, _ = packed.shape
        nibbles = jnp.stack([packed & 0xF, packed >> 4], axis=-1).reshape(out, groups * BLOCK)
        nibbles = jnp.where(nibbles == _NEGATIVE_ZERO, jnp.zeros_like(nibbles), nibbles)
        codes = _by_outputs(_exchange(nibbles).astype(jnp.uint32), parts, _pieces(groups * BLOCK))
        codes = codes.reshape(*codes.shape[:2], -1, 4, 8, 2, codes.shape[-1])  # part, piece, 64 inputs, pair, row, half, output
        words = jnp.zeros((*codes.shape[:3], 8, codes.shape[-1]), jnp.uint32)
        for pair, places in enumerate(BITS):
            for half in range(2):
                for bit, place in enumerate(places):
                    words |= ((codes[:, :, :, pair, :, half] >> bit) & 1) << ((place + 16 * half) % 32)
        return jax.lax.bitcast_convert_type(words.reshape(words_shape(out, groups * BLOCK, parts)), jnp.int32)

    return jax.lax.map(one, blocks)


@functools.partial(jax.jit, static_argnames="parts")
def lay_out_scales(scales: jax.Array, parts: int) -> jax.Array:
    """The scales [E, out, in/32] in the order of the words: uint8 [E, *powers_shape]. Padding is 0."""

    def one(scales: jax.Array) -> jax.Array:
        out, groups = scales.shape
        shape = powers_shape(out, groups * BLOCK, parts)
        powers = _by_outputs(scales, parts, shape[1])
        return jnp.pad(powers, [(0, 0), (0, 0), (0, shape[2] - powers.shape[2]), (0, 0)])

    return jax.lax.map(one, scales)


def restore(lanes: jax.Array, powers: jax.Array, out: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of both: `blocks` and `scales` of [E, out, in], with 0 for -0. May be called inside jit, also on one expert's slice."""
    experts, parts, pieces, rows, _ = lanes.shape
    words = jax.lax.bitcast_convert_type(lanes, jnp.uint32)[..., : out // parts]
    words = words.reshape(experts, parts, pieces, rows // 8, 8, -1)
    pairs = [
        [sum((((words >> ((place + 16 * half) % 32)) & 1) << bit for bit, place in enumerate(places)), jnp.uint32(0)) for half in range(2)]
        for places in BITS
    ]
    codes = jnp.stack([jnp.stack(pair, axis=5) for pair in pairs], axis=4)  # E, part, piece, 64 inputs, pair, row, half, output
    nibbles = _exchange(codes).astype(jnp.uint8).reshape(experts, parts, pieces * rows * 8, -1).transpose(0, 3, 1, 2)
    nibbles = nibbles.reshape(experts, out, pieces * rows // 4, BLOCK // 2, 2)
    scales = powers[:, :, :, : rows // 4, : out // parts].transpose(0, 4, 1, 2, 3).reshape(experts, out, pieces * rows // 4)
    return nibbles[..., 0] | (nibbles[..., 1] << 4), scales
