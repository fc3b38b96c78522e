"""Decoding attention on a GPU: one new token per row attends to the row's pages. Needs the extra `cuda`.

The first kernel splits each row's context among kernel instances. It computes the splits from the rows' lengths and gives each instance an
equal share of all rows' blocks. So one long row among short ones leaves no processor idle, and one compiled function serves all lengths. A
second, small kernel merges the shares exactly. Rows of at most one page (the rings of sliding layers) are neither split nor merged. Sums
are float32. Queries, the weights of the values, and the result are rounded to bfloat16, as in the reference.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels import attention_triton
from discover_jax.kernels.attention import paged_attention_reference
from discover_jax.kernels.fallback import attention_refusal, warn_reference
from discover_jax.kernels.triton_call import call_kernel

HEAD_SIZES = (64, 128)

_PROCESSORS = 132
"""Number of multiprocessors to assume without a GPU: that of an H200."""


@dataclasses.dataclass(frozen=True)
class PagedTiling:
    """Tile sizes and launch parameters of the kernel.

    Attributes:
      block: positions per iteration. The kernel uses the largest power of two up to this that divides the page.
      warps, stages: warps per kernel instance, and its iterations in flight.
      resident: kernel instances that a multiprocessor should run at once.
      waves: limit on the number of instances, as a multiple of those that run at once.
      least: minimum number of blocks per share, unless that leaves processors idle.
    """

    block: int
    warps: int
    stages: int
    resident: int = 4
    waves: int = 4
    least: int = 8


def choose_tiling(columns: int, head_size: int) -> PagedTiling:
    """The tiles for rows of at most this many pages. They fit the shared memory of every card in `triton_call.SHARED_KIB`.

    For heads of 64 they are the fastest measured on an H200 at gpt-oss's heads (benchmarks/kernels_decode.py).
    """
    if columns == 1:
        return PagedTiling(128, 2, 1) if head_size == 64 else PagedTiling(64, 2, 1)
    return PagedTiling(64, 1, 2)


def _processors() -> int:
    return getattr(jax.local_devices()[0], "core_count", _PROCESSORS) if jax.default_backend() == "gpu" else _PROCESSORS


def attend_pages(
    q_BNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array,
    *,
    chosen: PagedTiling,
) -> jax.Array:
    """`paged_attention_reference` by the kernels with these tiles. Needs bfloat16 pools, pages of 16 n tokens, and one of HEAD_SIZES.

    `sinks_N` may be those of all layers, [L, N].
    """
    _, pool, kv_heads, size, head_size = keys_LPKsH.shape
    (batch, heads, _), columns = q_BNH.shape, pages_BM.shape[1]
    block = math.gcd(size, chosen.block)
    slots = -(-_processors() * chosen.resident // kv_heads)
    most = slots * chosen.waves
    sizes = {"B": batch, "M": columns, "POOL": pool, "K": kv_heads, "GROUP": heads // kv_heads, "PAGE": size, "H": head_size}
    cuts = {"BLOCK": block, "STAGES": chosen.stages, "WHOLE": columns == 1, "SLOTS": slots, "MOST": most, "LEAST": chosen.least}
    layer, stacked = jnp.asarray(layer, jnp.int32), {"STACKED": sinks_N.ndim == 2}
    arguments = (q_BNH.astype(jnp.bfloat16), keys_LPKsH, values_LPKsH, layer, pages_BM, counts_B, sinks_N)
    options: dict[str, Any] = {"warps": chosen.warps, "stages": chosen.stages, "constants": {**sizes, **cuts, **stacked}}
    result = jax.ShapeDtypeStruct(q_BNH.shape, jnp.bfloat16)
    unused, spans = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((2, batch), jnp.int32)
    if columns == 1:
        return call_kernel(attention_triton.attend, *arguments, out=[result, unused, spans], grid=(kv_heads, batch), **options)[0]
    shares = min(most + batch, batch * columns * (size // block))
    parts, lse = (jax.ShapeDtypeStruct((shares, heads, *rest), jnp.float32) for rest in ((head_size,), ()))
    merged = call_kernel(attention_triton.attend, *arguments, out=[parts, lse, spans], grid=(kv_heads, shares), **options)
    return call_kernel(
        attention_triton.merge,
        *(*merged, sinks_N, layer),
        out=result,
        grid=(heads, batch),
        warps=1,
        stages=1,
        constants={"B": batch, "N": heads, "H": head_size, "STEP": 16, **stacked},
    )


def refusal(keys: jax.Array, values: jax.Array) -> str:
    """Why the kernels do not support these keys and values [..., H]; empty if they do."""
    return attention_refusal("keys and values", (keys, values), (jnp.bfloat16,), HEAD_SIZES)


def pool_refusal(keys_LPKsH: jax.Array, values_LPKsH: jax.Array) -> str:
    """Why the kernels do not support this pool; empty if they do."""
    size = keys_LPKsH.shape[3]
    paged = "" if size % 16 == 0 else f"pages have {size} tokens; the kernel supports multiples of 16"
    return refusal(keys_LPKsH, values_LPKsH) or paged


def paged_attention(
    q_BNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array,
    reference: Callable[..., jax.Array] = paged_attention_reference,
) -> jax.Array:
    """`reference` by the kernels. If they do not support the arguments, uses the reference and logs the reason once."""
    arguments = (q_BNH, keys_LPKsH, values_LPKsH, layer, pages_BM, counts_B, sinks_N)
    if reason := pool_refusal(keys_LPKsH, values_LPKsH):
        warn_reference("paged_attention", reason)
        return reference(*arguments)
    return attend_pages(*arguments, chosen=choose_tiling(pages_BM.shape[1], keys_LPKsH.shape[4]))
