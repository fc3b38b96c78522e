"""Routed rows sorted by expert, in blocks that each belong to one expert. Plain JAX, exact for any routing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
    """Routed rows sorted by expert, in blocks that each belong to one expert.

    Attributes:
      slots: int32 [R], for each sorted row its index t X + x among the tokens' choices. Choices of experts on other devices come
        last, in any order.
      blocks: int32 [3, most]: expert, first row and number of rows of each block; unused blocks have 0 rows.
    """

    slots: jax.Array
    blocks: jax.Array


def most_blocks(rows: int, experts: int, block: int) -> int:
    """Upper bound on blocks for `rows` routed rows: one partly filled block per expert with rows, plus one per `block` rows."""
    hit = min(rows, experts)
    return hit + (rows - hit) // block


def sort_rows(index_TX: jax.Array, experts: int, block: int) -> Blocks:
    """Stable counting sort by expert. It compares all pairs in a few small reductions, which is faster than a general sort.

    Args:
      index_TX: int32, the experts of each token; `experts` stands for an expert on another device.
      experts: number of experts on this device.
      block: rows per block.
    """
    index_R = index_TX.reshape(-1)
    rows = index_R.shape[0]
    keys_R = index_R * rows + jnp.arange(rows)
    if rows <= 2048:
        place_R = jnp.sum(keys_R[:, None] > keys_R[None, :], axis=1)
        slots = jnp.zeros(rows, jnp.int32).at[place_R].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    else:
        slots = jnp.argsort(index_R, stable=True).astype(jnp.int32)
    return Blocks(slots, cut_blocks(index_R, experts, block))


def cut_blocks(index_R: jax.Array, experts: int, block: int) -> jax.Array:
    """`Blocks.blocks` of choices in any order; arguments as for `sort_rows`."""
    numbers = jnp.arange(experts)
    first_E = jnp.sum(index_R[None, :] < numbers[:, None], axis=1)
    count_E = jnp.sum(index_R[None, :] == numbers[:, None], axis=1)
    needed_E = -(-count_E // block)
    end_E = jnp.sum(jnp.where(numbers[None, :] <= numbers[:, None], needed_E[None, :], 0), axis=1)
    block_b = jnp.arange(most_blocks(index_R.shape[0], experts, block))
    expert_b = jnp.minimum(jnp.sum(end_E[None, :] <= block_b[:, None], axis=1), experts - 1)
    before_b = (block_b - (end_E - needed_E)[expert_b]) * block
    rows_b = jnp.clip(count_E[expert_b] - before_b, 0, block)
    return jnp.stack([expert_b, first_E[expert_b] + before_b, rows_b]).astype(jnp.int32)
