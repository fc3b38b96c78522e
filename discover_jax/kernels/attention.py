"""Attention of one new token a row to its cached keys: the plain-JAX reference, exact for any lengths."""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128
"""Places read at once. The loop over blocks ends at the longest row, so a cache costs what is in it, not what it could hold."""


def cached_attention_reference(
    q_BNH: jax.Array, keys_LBKSH: jax.Array, values_LBKSH: jax.Array, layer: jax.Array, counts_B: jax.Array, sinks_N: jax.Array
) -> jax.Array:
    """o = sum_j e^{l_j} v_j / (sum_j e^{l_j} + e^sink) over the first `counts_B` places of each row, l_j = q k_j / sqrt(H).

    The softmax is accumulated block by block (online softmax; Milakov and Gimelshein, arXiv 1805.02867), in float32, the sink being the
    first term. One compiled program serves all lengths.

    Args:
      q_BNH: queries, heads of one key/value head being neighbours.
      keys_LBKSH, values_LBKSH: a stack of caches.
      layer: int32 scalar, which of the stack.
      counts_B: int32, places in use, from the first; at least 1.
      sinks_N: one logit a head.

    Returns:
      [B, N, H] in the type of the values.
    """
    _, batch, kv_heads, capacity, size = keys_LBKSH.shape
    block = min(BLOCK, capacity)
    q_BKGH = q_BNH.reshape(batch, kv_heads, -1, size)
    sinks_BKG1 = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, kv_heads, -1, 1), (*q_BKGH.shape[:3], 1))

    def add(i: jax.Array | int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, total, out_BKGH = carry
        first = jnp.minimum(i * block, capacity - block)  # the last block may begin early, and then skips what was seen
        places_s = first + jnp.arange(block)
        seen_Bs = (places_s >= i * block) & (places_s < counts_B[:, None])
        k_BKsH, v_BKsH = (
            lax.dynamic_slice(x, (layer, 0, 0, first, 0), (1, batch, kv_heads, block, size))[0] for x in (keys_LBKSH, values_LBKSH)
        )
        scores = jnp.einsum("bkgh,bksh->bkgs", q_BKGH, k_BKsH, preferred_element_type=jnp.float32) * size**-0.5
        scores = jnp.where(seen_Bs[:, None, None], scores, -jnp.inf)
        higher = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        shrink, weights = jnp.exp(highest - higher), jnp.exp(scores - higher)
        out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(v_BKsH.dtype), v_BKsH, preferred_element_type=jnp.float32)
        return higher, total * shrink + weights.sum(axis=-1, keepdims=True), out_BKGH * shrink + out

    carry = (sinks_BKG1, jnp.ones_like(sinks_BKG1), jnp.zeros(q_BKGH.shape, jnp.float32))
    if block == capacity:
        _, total, out_BKGH = add(0, carry)
    else:
        _, total, out_BKGH = lax.fori_loop(0, -(-counts_B.max() // block), add, carry)
    return (out_BKGH / total).reshape(q_BNH.shape).astype(values_LBKSH.dtype)
