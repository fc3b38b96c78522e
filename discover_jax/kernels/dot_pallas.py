"""The product of Pallas kernels for TPUs."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0), batch: tuple[int, ...] = ()) -> jax.Array:
    """A product of matrices over these axes, with float32 sums. Inputs of float32 are not rounded to bfloat16.

    `batch`: axes of both arrays, with one product for each of their places.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = ((contract[:1], contract[1:]), (batch, batch))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
