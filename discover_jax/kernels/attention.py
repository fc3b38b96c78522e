"""Attention of new tokens to cached keys in pages and rings: the plain-JAX references, exact for any lengths."""

import jax
import jax.numpy as jnp
from jax import lax

PLACES = 512
"""Keys read per iteration, or one page if that is more. The loop ends at the longest row, so the cost follows the tokens in the cache."""

Softmax = tuple[jax.Array, jax.Array, jax.Array]
"""Running sums: the highest score so far and the sum of exponentials relative to it, both [B, K, R, 1], and the weighted sum of values
[B, K, R, H]; float32. R counts the queries of one key/value head."""


def add_block(sums: Softmax, q_BKRH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen_BRS: jax.Array) -> Softmax:
    """The sums after S more keys (online softmax; Milakov and Gimelshein, arXiv 1805.02867).

    Keys that no query of the row sees may hold anything, even NaN: pages are reused, and one row must not affect another. R may be 1 in
    `seen_BRS`.
    """
    highest, total, out_BKRH = sums
    scores = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32) * q_BKRH.shape[-1] ** -0.5
    scores = jnp.where(seen_BRS[:, None], scores, -jnp.inf)
    v_BKSH = jnp.where(seen_BRS.any(axis=1)[:, None, :, None], v_BKSH, 0)
    higher = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
    shrink, weights = jnp.exp(highest - higher), jnp.exp(scores - higher)
    out = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return higher, total * shrink + weights.sum(axis=-1, keepdims=True), out_BKRH * shrink + out


def prefill_attention_reference(
    q_BTNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array,
) -> jax.Array:
    """o_t = sum_j e^{l_tj} v_j / (sum_j e^{l_tj} + e^sink) over the positions j <= lengths + t of each row, l_tj = q_t k_j / sqrt(H).

    Summed in float32, starting with the sink. One compiled function serves all lengths; its loop ends at the longest row.

    Args:
      q_BTNH: queries of the tokens at positions `lengths + t`. Heads that share a key/value head are adjacent.
      keys_LPKsH, values_LPKsH: a stack of pools of pages of s tokens. They already contain the new tokens.
      layer: int32 scalar, the index into the stack.
      pages_BM: int32, entry j is the page of the row's positions j s to (j + 1) s - 1. Entries past the last position in use are ignored.
      lengths_B: int32, tokens of each row before the new ones. With the new ones there are at most M s.
      sinks_N: one finite logit per head. A large negative number such as -1e30 is a softmax without sinks.

    Returns:
      [B, T, N, H] in the dtype of the values.
    """
    _, pool, kv_heads, size, head_size = keys_LPKsH.shape
    batch, tokens, heads, _ = q_BTNH.shape
    groups = heads // kv_heads
    at_once = min(max(1, PLACES // size), pages_BM.shape[1])
    pages_BM = jnp.clip(jnp.pad(pages_BM, ((0, 0), (0, -pages_BM.shape[1] % at_once))), 0, pool - 1)
    q_BKRH, start = _start(q_BTNH, sinks_N, kv_heads)
    last_BR = jnp.tile(lengths_B[:, None] + jnp.arange(tokens), (1, groups))  # the last position that each of them sees

    def add(i: jax.Array | int, sums: Softmax) -> Softmax:
        pages_Bm = lax.dynamic_slice_in_dim(pages_BM, i * at_once, at_once, axis=1)
        k_BKSH, v_BKSH = (
            x[layer, pages_Bm].transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, head_size) for x in (keys_LPKsH, values_LPKsH)
        )
        places_S = i * at_once * size + jnp.arange(at_once * size)
        return add_block(sums, q_BKRH, k_BKSH, v_BKSH, places_S <= last_BR[:, :, None])

    blocks = pages_BM.shape[1] // at_once
    if blocks == 1:
        sums = add(0, start)
    else:
        in_use = -(-(lengths_B.max() + tokens) // (at_once * size))
        sums = lax.fori_loop(0, jnp.minimum(in_use, blocks), add, start)  # the padding of a chunk may exceed the row
    return _end(sums, q_BTNH.shape).astype(values_LPKsH.dtype)


def _start(q_BTNH: jax.Array, sinks_N: jax.Array, kv_heads: int) -> tuple[jax.Array, Softmax]:
    """The queries of each key/value head as the rows of one matrix, R = G T, and their sums before the first key: those of the sinks."""
    batch, tokens, heads, head_size = q_BTNH.shape
    groups = heads // kv_heads
    q_BKRH = q_BTNH.reshape(batch, tokens, kv_heads, groups, head_size).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_size)
    sinks_KR1 = jnp.repeat(sinks_N.astype(jnp.float32).reshape(kv_heads, groups), tokens, axis=1)[..., None]
    sinks_BKR1 = jnp.broadcast_to(sinks_KR1, (batch, *sinks_KR1.shape))
    return q_BKRH, (sinks_BKR1, jnp.ones_like(sinks_BKR1), jnp.zeros(q_BKRH.shape, jnp.float32))


def _end(sums: Softmax, shape: tuple[int, ...]) -> jax.Array:
    """The attention output of this shape [B, T, N, H]."""
    _, total, out_BKRH = sums
    batch, tokens, heads, head_size = shape
    kv_heads = out_BKRH.shape[1]
    out = (out_BKRH / total).reshape(batch, kv_heads, heads // kv_heads, tokens, head_size).transpose(0, 3, 1, 2, 4)
    return out.reshape(shape)


def ring_positions(lengths: jax.Array, window: int) -> jax.Array:
    """The position at each place of a ring that holds the last W of `lengths` tokens, [..., W]. Place p mod W has position p.

    Negative: the place is empty.
    """
    last = lengths[..., None] - 1
    return last - (last - jnp.arange(window)) % window


def prefill_windowed_attention_reference(
    q_BTNH: jax.Array,
    ring_k_BKWH: jax.Array,
    ring_v_BKWH: jax.Array,
    k_BCKH: jax.Array,
    v_BCKH: jax.Array,
    lengths_B: jax.Array,
    first: jax.Array | int,
    sinks_N: jax.Array,
) -> jax.Array:
    """`prefill_attention_reference` for sliding layers: token t sees the last W positions up to its own, lengths + first + t.

    Args:
      q_BTNH: queries of T consecutive tokens of a chunk.
      ring_k_BKWH, ring_v_BKWH: the last W positions before the chunk; see `ring_positions`.
      k_BCKH, v_BCKH: keys and values of the chunk's C tokens.
      lengths_B: int32, tokens of each row before the chunk.
      first: int32, the index of the first of the T tokens in the chunk.
      sinks_N: see `prefill_attention_reference`.

    Returns:
      [B, T, N, H] in the dtype of the values.
    """
    tokens, heads = q_BTNH.shape[1:3]
    kv_heads, window = ring_k_BKWH.shape[1:3]
    k_BKSH, v_BKSH = (
        jnp.concatenate([ring, x.transpose(0, 2, 1, 3)], axis=2) for ring, x in ((ring_k_BKWH, k_BCKH), (ring_v_BKWH, v_BCKH))
    )
    chunk_BC = lengths_B[:, None] + jnp.arange(k_BCKH.shape[1])
    places_BS = jnp.concatenate([ring_positions(lengths_B, window), chunk_BC], axis=1)
    distance_BTS = (lengths_B[:, None] + first + jnp.arange(tokens))[:, :, None] - places_BS[:, None]
    seen_BTS = (distance_BTS >= 0) & (distance_BTS < window) & (places_BS >= 0)[:, None]
    q_BKRH, start = _start(q_BTNH, sinks_N, kv_heads)
    sums = add_block(start, q_BKRH, k_BKSH, v_BKSH, jnp.tile(seen_BTS, (1, heads // kv_heads, 1)))
    return _end(sums, q_BTNH.shape).astype(v_BCKH.dtype)


def paged_attention_reference(
    q_BNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array,
) -> jax.Array:
    """The same for one token per row, [B, N, H]. It sees the first `counts_B` positions of its row, at most M s; 0 gives 0."""
    options = layer, pages_BM, counts_B - 1, sinks_N
    return prefill_attention_reference(q_BNH[:, None], keys_LPKsH, values_LPKsH, *options)[:, 0]
