"""The layers of gpt-oss as flax.nnx modules: projections with adapters, attention with sinks, the mixture of experts.

Modules hold declarations (see parameters) until `Model` binds arrays to them. Every adapter is applied unmerged:
y = x W^T + b + (alpha / rank) (x A^T) B^T.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from discover_jax.kernels import table
from discover_jax.kernels.experts import route
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.mxfp4 import BLOCK, dequantise
from discover_jax.models.parameters import Declare
from discover_jax.models.rope import rotate


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm in float32, scaled before the downcast."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Projection(nnx.Module):
    """x [..., in] -> [..., out], with bias and adapter where declared."""

    def __init__(self, declare: Declare, out: int, into: int, axes: tuple[str, str], *, rank: int, alpha: float, bias: bool = True):
        self.weight = declare.weight((out, into), axes)
        self.bias = declare.weight((out,), axes[:1], "zeros") if bias else None
        self.lora_a = declare.lora((rank, into), ("rank", axes[1]), "fan_in") if rank else None
        self.lora_b = declare.lora((out, rank), (axes[0], "rank"), "zeros") if rank else None
        self.scale = alpha / rank if rank else 0.0

    def __call__(self, x: jax.Array, *, adapted: bool, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """`out_dtype` sets the type of sums and result, e.g. float32 for logits."""
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype), preferred_element_type=out_dtype)
        if self.bias is not None:
            y += self.bias[...].astype(y.dtype)
        if adapted and self.lora_a is not None and self.lora_b is not None:
            low = jnp.einsum("...i,ri->...r", x, self.lora_a[...].astype(x.dtype))
            y += self.scale * jnp.einsum("...r,or->...o", low, self.lora_b[...].astype(x.dtype), preferred_element_type=out_dtype)
        return y


class Attention(nnx.Module):
    """Grouped-query attention with a learned sink per head; the caller says which keys each query sees."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig):
        self.config = config
        d, n, k, h = config.width, config.num_heads, config.num_kv_heads, config.head_size
        options = {"rank": lora.attention_rank, "alpha": lora.alpha}
        self.norm = declare.weight((d,), ("width",), "ones")
        self.q = Projection(declare, n * h, d, ("heads", "width"), **options)
        self.k = Projection(declare, k * h, d, ("kv_heads", "width"), **options)
        self.v = Projection(declare, k * h, d, ("kv_heads", "width"), **options)
        self.o = Projection(declare, d, n * h, ("width", "heads"), **options)
        self.sinks = declare.weight((n,), ("heads",), "zeros")

    def project(self, x_BTD: jax.Array, positions_BT: jax.Array, *, adapted: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], and keys and values [B, T, K, H]; queries and keys already turned to their positions."""
        c = self.config
        lead = x_BTD.shape[:-1]
        x_BTD = rms_norm(x_BTD, self.norm[...], c.rms_eps)
        q = self.q(x_BTD, adapted=adapted).reshape(*lead, c.num_heads, c.head_size)
        k = self.k(x_BTD, adapted=adapted).reshape(*lead, c.num_kv_heads, c.head_size)
        v = self.v(x_BTD, adapted=adapted).reshape(*lead, c.num_kv_heads, c.head_size)
        return rotate(q, positions_BT, c), rotate(k, positions_BT, c), v

    def attend(self, q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen_BTS: jax.Array, *, adapted: bool) -> jax.Array:
        """Attention of queries to the keys that they see, and the output projection: [B, T, D].

        o = sum_j e^{l_j} v_j / (sum_j e^{l_j} + e^sink); scores and softmax in float32.
        """
        c = self.config
        b, t = q_BTNH.shape[:2]
        groups = c.num_heads // c.num_kv_heads
        q_BKGTH = q_BTNH.reshape(b, t, c.num_kv_heads, groups, c.head_size).transpose(0, 2, 3, 1, 4)
        # The queries of one key/value head as rows of one matrix: [G T, H] x [H, S].
        q_BKRH = q_BKGTH.reshape(b, c.num_kv_heads, groups * t, c.head_size)
        scores = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32) * c.head_size**-0.5
        scores = scores.reshape(b, c.num_kv_heads, groups, t, -1)
        scores = jnp.where(seen_BTS[:, None, None], scores, -jnp.inf)
        sinks = self.sinks[...].astype(jnp.float32).reshape(1, c.num_kv_heads, groups, 1, 1)
        highest = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks))
        weights = jnp.exp(scores - highest)
        weights = (weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - highest))).astype(v_BKSH.dtype)
        out_BKRH = jnp.einsum("bkrs,bksh->bkrh", weights.reshape(b, c.num_kv_heads, groups * t, -1), v_BKSH)
        out = out_BKRH.reshape(b, c.num_kv_heads, groups, t, c.head_size).transpose(0, 3, 1, 2, 4).reshape(b, t, -1)
        return self.o(out, adapted=adapted)

    def attend_cached(
        self, q_B1NH: jax.Array, keys_LBKSH: jax.Array, values_LBKSH: jax.Array, pair: jax.Array, counts_B: jax.Array, *, adapted: bool
    ) -> jax.Array:
        """The same for one query a row that sees the first `counts_B` places of one of a stack of caches: [B, 1, D]."""
        read: Callable = table.choose("cached_attention")
        out_BNH = read(q_B1NH[:, 0], keys_LBKSH, values_LBKSH, pair, counts_B, self.sinks[...])
        return self.o(out_BNH.reshape(*q_B1NH.shape[:2], -1), adapted=adapted)


@jax.checkpoint
def _times_packed(x_Ti: jax.Array, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """x W^T of a matrix in MXFP4, [T, out]. Checkpointed: the backward pass unpacks it again, or a layer's experts would all lie there
    unpacked, four times the bytes of their packed form (72 GB of temporaries in the 120b)."""
    return x_Ti @ dequantise(blocks, scales, x_Ti.dtype).T


class ExpertMatrix(nnx.Module):
    """One matrix of every expert, [E, out, in], packed in MXFP4 or dense, with bias and adapter."""

    def __init__(
        self, declare: Declare, experts: int, out: int, into: int, axes: tuple[str, str], *, packed: bool, rank: int, alpha: float
    ):
        if packed:
            self.blocks = declare.weight(
                (experts, out, into // BLOCK, BLOCK // 2), ("experts", axes[0], "blocks", "width"), "blocks", jnp.uint8
            )
            self.scales = declare.weight((experts, out, into // BLOCK), ("experts", axes[0], "blocks"), "scales", jnp.uint8)
        else:
            self.weight = declare.weight((experts, out, into), ("experts", *axes))
        self.bias = declare.weight((experts, out), ("experts", axes[0]), "zeros")
        self.lora_a = declare.lora((experts, rank, into), ("experts", "rank", axes[1]), "fan_in") if rank else None
        self.lora_b = declare.lora((experts, out, rank), ("experts", axes[0], "rank"), "zeros") if rank else None
        self.scale = alpha / rank if rank else 0.0
        self.packed = packed

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        """What `apply` needs, each with the experts as leading axis."""
        named = {"blocks": self.blocks, "scales": self.scales} if self.packed else {"weight": self.weight}
        named["bias"] = self.bias
        if adapted and self.lora_a is not None and self.lora_b is not None:
            named |= {"lora_a": self.lora_a, "lora_b": self.lora_b}
        return {name: variable[...] for name, variable in named.items()}

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array:
        """One expert, its slice of `arrays`, on every row."""
        y = _times_packed(x_Ti, one["blocks"], one["scales"]) if self.packed else x_Ti @ one["weight"].astype(x_Ti.dtype).T
        y += one["bias"].astype(x_Ti.dtype)
        if "lora_a" in one:
            y += self.scale * ((x_Ti @ one["lora_a"].T.astype(x_Ti.dtype)) @ one["lora_b"].T.astype(x_Ti.dtype))
        return y


class Experts(nnx.Module):
    """Router and experts: sum over each token's top experts of weight * (W2 act(W1 x + b1) + b2)."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig, *, packed: bool):
        self.config = config
        d, e, f = config.width, config.num_experts, config.expert_width
        options = {"packed": packed, "rank": lora.expert_rank, "alpha": lora.alpha}
        self.norm = declare.weight((d,), ("width",), "ones")
        self.router = Projection(declare, e, d, ("experts", "width"), rank=0, alpha=0.0)
        self.gate_up = ExpertMatrix(declare, e, 2 * f, d, ("expert_width", "width"), **options)
        self.down = ExpertMatrix(declare, e, d, f, ("width", "expert_width"), **options)

    def __call__(self, x_BTD: jax.Array, *, adapted: bool) -> jax.Array:
        c = self.config
        x_TD = rms_norm(x_BTD, self.norm[...], c.rms_eps).reshape(-1, c.width)
        weights_TE = route(self.router(x_TD, adapted=False), c.experts_per_token)
        mix: Callable = table.choose("experts")
        out_TD = mix(x_TD, weights_TE, self.gate_up, self.down, adapted=adapted, limit=c.swiglu_limit, alpha=c.swiglu_alpha)
        return out_TD.reshape(x_BTD.shape)


class Layer(nnx.Module):
    """Attention, then experts, each added to the stream. How keys are kept is the caller's affair."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig, *, packed: bool):
        self.attention = Attention(declare, config, lora)
        self.experts = Experts(declare, config, lora, packed=packed)


class Pair(nnx.Module):
    """A sliding layer and a full one: the unit that is stacked and scanned."""

    def __init__(self, declare: Declare, config: ModelConfig, lora: LoraConfig, *, packed: bool):
        self.sliding = Layer(declare, config, lora, packed=packed)
        self.full = Layer(declare, config, lora, packed=packed)


class GptOss(nnx.Module):
    """All parameters: embedding, stacked pairs, final norm, head."""

    def __init__(self, config: ModelConfig, lora: LoraConfig, dtype: jax.typing.DTypeLike, *, packed: bool):
        single = Declare(dtype)
        self.embedding = single.weight((config.vocab_size, config.width), ("vocab", "width"), "embedding")
        self.pairs = Pair(Declare(dtype, config.num_pairs), config, lora, packed=packed)
        self.norm = single.weight((config.width,), ("width",), "ones")
        self.head = Projection(
            single, config.vocab_size, config.width, ("vocab", "width"), rank=lora.head_rank, alpha=lora.alpha, bias=False
        )
