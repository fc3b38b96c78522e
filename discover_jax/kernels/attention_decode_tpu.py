"""Attention to cached keys in pages, on a TPU: one new token per row, or a chunk of a prompt.

It was compiled for TPUs and interpreted on a CPU. No TPU has run it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels import attention_decode_pallas
from discover_jax.kernels.attention import paged_attention_reference, prefill_attention_reference
from discover_jax.kernels.attention_decode_pallas import LANES, Pages, flipped
from discover_jax.kernels.fallback import attention_refusal, warn_reference

HEAD_SIZES = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float32)
GROUP_BYTES = 2 * 2**20
"""Keys and values of a group: so many that the start of a copy takes little of its time."""
BUFFERS, MOST_BUFFERS = 3, 8
TOKENS = 16
"""Consecutive tokens of a prompt that share what they read."""
MOST_SCORES = 2**19
"""Limit on the scores of a group and all heads."""


def choose_pages(columns: int, page_bytes: int, queries: int, places: int, tokens: int) -> Pages:
    """Pages of a group and buffers, for tables of so many columns.

    Args:
      page_bytes: keys and values of a page.
      queries: of a row and all heads.
      places: of a page.
      tokens: consecutive tokens of a row.
    """
    pages = max(1, min(columns, GROUP_BYTES // page_bytes, MOST_SCORES // (queries * places)))
    return Pages(pages, min(MOST_BUFFERS, max(BUFFERS, GROUP_BYTES // (pages * page_bytes))), tokens)


def pool_refusal(keys: jax.Array, values: jax.Array) -> str:
    """Why the kernels do not support these pools; empty if they do."""
    places, head_size = keys.shape[3:]
    least = LANES if flipped(head_size) else 16
    paged = f"pages have {places} tokens; the kernel supports multiples of {least}" if places % least else ""
    return attention_refusal("keys and values", (keys, values), DTYPES, HEAD_SIZES) or paged


def paged_attention(
    q_BNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array,
) -> jax.Array:
    """`paged_attention_reference` by the kernel. If it does not support the arguments, uses the reference and logs the reason once."""
    arguments = (q_BNH, keys_LPKsH, values_LPKsH, layer, pages_BM, counts_B, sinks_N)
    if reason := pool_refusal(keys_LPKsH, values_LPKsH):
        warn_reference("paged_attention", reason, "tpu")
        return paged_attention_reference(*arguments)
    return attend_pages(q_BNH[:, None], *arguments[1:5], counts_B - 1, sinks_N)[:, 0]


def prefill_attention(
    q_BTNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array,
) -> jax.Array:
    """`prefill_attention_reference` by the kernel. If it does not support the arguments, uses the reference and logs the reason once."""
    arguments = (q_BTNH, keys_LPKsH, values_LPKsH, layer, pages_BM, lengths_B, sinks_N)
    if reason := pool_refusal(keys_LPKsH, values_LPKsH):
        warn_reference("prefill_attention", reason, "tpu")
        return prefill_attention_reference(*arguments)
    return attend_pages(*arguments, tokens=TOKENS)


def attend_pages(
    q_BTNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array,
    *,
    tokens: int = 1,
    chosen: Pages | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`prefill_attention_reference` by the kernel. A row without keys, of length -1 and one token, gives 0.

    Args:
      q_BTNH, keys_LPKsH, values_LPKsH, layer, pages_BM, lengths_B, sinks_N: as for the reference.
      tokens: consecutive tokens of a row that share what they read.
      chosen: groups and buffers instead of `choose_pages`'s.
      interpret: as for `pallas_call`.
    """
    *_, kv_heads, places, head_size = keys_LPKsH.shape
    (batch, count, heads, _), columns = q_BTNH.shape, pages_BM.shape[1]
    tokens = min(tokens, count)
    rows, group = -(-count // tokens), heads // kv_heads
    queries = -(-group * tokens // 8) * 8
    q = jnp.pad(q_BTNH.astype(values_LPKsH.dtype), [(0, 0), (0, rows * tokens - count), (0, 0), (0, 0)])
    q = q.reshape(batch, rows, tokens, kv_heads, group, head_size).transpose(0, 1, 3, 4, 2, 5)
    q = q.reshape(batch * rows, kv_heads, group * tokens, head_size)
    q = jnp.pad(q, [(0, 0), (0, 0), (0, queries - group * tokens), (0, 0)])
    page_bytes = 2 * kv_heads * places * head_size * keys_LPKsH.dtype.itemsize
    settings = chosen or choose_pages(columns, page_bytes, kv_heads * queries, places, tokens)
    if flipped(head_size):  # XLA stores them in this order, so nothing is moved
        keys_LPKsH, values_LPKsH = keys_LPKsH.swapaxes(3, 4), values_LPKsH.swapaxes(3, 4)
    out = attention_decode_pallas.attend(
        q,
        keys_LPKsH,
        values_LPKsH,
        layer,
        pages_BM.astype(jnp.int32),
        lengths_B.astype(jnp.int32) + count,
        sinks_N[None],
        dataclasses.replace(settings, tokens=tokens, interpret=interpret),
        count=count,
    )
    out = out[:, :, : group * tokens].reshape(batch, rows, kv_heads, group, tokens, head_size).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, rows * tokens, heads, head_size)[:, :count]
