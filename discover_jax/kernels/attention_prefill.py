"""Attention over prompts on a GPU: a chunk of new tokens per row attends to the row's pages, or to its ring and to the chunk. Needs the
extra `cuda`.

Keys and values are read in place, in tiles that each belong to one page. If there are too few tiles of queries to fill the GPU (few heads,
or few tokens), each row's context is split among kernel instances, and `attention_triton.merge` merges the shares exactly. Sums are
float32. The weights of the values and the result are rounded to bfloat16, as in the references.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from discover_jax.kernels import attention_prefill_triton, attention_triton
from discover_jax.kernels.attention import prefill_attention_reference, prefill_windowed_attention_reference
from discover_jax.kernels.attention_decode import pool_refusal, refusal
from discover_jax.kernels.attention_update import Launch, choose_tiling
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.triton_call import call_kernel, compute_capability, multiprocessors, power_of_two

MERGED = 16
"""Most parts of a row's context, and shares that the merging kernel reads at once."""
LEAST_PLACES = 512
"""Places of the longest possible row for each part, so that a part is longer than the cost of merging it."""


@dataclasses.dataclass(frozen=True)
class PrefillTiling:
    """Launch parameters of a kernel.

    Attributes:
      launch: queries (tokens times the heads of a key/value head) and keys per tile, iterations in flight, warps. The kernel uses fewer
        queries and warps for few tokens, and the largest number of keys up to this that divides the page.
      shares: parts of the context.
    """

    launch: Launch
    shares: int = 1


def choose_prefill(batch: int, queries: int, kv_heads: int, head_size: int, places: int) -> PrefillTiling:
    """The tiles for these shapes.

    They are those of the update's forward pass, which has the same loop. Others were not tried.

    Args:
      batch: number of rows.
      queries: of a row and a key/value head.
      kv_heads: number of key/value heads.
      head_size: of a head.
      places: of the longest possible row.
    """
    launch = choose_tiling(head_size, windowed=False, capability=compute_capability()).forward
    at_once = multiprocessors() * (2 if head_size == 64 else 1)  # instances that run at once: two on a multiprocessor with heads of 64
    tiles = batch * kv_heads * -(-queries // launch.queries)
    return PrefillTiling(launch, max(1, min(at_once // tiles, places // LEAST_PLACES, MERGED)))


def _fit(launch: Launch, queries: int) -> Launch:
    """The launch for this many queries: its tiles are no larger than they need, and each warp has at least 16 queries."""
    queries = min(launch.queries, max(16, power_of_two(queries)))
    return dataclasses.replace(launch, queries=queries, warps=min(launch.warps, queries // 16))


def _cuts(launch: Launch) -> dict[str, int]:
    return {"BM": launch.queries, "BN": launch.keys, "STAGES": launch.stages}


def attend_pages(
    q_BTNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array,
    *,
    chosen: PrefillTiling,
) -> jax.Array:
    """`prefill_attention_reference` by the kernel with these tiles. Needs pages of 16 n tokens and one of HEAD_SIZES."""
    _, pool, kv_heads, size, head_size = keys_LPKsH.shape
    (batch, tokens, heads, _), columns, shares = q_BTNH.shape, pages_BM.shape[1], chosen.shares
    group = heads // kv_heads
    launch = _fit(chosen.launch, tokens * group)
    sizes = {"POOL": pool, "K": kv_heads, "GROUP": group, "PAGE": size, "H": head_size, "SHARES": shares}
    if shares == 1:
        out = [jax.ShapeDtypeStruct(q_BTNH.shape, values_LPKsH.dtype), jax.ShapeDtypeStruct((1,), jnp.float32)]
    else:
        parts = (batch, tokens, shares, heads)
        out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*parts, head_size), parts)]
    result, lse = call_kernel(
        attention_prefill_triton.attend_chunk,
        *(q_BTNH.astype(values_LPKsH.dtype), keys_LPKsH, values_LPKsH, jnp.asarray(layer, jnp.int32), pages_BM, lengths_B, sinks_N),
        *(tokens, columns),
        out=out,
        grid=(-(-tokens * group // launch.queries), kv_heads, batch * shares),
        warps=launch.warps,
        stages=launch.stages,
        constants={**sizes, **_cuts(launch), "BN": math.gcd(size, launch.keys)},
    )
    if shares == 1:
        return result
    count = batch * tokens  # to the merging kernel, each token is a row
    spans = jnp.stack([jnp.arange(count) * shares, jnp.full(count, shares)]).astype(jnp.int32)
    return call_kernel(
        attention_triton.merge,
        *(result, lse, spans, sinks_N, jnp.asarray(layer, jnp.int32)),
        out=jax.ShapeDtypeStruct(q_BTNH.shape, values_LPKsH.dtype),
        grid=(heads, count),
        warps=1,
        stages=1,
        constants={"B": count, "N": heads, "H": head_size, "STEP": MERGED, "STACKED": False},
    )


def attend_window(
    q_BTNH: jax.Array,
    ring_k_BKWH: jax.Array,
    ring_v_BKWH: jax.Array,
    k_BCKH: jax.Array,
    v_BCKH: jax.Array,
    lengths_B: jax.Array,
    first: jax.Array | int,
    sinks_N: jax.Array,
    *,
    launch: Launch,
) -> jax.Array:
    """`prefill_windowed_attention_reference` by the kernel with this launch. Needs one of HEAD_SIZES."""
    (batch, tokens, heads, head_size), (kv_heads, window) = q_BTNH.shape, ring_k_BKWH.shape[1:3]
    group = heads // kv_heads
    launch = _fit(launch, tokens * group)
    return call_kernel(
        attention_prefill_triton.attend_window,
        *(q_BTNH.astype(v_BCKH.dtype), ring_k_BKWH, ring_v_BKWH, k_BCKH, v_BCKH, lengths_B, jnp.asarray(first, jnp.int32), sinks_N),
        *(tokens, k_BCKH.shape[1]),
        out=jax.ShapeDtypeStruct(q_BTNH.shape, v_BCKH.dtype),
        grid=(-(-tokens * group // launch.queries), kv_heads, batch),
        warps=launch.warps,
        stages=launch.stages,
        constants={"K": kv_heads, "GROUP": group, "W": window, "H": head_size, **_cuts(launch)},
    )


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
    (batch, tokens, heads, _), (kv_heads, size, head_size) = q_BTNH.shape, keys_LPKsH.shape[2:]
    arguments = (q_BTNH, keys_LPKsH, values_LPKsH, layer, pages_BM, lengths_B, sinks_N)
    if reason := pool_refusal(keys_LPKsH, values_LPKsH):
        warn_reference("prefill_attention", reason)
        return prefill_attention_reference(*arguments)
    chosen = choose_prefill(batch, tokens * heads // kv_heads, kv_heads, head_size, pages_BM.shape[1] * size)
    return attend_pages(*arguments, chosen=chosen)


def prefill_windowed_attention(
    q_BTNH: jax.Array,
    ring_k_BKWH: jax.Array,
    ring_v_BKWH: jax.Array,
    k_BCKH: jax.Array,
    v_BCKH: jax.Array,
    lengths_B: jax.Array,
    first: jax.Array | int,
    sinks_N: jax.Array,
) -> jax.Array:
    """`prefill_windowed_attention_reference` by the kernel. If it does not support the arguments, uses the reference and logs the reason
    once."""
    arguments = (q_BTNH, ring_k_BKWH, ring_v_BKWH, k_BCKH, v_BCKH, lengths_B, first, sinks_N)
    if reason := refusal(ring_k_BKWH, v_BCKH):
        warn_reference("prefill_windowed_attention", reason)
        return prefill_windowed_attention_reference(*arguments)
    launch = choose_tiling(q_BTNH.shape[3], windowed=True, capability=compute_capability()).forward
    return attend_window(*arguments, launch=launch)
