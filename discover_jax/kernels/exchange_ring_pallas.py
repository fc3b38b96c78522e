"""Pallas kernels for TPUs of the exchange around a ring: joining the visitors' halves, and adding a device's part to the sums.

Each is one pass over memory in blocks of rows. XLA expects its own operations at a quarter of the bandwidth, and would write zeros for the
next part in another pass.

Dimensions: s arrays, h tokens of a half, D width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.parts_pallas import VECTOR_MEMORY

ROWS = 128
"""Most rows of each half in a block. At gpt-oss's width, a block's arrays take 24 MiB of the vector memory, both buffers included."""


def _rows(half: int) -> int:
    return math.gcd(half, ROWS)


def _params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VECTOR_MEMORY)


def join(first_shD: jax.Array, second_shD: jax.Array, number: int, interpret: Any = False) -> jax.Array:
    """An array's tokens of both halves, [2 h, D]."""
    _, half, width = first_shD.shape
    rows = _rows(half)
    own = pl.BlockSpec((None, rows, width), lambda i: (number, i, 0))
    return pl.pallas_call(
        _join,
        grid=(half // rows,),
        in_specs=[own, own],
        out_specs=pl.BlockSpec((2, rows, width), lambda i: (0, i, 0)),
        out_shape=jax.ShapeDtypeStruct((2, half, width), first_shD.dtype),
        compiler_params=_params(),
        interpret=interpret,
        name="exchange_join",
    )(first_shD, second_shD).reshape(2 * half, width)


def _join(first: Any, second: Any, both: Any) -> None:
    both[0], both[1] = first[...], second[...]


def add(first_hD: jax.Array, second_hD: jax.Array, part_tD: jax.Array, interpret: Any = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums of both halves with the part added, in float32 and then rounded to the sums' dtype; and zeros, in place of the part."""
    half, width = first_hD.shape
    rows = _rows(half)
    one = pl.BlockSpec((rows, width), lambda i: (i, 0))
    both = pl.BlockSpec((2, rows, width), lambda i: (0, i, 0))
    *sums, zeros = pl.pallas_call(
        _add,
        grid=(half // rows,),
        in_specs=[one, one, both],
        out_specs=[one, one, both],
        out_shape=[first_hD, second_hD, jax.ShapeDtypeStruct((2, half, width), jnp.float32)],
        input_output_aliases={2: 2},
        compiler_params=_params(),
        interpret=interpret,
        name="exchange_add",
    )(first_hD, second_hD, part_tD.reshape(2, half, width))
    return sums[0], sums[1], zeros.reshape(part_tD.shape)


def _add(first: Any, second: Any, part: Any, first_out: Any, second_out: Any, zeros: Any) -> None:
    for number, (own, out) in enumerate(((first, first_out), (second, second_out))):
        out[...] = (own[...].astype(jnp.float32) + part[number]).astype(out.dtype)
    zeros[...] = jnp.zeros_like(zeros)
