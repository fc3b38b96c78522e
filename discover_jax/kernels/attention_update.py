"""Attention of packed rows in the update, on a GPU: kernels that match the references without storing the scores. Needs the extra
`kernels`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from discover_jax.kernels import attention_update_triton
from discover_jax.kernels.attention_decode import HEAD_SIZES
from discover_jax.kernels.fallback import attention_refusal, warn_reference
from discover_jax.kernels.packed_attention import ATTENTION, beginnings, packed_attention_reference, windowed_attention_reference
from discover_jax.kernels.triton_call import call_kernel, compute_capability


@dataclasses.dataclass(frozen=True)
class Launch:
    """Launch parameters of one kernel: queries and keys per tile, iterations in flight, warps."""

    queries: int
    keys: int
    stages: int
    warps: int


@dataclasses.dataclass(frozen=True)
class AttentionTiling:
    """Launch parameters of the three kernels: forward, gradient of queries, and gradients of keys and values.

    Where a kernel loops over keys, its queries must be a multiple of its keys; where it loops over queries, the reverse.
    """

    forward: Launch
    to_queries: Launch
    to_keys: Launch


FULL = AttentionTiling(Launch(128, 64, 4, 4), Launch(64, 64, 3, 4), Launch(64, 64, 3, 4))
WINDOWED = AttentionTiling(Launch(64, 64, 2, 4), Launch(64, 64, 2, 4), Launch(64, 64, 2, 4))
"""For heads of 64: the fastest measured on an H200 at gpt-oss's heads (benchmarks/kernels_update.py). They fit every card."""

LARGE_HEADS = {
    80: AttentionTiling(Launch(128, 64, 3, 8), Launch(64, 64, 2, 8), Launch(32, 64, 2, 8)),
    90: AttentionTiling(Launch(128, 64, 3, 8), Launch(128, 64, 3, 8), Launch(64, 64, 2, 4)),
    100: AttentionTiling(Launch(128, 64, 3, 8), Launch(128, 64, 2, 8), Launch(64, 64, 1, 8)),
}
"""For heads of 128, by compute capability. 90: the fastest measured on an H100 at the heads of Qwen2.5-1.5B (benchmarks/kernels_update.py).
Others were not run; they are chosen by the registers and the shared memory that Triton 3.6 needs."""

SMALLEST = AttentionTiling(Launch(128, 64, 2, 8), Launch(64, 64, 2, 8), Launch(32, 64, 2, 8))
"""For heads of 128 on all other cards: fits 99 KiB of shared memory."""


def choose_tiling(head_size: int, *, windowed: bool, capability: int) -> AttentionTiling:
    """The launch parameters for a card of this compute capability."""
    if head_size <= 64:
        return WINDOWED if windowed else FULL
    return LARGE_HEADS.get(capability, SMALLEST)


def packed_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks_N: jax.Array) -> jax.Array:
    """`packed_attention_reference` by the kernels. If they do not support the arguments, uses the reference and logs the reason once."""
    if _refused("packed_attention", q_BTNH, k_BTKH, v_BTKH):
        return packed_attention_reference(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)
    tiling = choose_tiling(q_BTNH.shape[3], windowed=False, capability=compute_capability())
    return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, window=None, tiling=tiling)


def windowed_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks_N: jax.Array, *, window: int
) -> jax.Array:
    """`windowed_attention_reference` by the kernels. If they do not support the arguments, uses the reference and logs the reason once."""
    if _refused("windowed_attention", q_BTNH, k_BTKH, v_BTKH):
        return windowed_attention_reference(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, window=window)
    tiling = choose_tiling(q_BTNH.shape[3], windowed=True, capability=compute_capability())
    return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, window=window, tiling=tiling)


def _refused(operation: str, *arrays: jax.Array) -> bool:
    """Whether the kernels do not support these queries, keys and values. Logs the reason."""
    if reason := attention_refusal("queries, keys and values", arrays, (jnp.bfloat16,), HEAD_SIZES):
        warn_reference(operation, reason)
    return bool(reason)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    sinks_N: jax.Array,
    *,
    window: int | None,
    tiling: AttentionTiling,
) -> jax.Array:
    """Attention to all earlier keys of each query's segment, or to the last `window` of them. Padding gets 0, and sinks get no gradient."""
    places_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    first_BT = beginnings(segments_BT)
    if window is not None:
        first_BT = jnp.maximum(first_BT, places_T - (window - 1))
    first_BT = jnp.where(segments_BT > 0, first_BT, places_T + 1)  # padding sees no keys, which costs almost nothing
    return _attention(q_BTNH, k_BTKH, v_BTKH, first_BT, lax.stop_gradient(sinks_N), tiling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, first_BT: Any, sinks_N: Any, tiling: AttentionTiling) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, first_BT, sinks_N, tiling)[0]


def _constants(q_BTNH: jax.Array, k_BTKH: jax.Array, launch: Launch) -> dict[str, int]:
    sizes = {"N": q_BTNH.shape[2], "K": k_BTKH.shape[2], "H": q_BTNH.shape[3]}
    return sizes | {"BM": launch.queries, "BN": launch.keys, "STAGES": launch.stages}


def _forward(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, first_BT: Any, sinks_N: Any, tiling: AttentionTiling) -> tuple[jax.Array, tuple]:
    batch, tokens, heads, _ = q_BTNH.shape
    launch = tiling.forward
    out_BTNH, lse_BNT = call_kernel(
        attention_update_triton.forward,
        *(q_BTNH, k_BTKH, v_BTKH, first_BT, sinks_N, tokens),
        out=[jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)],
        grid=(heads, -(-tokens // launch.queries), batch),
        warps=launch.warps,
        stages=launch.stages,
        constants=_constants(q_BTNH, k_BTKH, launch),
    )
    # If a loop keeps a kernel's own result, XLA (jax 0.11) runs the kernel a second time to write the result there. So keep a masked copy,
    # although the output at padding is already 0.
    sees_BT = first_BT <= jnp.arange(tokens)
    out_BTNH, lse_BNT = jnp.where(sees_BT[..., None, None], out_BTNH, 0), jnp.where(sees_BT[:, None], lse_BNT, 0)
    out_BTNH, lse_BNT = checkpoint_name(out_BTNH, ATTENTION), checkpoint_name(lse_BNT, ATTENTION)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, first_BT, out_BTNH, lse_BNT)


def _backward(tiling: AttentionTiling, kept: tuple, d_out_BTNH: jax.Array) -> tuple:
    q_BTNH, k_BTKH, v_BTKH, first_BT, out_BTNH, lse_BNT = kept
    batch, tokens, heads, _ = q_BTNH.shape
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH.astype(jnp.float32), axis=-1)
    inputs = q_BTNH, k_BTKH, v_BTKH, d_out_BTNH.astype(q_BTNH.dtype), lse_BNT, delta_BTN.transpose(0, 2, 1)
    launch = tiling.to_queries
    dq_BTNH = call_kernel(
        attention_update_triton.backward_queries,
        *(*inputs, first_BT, tokens),
        out=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        grid=(heads, -(-tokens // launch.queries), batch),
        warps=launch.warps,
        stages=launch.stages,
        constants=_constants(q_BTNH, k_BTKH, launch),
    )
    launch = tiling.to_keys
    dk_BTKH, dv_BTKH = call_kernel(
        attention_update_triton.backward_keys,
        *(*inputs, last_seeing(first_BT), tokens),
        out=[jax.ShapeDtypeStruct(k_BTKH.shape, k_BTKH.dtype), jax.ShapeDtypeStruct(v_BTKH.shape, v_BTKH.dtype)],
        grid=(k_BTKH.shape[2], -(-tokens // launch.keys), batch),
        warps=launch.warps,
        stages=launch.stages,
        constants=_constants(q_BTNH, k_BTKH, launch),
    )
    return dq_BTNH, dk_BTKH, dv_BTKH, None, None


def last_seeing(first_BT: jax.Array) -> jax.Array:
    """The last query that sees each key: the query before the first one whose keys begin later. int32 [B, T]."""
    places_T = jnp.arange(first_BT.shape[1], dtype=first_BT.dtype)
    return jax.vmap(lambda first_T: jnp.searchsorted(first_T, places_T, side="right", method="scan_unrolled").astype(jnp.int32) - 1)(
        first_BT
    )


_attention.defvjp(_forward, _backward)
