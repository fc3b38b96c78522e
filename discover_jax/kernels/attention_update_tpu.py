"""Attention of packed rows in the update, on a TPU: kernels that match the references without storing the scores.

They were compiled for TPUs and interpreted on a CPU. No TPU has run them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from discover_jax.kernels import attention_update_pallas
from discover_jax.kernels.attention_update_pallas import Blocks
from discover_jax.kernels.fallback import attention_refusal, warn_reference
from discover_jax.kernels.packed_attention import ATTENTION, beginnings, packed_attention_reference, windowed_attention_reference

BLOCK = 512
"""Most queries, and keys, of a block. Their scores in float32 take 1 MiB of a chip's vector memory, several times over."""
LANES = 128
"""Blocks are multiples of a TPU's lanes."""
HEAD_SIZES = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float32)


def packed_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks_N: jax.Array) -> jax.Array:
    """`packed_attention_reference` by the kernels. If they do not support the arguments, uses the reference and logs the reason once."""
    if _refused("packed_attention", q_BTNH, k_BTKH, v_BTKH):
        return packed_attention_reference(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)
    return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)


def windowed_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks_N: jax.Array, *, window: int
) -> jax.Array:
    """`windowed_attention_reference` by the kernels. If they do not support the arguments, uses the reference and logs the reason once."""
    if _refused("windowed_attention", q_BTNH, k_BTKH, v_BTKH):
        return windowed_attention_reference(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, window=window)
    return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, window=window)


def _refused(operation: str, *arrays: jax.Array) -> bool:
    """Whether the kernels do not support these queries, keys and values. Logs the reason."""
    if reason := attention_refusal("queries, keys and values", arrays, DTYPES, HEAD_SIZES):
        warn_reference(operation, reason, "tpu")
    return bool(reason)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    sinks_N: jax.Array,
    *,
    window: int | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attention to all earlier keys of each query's segment, or to the last `window` of them. Padding gets 0. Sinks get a gradient.

    Args:
      q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, window: as for the references.
      block: queries, and keys, of a block; by default BLOCK, or less for short rows.
      interpret: as for `pallas_call`: False on a TPU; True, or `pltpu.InterpretParams`, elsewhere.

    Returns:
      [B, T, N, H] in the dtype of the values.
    """
    tokens = q_BTNH.shape[1]
    if block is None:
        block = min(BLOCK, -(-tokens // LANES) * LANES)
    blocks = Blocks(block, -(-tokens // block), window, interpret)
    extra = [(0, 0), (0, block * blocks.count - tokens)]
    q, k, v = (jnp.pad(x, [*extra, (0, 0), (0, 0)]) for x in (q_BTNH, k_BTKH, v_BTKH))
    segments_BT = jnp.pad(segments_BT, extra)
    places_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    first_BT = beginnings(segments_BT)
    if window is not None:
        first_BT = jnp.maximum(first_BT, places_T - (window - 1))
    first_BT = jnp.where(segments_BT > 0, first_BT, places_T + 1)  # padding sees no keys
    out: jax.Array = _attention(q, k, v, first_BT, sinks_N.astype(jnp.float32), blocks)
    return out[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, first_BT: Any, sinks_N: Any, blocks: Blocks) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, first_BT, sinks_N, blocks)[0]


def _to_lanes(x_BTNH: jax.Array) -> jax.Array:
    """[B, N, H, T]."""
    return x_BTNH.transpose(0, 2, 3, 1)


def _forward(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, first_BT: Any, sinks_N: Any, blocks: Blocks) -> tuple[jax.Array, tuple]:
    keys = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    out_BNHT, lse_BN1T = attention_update_pallas.forward(_to_lanes(q_BTNH), *keys, first_BT, sinks_N, blocks)
    out_BTNH, lse_BN1T = checkpoint_name(out_BNHT.transpose(0, 3, 1, 2), ATTENTION), checkpoint_name(lse_BN1T, ATTENTION)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, first_BT, sinks_N, out_BTNH, lse_BN1T)


def _backward(blocks: Blocks, kept: tuple, d_out_BTNH: jax.Array) -> tuple:
    q_BTNH, k_BTKH, v_BTKH, first_BT, sinks_N, out_BTNH, lse_BN1T = kept
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH.astype(jnp.float32), axis=-1)
    delta_BN1T = delta_BTN.transpose(0, 2, 1)[:, :, None]
    keys, d_out_BNHT = (k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)), _to_lanes(d_out_BTNH.astype(q_BTNH.dtype))
    dq_BNHT, dk_BKHT, dv_BKHT = attention_update_pallas.backward(
        _to_lanes(q_BTNH), *keys, first_BT, d_out_BNHT, lse_BN1T, delta_BN1T, blocks
    )
    d_sinks_N = -jnp.sum(jnp.exp(sinks_N[:, None, None] - lse_BN1T) * delta_BN1T, axis=(0, 2, 3))
    return (*(x.transpose(0, 3, 1, 2) for x in (dq_BNHT, dk_BKHT, dv_BKHT)), None, d_sinks_N)


_attention.defvjp(_forward, _backward)
