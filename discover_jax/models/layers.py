"""The layers of a decoder as flax.nnx modules: projections with adapters, attention, the mixture of experts, the dense MLP.

Modules contain declarations (see models.parameters) until `Model` binds arrays to them. Adapters are applied unmerged:
y = x W^T + b + (alpha / rank) (x A^T) B^T.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from discover_jax.kernels import mxfp4_lanes
from discover_jax.kernels.experts import MixtureOfExperts, route_along, route_top
from discover_jax.kernels.kernel_set import KernelSet
from discover_jax.kernels.mxfp4_lanes import PARTS, Lanes
from discover_jax.kernels.mxfp4_tiles import SLABS, Slab, restore, words_shape
from discover_jax.kernels.projections import Stack
from discover_jax.models.cache import Pool
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.mxfp4 import BLOCK, dequantise
from discover_jax.models.parameters import Declare
from discover_jax.models.rope import rotate


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Root-mean-square norm in float32, scaled and then cast to `dtype` (default: x's type)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype if dtype is None else dtype)


@jax.custom_vjp
def _product(x: jax.Array, weight_oi: jax.Array) -> jax.Array:
    """x W^T in float32. Weights and the result's gradient are cast to x's type: float32 products take twice as long, and would need a cast
    of x."""
    return jnp.einsum("...i,oi->...o", x, weight_oi.astype(x.dtype), preferred_element_type=jnp.float32)


def _product_forward(x: jax.Array, weight_oi: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, weight_oi), (x, weight_oi)


def _product_backward(residuals: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_oi = residuals
    d_y = d_y.astype(x.dtype)
    d_x = jnp.einsum("...o,oi->...i", d_y, weight_oi.astype(x.dtype), preferred_element_type=jnp.float32)
    d_weight_oi = jnp.einsum("...o,...i->oi", d_y, x, preferred_element_type=jnp.float32)  # XLA removes it if unused
    return d_x.astype(x.dtype), d_weight_oi.astype(weight_oi.dtype)


_product.defvjp(_product_forward, _product_backward)


def _adapter_product(x: jax.Array, a_ri: jax.Array, b_or: jax.Array, scale: float) -> jax.Array:
    """scale (x A^T) B^T in float32, rounded to x's type between the two products."""
    # Without the barrier, XLA merges A and the weights into one product and copies both at each use (1.2 GB for the head).
    x = jax.lax.optimization_barrier(x)
    return _product((scale * _product(x, a_ri)).astype(x.dtype), b_or)


class Projection(nnx.Module):
    """x [..., in] -> [..., out], with optional bias and adapter. A tied projection has no weight of its own: the caller passes it."""

    def __init__(
        self,
        declare: Declare,
        out: int,
        into: int,
        axes: tuple[str, str],
        *,
        rank: int,
        alpha: float,
        bias: bool = True,
        gain: float = 1.0,
        tied: bool = False,
    ):
        self.weight = None if tied else declare.weight((out, into), axes, gain=gain)
        self.bias = declare.weight((out,), axes[:1], "zeros") if bias else None
        self.lora_a = declare.lora((rank, into), ("rank", axes[1]), "fan_in") if rank else None
        self.lora_b = declare.lora((out, rank), (axes[0], "rank"), "zeros") if rank else None
        self.scale = alpha / rank if rank else 0.0

    def __call__(
        self,
        x: jax.Array,
        *,
        adapted: bool,
        out_dtype: jax.typing.DTypeLike | None = None,
        weight_oi: jax.Array | None = None,
    ) -> jax.Array:
        """The projection in `out_dtype` (default: x's type), summed in float32 and rounded once. `weight_oi`: of a tied projection."""
        if self.weight is not None:
            weight_oi = self.weight[...]
        assert weight_oi is not None, "a tied projection needs the weight"
        y = _product(x, weight_oi)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        if adapted and self.lora_a is not None and self.lora_b is not None:
            y += _adapter_product(x, self.lora_a[...], self.lora_b[...], self.scale)
        return y.astype(x.dtype if out_dtype is None else out_dtype)


def project_stacked(
    project: Callable[..., list[jax.Array]], projections: list[Projection], x: jax.Array, layer: jax.Array, *, adapted: bool
) -> list[jax.Array]:
    """Projects x [..., in] by one layer of stacked weights with the kernel `project`. Returns float32 [..., out] for each projection."""

    def stack(one: Projection) -> Stack:
        adapter = (one.lora_a[...], one.lora_b[...]) if adapted and one.lora_a is not None and one.lora_b is not None else ()
        assert one.weight is not None, "only the head is tied"
        return Stack(one.weight[...], None if one.bias is None else one.bias[...], *adapter)

    ys = project(x.reshape(-1, x.shape[-1]), [stack(one) for one in projections], layer, projections[0].scale)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def branch_gain(config: ModelConfig) -> float:
    """Gain of the last weights of a residual branch (two a layer): the stream's variance does not grow with depth (as in GPT-2)."""
    return (2 * config.num_layers) ** -0.5


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
        pair: jax.Array,
        pages_BM: jax.Array,
        counts_B: jax.Array,
        layer: jax.Array | None,
        *,
        adapted: bool,
    ) -> jax.Array:
        """The same for one query a row, which sees the first `counts_B` positions of the row's pages: float32 [B, 1, D]."""
        arguments = q_B1NH[:, 0], pool.keys_LPKsH, pool.values_LPKsH, pair, pages_BM, counts_B, self.sinks_N
        out_BNH = self.kernels.paged_attention(*arguments)
        return self._out(out_BNH.reshape(*q_B1NH.shape[:2], -1), layer, adapted=adapted)

    def attend_chunk(
        self,
        q_BCNH: jax.Array,
        pool: Pool,
        pair: jax.Array,
        pages_BM: jax.Array,
        lengths_B: jax.Array,
        layer: jax.Array | None,
        *,
        adapted: bool,
    ) -> jax.Array:
        """The same for a chunk of C queries from position `lengths_B`. A query sees its own and earlier positions: float32 [B, C, D]."""
        arguments = q_BCNH, pool.keys_LPKsH, pool.values_LPKsH, pair, pages_BM, lengths_B, self.sinks_N
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


@jax.checkpoint
def _times_packed(x_Ti: jax.Array, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """x W^T of a packed matrix, [T, out]. The backward pass unpacks it again (jax.checkpoint). Otherwise all unpacked experts of a layer
    would be kept, at four times their packed bytes (72 GB for the 120b)."""
    return _product(x_Ti, dequantise(blocks, scales, x_Ti.dtype))


@functools.partial(jax.checkpoint, static_argnums=3)
def _times_tiled(x_Ti: jax.Array, words: jax.Array, factors: jax.Array, paired: bool) -> jax.Array:
    """`_times_packed` for a tiled matrix; bit-identical."""
    blocks, scales = restore(words[None], factors[None], paired=paired)
    return _product(x_Ti, dequantise(blocks[0], scales[0], x_Ti.dtype))


@functools.partial(jax.checkpoint, static_argnums=3)
def _times_lanes(x_Ti: jax.Array, lanes: jax.Array, powers: jax.Array, out: int) -> jax.Array:
    """`_times_packed` for a matrix in the layout of TPU kernels; bit-identical."""
    blocks, scales = mxfp4_lanes.restore(lanes[None], powers[None], out)
    return _product(x_Ti, dequantise(blocks[0], scales[0], x_Ti.dtype))


class ExpertMatrix(nnx.Module):
    """A matrix of all experts, [E, out, in], with bias and adapter. `form` is one of `Model.experts`."""

    def __init__(
        self,
        declare: Declare,
        experts: int,
        out: int,
        into: int,
        axes: tuple[str, str],
        *,
        form: str,
        slab: Slab,
        parts: int,
        gain: float,
        rank: int,
        alpha: float,
    ):
        if form == "packed":
            self.blocks = declare.weight(
                (experts, out, into // BLOCK, BLOCK // 2), ("experts", axes[0], "blocks", "width"), "blocks", jnp.uint8
            )
            self.scales = declare.weight((experts, out, into // BLOCK), ("experts", axes[0], "blocks"), "scales", jnp.uint8, gain)
        elif form == "lanes":
            matrix, named = Lanes(out, into, parts), ("experts", "blocks", "blocks", "blocks", "blocks")
            self.lanes = declare.weight((experts, *mxfp4_lanes.words_shape(*matrix)), named, matrix, jnp.int32)
            self.powers = declare.weight((experts, *mxfp4_lanes.powers_shape(*matrix)), named, matrix, jnp.uint8, gain)
        elif form == "tiled":
            shape, named = (experts, *words_shape(out, into, slab)), ("experts", axes[0], "blocks", "blocks", "blocks")
            self.words = declare.weight(shape, named, slab, jnp.int32)
            self.factors = declare.weight((*shape[:-1], 8), named, slab, jnp.int32, gain)
        else:
            self.weight = declare.weight((experts, out, into), ("experts", *axes), gain=gain)
        self.bias = declare.weight((experts, out), ("experts", axes[0]), "zeros")
        self.lora_a = declare.lora((experts, rank, into), ("experts", "rank", axes[1]), "fan_in") if rank else None
        self.lora_b = declare.lora((experts, out, rank), ("experts", axes[0], "rank"), "zeros") if rank else None
        self.scale = alpha / rank if rank else 0.0
        self.paired = slab.paired

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        """The arrays that `apply` needs: [E, ...], or [L, E, ...] if stacks are bound."""
        adapter = ("lora_a", "lora_b") if adapted and self.lora_a is not None else ()
        named = {
            name: getattr(self, name, None)
            for name in ("weight", "blocks", "scales", "words", "factors", "lanes", "powers", "bias", *adapter)
        }
        return {name: variable[...] for name, variable in named.items() if variable is not None}

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array:
        """Applies one expert, given as its slice of `arrays`, to all rows: float32 [T, out]."""
        if "lanes" in one:
            y = _times_lanes(x_Ti, one["lanes"], one["powers"], one["bias"].shape[0])
        elif "words" in one:
            y = _times_tiled(x_Ti, one["words"], one["factors"], self.paired)
        elif "blocks" in one:
            y = _times_packed(x_Ti, one["blocks"], one["scales"])
        else:
            y = _product(x_Ti, one["weight"])
        y += one["bias"].astype(jnp.float32)
        if "lora_a" in one:
            y += _adapter_product(x_Ti, one["lora_a"], one["lora_b"], self.scale)
        return y


class Experts(nnx.Module):
    """Router and experts: the sum over a token's top experts of weight * (W2 act(W1 x + b1) + b2)."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig, kernels: KernelSet, *, form: str):
        self.config, self.dtype, self.kernels = config, declare.dtype, kernels
        d, e, f = config.width, config.num_experts, config.mlp_width
        options = {"form": form, "rank": lora.expert_rank, "alpha": lora.alpha}
        self.norm = declare.weight((d,), ("width",), "ones")
        self.router = Projection(declare, e, d, ("logits", "width"), rank=0, alpha=0.0)
        self.gate_up = ExpertMatrix(
            declare, e, 2 * f, d, ("mlp_width", "width"), slab=SLABS["gate_up"], parts=PARTS["gate_up"], gain=1.0, **options
        )
        self.down = ExpertMatrix(
            declare, e, d, f, ("width", "mlp_width"), slab=SLABS["down"], parts=PARTS["down"], gain=branch_gain(config), **options
        )

    def __call__(self, x_BTD: jax.Array, routes_BTX: jax.Array | None = None, *, adapted: bool) -> jax.Array:
        """The output for whole sequences; differentiable. `routes_BTX` are the experts to use; None for those with the largest logits."""
        return self._moe(self.kernels.experts, x_BTD, routes_BTX, adapted=adapted)[0]

    def decode(self, x_BTD: jax.Array, pair: jax.Array, *, adapted: bool, valid_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The output and the chosen experts [B, T, X] for a few tokens a row. Matrices are stacked over pairs; `pair` selects one.

        Tokens that are not in `valid_BT` get no experts, and their output is 0.
        """
        return self._moe(self.kernels.decode_experts, x_BTD, adapted=adapted, layer=pair, valid_BT=valid_BT)

    def _moe(
        self,
        moe: MixtureOfExperts,
        x_BTD: jax.Array,
        routes_BTX: jax.Array | None = None,
        *,
        adapted: bool,
        layer: jax.Array | None = None,
        valid_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        c = self.config
        x_TD = rms_norm(x_BTD, self.norm[...], c.rms_eps, self.dtype).reshape(-1, c.width)
        # Logits stay in float32: rounded ones would often tie, and then tiny differences between sampler and update change the experts.
        logits_TE = self.router(x_TD, adapted=False, out_dtype=jnp.float32)
        options: dict[str, Any] = {"experts": c.num_experts, "adapted": adapted, "limit": c.swiglu_limit, "alpha": c.swiglu_alpha}
        if layer is not None:
            options |= {"layer": layer}
        if layer is not None and valid_BT is None:
            index_TX, weights_TX, rows = self.kernels.decode_routing(logits_TE, c.experts_per_token, layer)
            options |= {} if rows is None else {"rows": rows}
        elif routes_BTX is None:
            index_TX, weights_TX = route_top(logits_TE, c.experts_per_token)
        else:
            index_TX = routes_BTX.reshape(-1, c.experts_per_token).astype(jnp.int32)
            weights_TX = route_along(logits_TE, index_TX)
        computed_TX = index_TX
        if valid_BT is not None:
            computed_TX = jnp.where(valid_BT.reshape(-1, 1), index_TX, c.num_experts)
            options |= {"elsewhere": 1}  # one more number, that of no expert
        out_TD = moe(x_TD, computed_TX, weights_TX, self.gate_up, self.down, **options)
        return out_TD.reshape(x_BTD.shape), index_TX.reshape(*x_BTD.shape[:-1], -1)


class Mlp(nnx.Module):
    """The feed-forward layer of a dense model: down(silu(gate x) * up x)."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig, kernels: KernelSet):
        self.config, self.dtype, self.kernels = config, declare.dtype, kernels
        d, f = config.width, config.mlp_width
        options = {"bias": False, "rank": lora.mlp_rank, "alpha": lora.alpha}
        self.norm = declare.weight((d,), ("width",), "ones")
        self.gate = Projection(declare, f, d, ("mlp_width", "width"), **options)
        self.up = Projection(declare, f, d, ("mlp_width", "width"), **options)
        self.down = Projection(declare, d, f, ("width", "mlp_width"), gain=branch_gain(config), **options)

    def __call__(self, x_BTD: jax.Array, routes_BTX: jax.Array | None = None, *, adapted: bool) -> jax.Array:
        """The output, [B, T, D] float32. `routes_BTX` is empty: a dense layer does not route."""
        del routes_BTX
        x_BTD = rms_norm(x_BTD, self.norm[...], self.config.rms_eps, self.dtype)
        gate_BTF, up_BTF = (one(x_BTD, adapted=adapted, out_dtype=jnp.float32) for one in (self.gate, self.up))
        return self.down(self._activate(gate_BTF, up_BTF), adapted=adapted, out_dtype=jnp.float32)

    def decode(self, x_BTD: jax.Array, layer: jax.Array | None, *, adapted: bool) -> tuple[jax.Array, jax.Array]:
        """The output, and the chosen experts [B, T, 0], for a few tokens a row. `layer` selects a layer if the projections are stacked."""
        routes_BTX = jnp.zeros((*x_BTD.shape[:-1], 0), jnp.int32)
        if layer is None:
            return self(x_BTD, adapted=adapted), routes_BTX
        project = functools.partial(project_stacked, self.kernels.decode_projections, layer=layer, adapted=adapted)
        x_BTD = rms_norm(x_BTD, self.norm[...], self.config.rms_eps, self.dtype)
        gate_BTF, up_BTF = project([self.gate, self.up], x_BTD)
        return project([self.down], self._activate(gate_BTF, up_BTF))[0], routes_BTX

    def _activate(self, gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
        return (jax.nn.silu(gate_BTF) * up_BTF).astype(self.dtype)


class Layer(nnx.Module):
    """Attention and feed-forward. The caller adds their outputs to the residual stream and stores keys and values."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig, kernels: KernelSet, *, form: str):
        self.attention = Attention(declare, config, lora, kernels)
        if config.num_experts:
            self.experts = Experts(declare, config, lora, kernels, form=form)
        else:
            self.mlp = Mlp(declare, config, lora, kernels)

    def feed_forward(self, x_BTD: jax.Array, routes_BTX: jax.Array | None, *, adapted: bool) -> jax.Array:
        """The output of the experts, or of a dense model's MLP, for whole sequences."""
        part = self.experts if hasattr(self, "experts") else self.mlp
        return part(x_BTD, routes_BTX, adapted=adapted)

    def decode_feed_forward(
        self,
        x_BTD: jax.Array,
        repeat: jax.Array,
        layer: jax.Array | None,
        *,
        adapted: bool,
        valid_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The output and the chosen experts [B, T, X] for a few tokens a row.

        Args:
          repeat: index of this layer in the stacks of the experts' matrices.
          layer: the same, if the dense projections are stacked too; otherwise None.
          valid_BT: tokens whose output is needed; None for all. No expert computes the others.
        """
        if hasattr(self, "experts"):
            return self.experts.decode(x_BTD, repeat, adapted=adapted, valid_BT=valid_BT)
        return self.mlp.decode(x_BTD, layer, adapted=adapted)


class Repeat(nnx.Module):
    """One repeat of the pattern of layers, each under its kind. Repeats are stacked and scanned over."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig, kernels: KernelSet, *, form: str):
        for kind in config.pattern:
            setattr(self, kind, Layer(declare, config, lora, kernels, form=form))


class Decoder(nnx.Module):
    """All parameters: embedding, stacked layers, final norm, head. `form` is that of the experts' matrices, see `Model.experts`."""

    def __init__(self, config: ModelConfig, lora: LoraConfig, dtype: jax.typing.DTypeLike, kernels: KernelSet, *, form: str):
        single = Declare(dtype)
        # A tied embedding is also the head, whose random logits should have about unit variance.
        init = "fan_in" if config.tied else "embedding"
        self.embedding = single.weight((config.vocab_size, config.width), ("vocab", "width"), init)
        setattr(self, config.stack, Repeat(Declare(dtype, config.num_repeats), config, lora, kernels, form=form))
        self.norm = single.weight((config.width,), ("width",), "ones")
        self.head = Projection(
            single,
            config.vocab_size,
            config.width,
            ("vocab", "width"),
            rank=lora.head_rank,
            alpha=lora.alpha,
            bias=False,
            tied=config.tied,
        )
