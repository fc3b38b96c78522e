"""Several projections of the same rows by one layer of a stack: the plain-JAX reference."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias", "lora_a", "lora_b"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Stack:
    """One projection of every layer.

    Attributes:
      weight: [L, out, in].
      bias: [L, out], or None.
      lora_a, lora_b: the adapter, [L, rank, in] and [L, out, rank], or None.
    """

    weight: jax.Array
    bias: jax.Array | None = None
    lora_a: jax.Array | None = None
    lora_b: jax.Array | None = None


def project_reference(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float) -> list[jax.Array]:
    """y = x W^T + b + scale (x A^T) B^T of one layer, for each projection: float32 [T, out].

    Products take x's dtype and are summed in float32. The result of an adapter's first product is rounded to x's dtype.

    Args:
      x_Ti: rows.
      stacks: the projections.
      layer: int32 scalar, the index into the stacks.
      scale: the adapter's alpha / rank.
    """

    def product(x: jax.Array, weight_oi: jax.Array) -> jax.Array:
        return jnp.einsum("ti,oi->to", x, weight_oi.astype(x.dtype), preferred_element_type=jnp.float32)

    def one(stack: Stack) -> jax.Array:
        own = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), stack)
        y = product(x_Ti, own.weight)
        if own.bias is not None:
            y += own.bias.astype(jnp.float32)
        if own.lora_a is None:
            return y
        return y + product((scale * product(x_Ti, own.lora_a)).astype(x_Ti.dtype), own.lora_b)

    return [one(stack) for stack in stacks]


def head_reference(x_Ti: jax.Array, head: Stack, scale: float) -> jax.Array:
    """`project_reference` of the output head, given as a stack of one layer: the logits, float32 [T, V]."""
    return project_reference(x_Ti, [head], jnp.int32(0), scale)[0]


def parts_reference(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float) -> jax.Array:
    """`project_reference` for a caller that adds the parts of a kernel: float32 [1, T, all outputs]."""
    return jnp.concatenate(project_reference(x_Ti, stacks, layer, scale), axis=1)[None]
