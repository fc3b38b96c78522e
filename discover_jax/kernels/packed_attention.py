"""Attention of whole packed rows, with derivatives: the plain-JAX references. Memory grows linearly with the row's length.

A row is a sequence of segments. A token sees itself and the earlier tokens of its own segment. Scores and sums are float32; exponentials
are rounded to the values' dtype before their product with the values, as in decoding (see kernels.attention).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

BLOCK = 512
"""Queries, and keys, per block of full attention."""
WINDOW_BLOCKS = 16
"""Blocks of queries that windowed attention computes at once."""
LEAST_WINDOW_BLOCK = 64
ATTENTION = "attention"
"""Name, in rematerialisation policies, of attention's output and of the residuals of its backward pass other than its inputs."""


def beginnings(segments_BT: jax.Array) -> jax.Array:
    """The position where each token's segment begins, int32 [B, T]."""
    places_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    begins_BT = segments_BT != jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return lax.cummax(jnp.where(begins_BT, places_T, 0), axis=1)


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Pads axis 1 with zeros at the end to a multiple."""
    return jnp.pad(x, [(0, -x.shape[1] % multiple if axis == 1 else 0) for axis in range(x.ndim)])


def _rows_of_heads(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G T, H]: the queries of one key/value head are the rows of one matrix."""
    batch, tokens, _, size = x_BTNH.shape
    return x_BTNH.reshape(batch, tokens, kv_heads, -1, size).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)


def _heads_of_rows(x_BKRH: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_rows_of_heads`."""
    batch, kv_heads, _, size = x_BKRH.shape
    return x_BKRH.reshape(batch, kv_heads, -1, tokens, size).transpose(0, 3, 1, 2, 4).reshape(batch, tokens, -1, size)


# ---------------------------------------------------------------------- sliding window


def windowed_attention_reference(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks_N: jax.Array, *, window: int
) -> jax.Array:
    """o_t = sum_s e^{l_ts} v_s / (sum_s e^{l_ts} + e^sink), t - window < s <= t of one segment, l_ts = q_t k_s / sqrt(H).

    Each block of queries sees its own keys and those of the block before. The backward pass recomputes the blocks.

    Args:
      q_BTNH: queries, heads that share a key/value head are adjacent.
      k_BTKH, v_BTKH: keys and values.
      segments_BT: int32; 0 is padding, whose outputs are undefined.
      sinks_N: one logit per head.
      window: maximum number of keys that a query sees, its own included.

    Returns:
      [B, T, N, H] in the dtype of the values.
    """
    batch, tokens, heads, size = q_BTNH.shape
    kv_heads, block = k_BTKH.shape[2], max(window, min(LEAST_WINDOW_BLOCK, tokens))
    at_once = min(WINDOW_BLOCKS, -(-tokens // block)) * block
    sinks_KG11 = sinks_N.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
    padded = [_padded(x, at_once) for x in (q_BTNH, k_BTKH, v_BTKH, segments_BT)]
    chunks = padded[0].shape[1] // at_once

    def with_block_before(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B, block + at_once, ...]."""
        x = jnp.pad(x, [(0, 0), (block, 0)] + [(0, 0)] * (x.ndim - 2))
        return jnp.stack([x[:, i * at_once : (i + 1) * at_once + block] for i in range(chunks)])

    def pairs(x: jax.Array) -> jax.Array:
        """[B, block + at_once, ...] -> [B, blocks, 2 block, ...]: each block after the one before."""
        blocks = x.reshape(batch, -1, block, *x.shape[2:])
        return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)

    @jax.checkpoint
    def one(chunk: tuple[jax.Array, ...]) -> jax.Array:
        q, segments_Bt, *with_before = chunk
        k_BnSKH, v_BnSKH, segments_BnS = map(pairs, with_before)
        q_BntKGH = q.reshape(batch, -1, block, kv_heads, heads // kv_heads, size)
        distance_tS = block + jnp.arange(block)[:, None] - jnp.arange(2 * block)
        seen_BntS = (segments_Bt.reshape(batch, -1, block, 1) == segments_BnS[:, :, None]) & (segments_BnS[:, :, None] > 0)
        seen_BntS &= (distance_tS >= 0) & (distance_tS < window)
        scores = jnp.einsum("bntkgh,bnskh->bnkgts", q_BntKGH, k_BnSKH, preferred_element_type=jnp.float32) * size**-0.5
        scores = jnp.where(seen_BntS[:, :, None, None], scores, -jnp.inf)
        highest = lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks_KG11))
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks_KG11 - highest)
        out = jnp.einsum("bnkgts,bnskh->bnkgth", weights.astype(v_BnSKH.dtype), v_BnSKH, preferred_element_type=jnp.float32) / total
        return out.transpose(0, 1, 4, 2, 3, 5).reshape(batch, at_once, heads, size).astype(v_BnSKH.dtype)

    q, k, v, segments = padded
    own = [jnp.moveaxis(x.reshape(batch, chunks, at_once, *x.shape[2:]), 1, 0) for x in (q, segments)]
    out = lax.map(one, (*own, *map(with_block_before, (k, v, segments))))
    return checkpoint_name(jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, size)[:, :tokens], ATTENTION)


# ---------------------------------------------------------------------- full attention


def packed_attention_reference(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks_N: jax.Array
) -> jax.Array:
    """The same without a window. Skips blocks of keys that no query of a block sees. Sinks get no gradient.

    Forward: an online softmax over blocks of keys, starting with the sink (Milakov and Gimelshein, arXiv 1805.02867). Backward: recomputes
    the probabilities from the saved log-sum-exp (Dao et al., arXiv 2205.14135), which includes the sink, so they are exact.
    """
    tokens = q_BTNH.shape[1]
    block = min(BLOCK, tokens)
    q, k, v, segments = (_padded(x, block) for x in (q_BTNH, k_BTKH, v_BTKH, segments_BT))
    out: jax.Array = _packed(q, k, v, segments, lax.stop_gradient(sinks_N.astype(jnp.float32)), block)
    return out[:, :tokens]


def _reach(segments_BT: jax.Array, block: int) -> jax.Array:
    """For each block of queries the first block of keys that any of them sees, over all rows: int32 [T / block].

    That block contains the start of the segment of the query block's first token, since later tokens' segments begin later.
    """
    return beginnings(segments_BT)[:, ::block].min(axis=0) // block


def _slice(x: jax.Array, index: jax.Array | int, block: int, axis: int = 1) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _scores(q_BKRH: jax.Array, k_BSKH: jax.Array, segments_BT: jax.Array, i: jax.Array, j: jax.Array, block: int) -> jax.Array:
    """[B, K, R, S], the scores of block i's queries and block j's keys, -inf where unseen."""
    k_BKSH = k_BSKH.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32) * q_BKRH.shape[-1] ** -0.5
    mine_Bt, theirs_BS = _slice(segments_BT, i, block), _slice(segments_BT, j, block)
    places = jnp.arange(block)
    seen_BtS = (mine_Bt[:, :, None] == theirs_BS[:, None]) & (theirs_BS > 0)[:, None] & (i * block + places[:, None] >= j * block + places)
    return jnp.where(jnp.tile(seen_BtS, (1, q_BKRH.shape[2] // block, 1))[:, None], scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _packed(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, segments_BT: Any, sinks_N: Any, block: int) -> jax.Array:
    return _packed_forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, block)[0]


def _packed_forward(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, segments_BT: Any, sinks_N: Any, block: int) -> tuple[jax.Array, tuple]:
    batch, tokens, heads, size = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    first_I = _reach(segments_BT, block)
    sinks_KR1 = jnp.repeat(sinks_N.reshape(kv_heads, -1), block, axis=1)[..., None]
    start_BKR1 = jnp.broadcast_to(sinks_KR1, (batch, *sinks_KR1.shape))

    def of_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BKRH = _rows_of_heads(_slice(q_BTNH, i, block), kv_heads)

        def add(j: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            highest, total, out_BKRH = sums
            scores = _scores(q_BKRH, _slice(k_BTKH, j, block), segments_BT, i, j, block)
            v_BSKH = _slice(v_BTKH, j, block)
            higher = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            shrink, weights = jnp.exp(highest - higher), jnp.exp(scores - higher)
            out = jnp.einsum("bkrs,bskh->bkrh", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
            return higher, total * shrink + weights.sum(axis=-1, keepdims=True), out_BKRH * shrink + out

        sums = (start_BKR1, jnp.ones_like(start_BKR1), jnp.zeros(q_BKRH.shape, jnp.float32))
        highest, total, out_BKRH = lax.fori_loop(first_I[i], i + 1, add, sums)
        return _heads_of_rows((out_BKRH / total).astype(v_BTKH.dtype), block), highest + jnp.log(total)

    out_IBtNH, lse_IBKR1 = lax.map(of_block, jnp.arange(tokens // block))
    out_BTNH = checkpoint_name(jnp.moveaxis(out_IBtNH, 0, 1).reshape(batch, tokens, heads, size), ATTENTION)
    lse_IBKR1 = checkpoint_name(lse_IBKR1, ATTENTION)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, lse_IBKR1)


def _packed_backward(block: int, kept: tuple, d_out_BTNH: jax.Array) -> tuple:
    q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, lse_IBKR1 = kept
    tokens, size = q_BTNH.shape[1], q_BTNH.shape[3]
    kv_heads, dtype = k_BTKH.shape[2], q_BTNH.dtype
    first_I = _reach(segments_BT, block)

    def add_to(total_BTKH: jax.Array, j: jax.Array, new_BSKH: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(total_BTKH, _slice(total_BTKH, j, block) + new_BSKH, j * block, 1)

    def of_block(sums: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q_BKRH, out_BKRH, d_out_BKRH = (_rows_of_heads(_slice(x, i, block), kv_heads) for x in (q_BTNH, out_BTNH, d_out_BTNH))
        delta_BKR1 = jnp.sum(out_BKRH.astype(jnp.float32) * d_out_BKRH.astype(jnp.float32), axis=-1, keepdims=True)

        def add(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            dq_BKRH, dk_BTKH, dv_BTKH = carry
            k_BSKH, v_BSKH = _slice(k_BTKH, j, block), _slice(v_BTKH, j, block)
            p_BKRS = jnp.exp(_scores(q_BKRH, k_BSKH, segments_BT, i, j, block) - lse_IBKR1[i])
            dp_BKRS = jnp.einsum("bkrh,bskh->bkrs", d_out_BKRH, v_BSKH, preferred_element_type=jnp.float32)
            ds_BKRS = (p_BKRS * (dp_BKRS - delta_BKR1) * size**-0.5).astype(dtype)
            dv_BSKH = jnp.einsum("bkrs,bkrh->bskh", p_BKRS.astype(dtype), d_out_BKRH, preferred_element_type=jnp.float32)
            dk_BSKH = jnp.einsum("bkrs,bkrh->bskh", ds_BKRS, q_BKRH, preferred_element_type=jnp.float32)
            dq_BKRH += jnp.einsum("bkrs,bskh->bkrh", ds_BKRS, k_BSKH, preferred_element_type=jnp.float32)
            return dq_BKRH, add_to(dk_BTKH, j, dk_BSKH), add_to(dv_BTKH, j, dv_BSKH)

        start = (jnp.zeros(q_BKRH.shape, jnp.float32), *sums)
        dq_BKRH, dk_BTKH, dv_BTKH = lax.fori_loop(first_I[i], i + 1, add, start)
        return (dk_BTKH, dv_BTKH), _heads_of_rows(dq_BKRH.astype(dtype), block)

    zeros = jnp.zeros(k_BTKH.shape, jnp.float32)
    (dk_BTKH, dv_BTKH), dq_IBtNH = lax.scan(of_block, (zeros, zeros), jnp.arange(tokens // block))
    dq_BTNH = jnp.moveaxis(dq_IBtNH, 0, 1).reshape(q_BTNH.shape)
    return dq_BTNH, dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None, None


_packed.defvjp(_packed_forward, _packed_backward)
