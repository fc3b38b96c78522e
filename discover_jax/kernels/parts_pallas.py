"""Small parts that Pallas kernels for TPUs share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

VECTOR_MEMORY = 60 * 2**20
"""Bytes of a chip's vector memory that a kernel of the update may use. A v5p core and a TPU7x core have 64 MiB, a v6e 128 MiB."""


def scalar(number: jax.Array | int) -> jax.Array:
    """A number as a kernel prefetches it, int32 [1]."""
    return jnp.asarray(number, jnp.int32).reshape(1)


def whole(*shape: int) -> pl.BlockSpec:
    """A block that is the whole array in every step of the grid."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def line_of(stack_Ln: Any, line: Any) -> jax.Array:
    """In a kernel, one line of a small stack that is chosen at run time: float32 [1, n]. XLA would copy a layer's own line in each step."""
    own = lax.broadcasted_iota(jnp.int32, stack_Ln.shape, 0) == line
    return jnp.sum(jnp.where(own, stack_Ln[...].astype(jnp.float32), 0.0), axis=0, keepdims=True)
