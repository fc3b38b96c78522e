"""Grouped-query attention as a flax.nnx module: in packed rows, and over cached keys."""

import jax
import jax.numpy as jnp
from flax import nnx

from discover_jax.kernels.kernel_set import KernelSet
from discover_jax.models.cache import Pool
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.parameters import Declare
from discover_jax.models.projection import Projection, branch_gain, project_stacked, rms_norm
from discover_jax.models.rope import rotate

NO_SINK = -1e30
"""Sink of a head without one: its weight in the softmax is 0. It is finite, so that outputs at padding are finite too."""


class Attention(nnx.Module):
    """Grouped-query attention, with a learned sink per head if the model has sinks. The caller decides which keys a query sees."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig, kernels: KernelSet):
        self.config, self.dtype, self.kernels = config, declare.dtype, kernels
        d, n, k, h = config.width, config.num_heads, config.num_kv_heads, config.head_size
        options = {"rank": lora.attention_rank, "alpha": lora.alpha}
        self.norm = declare.weight((d,), ("width",), "ones")
        self.q = Projection(declare, n * h, d, ("heads", "width"), bias=config.qkv_bias, **options)
        self.k = Projection(declare, k * h, d, ("kv_heads", "width"), bias=config.qkv_bias, **options)
        self.v = Projection(declare, k * h, d, ("kv_heads", "width"), bias=config.qkv_bias, **options)
        self.o = Projection(declare, d, n * h, ("width", "heads"), bias=config.o_bias, gain=branch_gain(config), **options)
        self.q_norm = declare.weight((h,), ("head_size",), "ones") if config.qk_norm else None
        self.k_norm = declare.weight((h,), ("head_size",), "ones") if config.qk_norm else None
        self.sinks = declare.weight((n,), ("heads",), "zeros") if config.sinks else None

    @property
    def sinks_N(self) -> jax.Array:
        """The sink of each head."""
        return jnp.full(self.config.num_heads, NO_SINK, self.dtype) if self.sinks is None else self.sinks[...]

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, layer: jax.Array | None = None, *, adapted: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys [B, T, K, H] and values [B, T, K, H]. Queries and keys are rotated to their positions.

        `layer` selects a layer if the projections are stacked.
        """
        c = self.config
        x_BTD = rms_norm(x_BTD, self.norm[...], c.rms_eps, self.dtype)
        projections = [self.q, self.k, self.v]
        if layer is None:
            ys = [one(x_BTD, adapted=adapted) for one in projections]
        else:
            ys = [
                y.astype(self.dtype) for y in project_stacked(self.kernels.decode_projections, projections, x_BTD, layer, adapted=adapted)
            ]
        q, k, v = (y.reshape(*x_BTD.shape[:-1], -1, c.head_size) for y in ys)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (rms_norm(x, norm[...], c.rms_eps) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        return rotate(q, positions_BT, c), rotate(k, positions_BT, c), v

    def attend_packed(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None, *, adapted: bool
    ) -> jax.Array:
        """Attention in packed rows, then the output projection: float32 [B, T, D]. Differentiable.

        o = sum_j e^{l_j} v_j / (sum_j e^{l_j} + e^sink); scores and softmax are in float32. A query sees its own and earlier keys of its
        segment, at most the last `window`.
        """
        if window is None:
            out_BTNH = self.kernels.packed_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, self.sinks_N)
        else:
            out_BTNH = self.kernels.windowed_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, self.sinks_N, window=window)
        return self._out(out_BTNH.reshape(*q_BTNH.shape[:2], -1), None, adapted=adapted)

    def attend_cached(
        self,
        q_B1NH: jax.Array,
        pool: Pool,
        repeat: jax.Array,
        pages_BM: jax.Array,
        counts_B: jax.Array,
        layer: jax.Array | None,
        *,
        adapted: bool,
    ) -> jax.Array:
        """The same for one query a row, which sees the first `counts_B` positions of the row's pages: float32 [B, 1, D]."""
        arguments = q_B1NH[:, 0], pool.keys_LPKsH, pool.values_LPKsH, repeat, pages_BM, counts_B, self.sinks_N
        out_BNH = self.kernels.paged_attention(*arguments)
        return self._out(out_BNH.reshape(*q_B1NH.shape[:2], -1), layer, adapted=adapted)

    def attend_chunk(
        self,
        q_BCNH: jax.Array,
        pool: Pool,
        repeat: jax.Array,
        pages_BM: jax.Array,
        lengths_B: jax.Array,
        layer: jax.Array | None,
        *,
        adapted: bool,
    ) -> jax.Array:
        """The same for a chunk of C queries from position `lengths_B`. A query sees its own and earlier positions: float32 [B, C, D]."""
        arguments = q_BCNH, pool.keys_LPKsH, pool.values_LPKsH, repeat, pages_BM, lengths_B, self.sinks_N
        out_BCNH = self.kernels.prefill_attention(*arguments)
        return self._out(out_BCNH.reshape(*q_BCNH.shape[:2], -1), layer, adapted=adapted)

    def attend_window(
        self,
        q_BCNH: jax.Array,
        rings: tuple[jax.Array, ...],
        k_BCKH: jax.Array,
        v_BCKH: jax.Array,
        lengths_B: jax.Array,
        layer: jax.Array | None,
        *,
        adapted: bool,
    ) -> jax.Array:
        """`attend_chunk` for a sliding layer: the rings [B, K, W, H] have the last W positions before the chunk."""
        out_BCNH = self.kernels.prefill_windowed_attention(q_BCNH, *rings, k_BCKH, v_BCKH, lengths_B, jnp.int32(0), self.sinks_N)
        return self._out(out_BCNH.reshape(*q_BCNH.shape[:2], -1), layer, adapted=adapted)

    def _out(self, out: jax.Array, layer: jax.Array | None, *, adapted: bool) -> jax.Array:
        if layer is not None:
            return project_stacked(self.kernels.decode_projections, [self.o], out.astype(self.dtype), layer, adapted=adapted)[0]
        return self.o(out.astype(self.dtype), adapted=adapted, out_dtype=jnp.float32)
