"""The mixture of experts as flax.nnx modules: router, and matrices of all experts in each form of their weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from discover_jax.kernels import mxfp4_lanes
from discover_jax.kernels.experts import MixtureOfExperts, route_along, route_top
from discover_jax.kernels.kernel_set import KernelSet
from discover_jax.kernels.mxfp4_lanes import PARTS, Lanes
from discover_jax.kernels.mxfp4_tiles import SLABS, Slab, restore, words_shape
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.mxfp4 import BLOCK, dequantise
from discover_jax.models.parameters import Declare
from discover_jax.models.projection import Projection, adapter_product, branch_gain, product, rms_norm


@jax.checkpoint
def _times_packed(x_Ti: jax.Array, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """x W^T of a packed matrix, [T, out]. The backward pass unpacks it again (jax.checkpoint). Otherwise all unpacked experts of a layer
    would be kept, at four times their packed bytes (72 GB for the 120b)."""
    return product(x_Ti, dequantise(blocks, scales, x_Ti.dtype))


@functools.partial(jax.checkpoint, static_argnums=3)
def _times_tiled(x_Ti: jax.Array, words: jax.Array, factors: jax.Array, paired: bool) -> jax.Array:
    """`_times_packed` for a tiled matrix; bit-identical."""
    blocks, scales = restore(words[None], factors[None], paired=paired)
    return product(x_Ti, dequantise(blocks[0], scales[0], x_Ti.dtype))


@functools.partial(jax.checkpoint, static_argnums=3)
def _times_lanes(x_Ti: jax.Array, lanes: jax.Array, powers: jax.Array, out: int) -> jax.Array:
    """`_times_packed` for a matrix in the layout of TPU kernels; bit-identical."""
    blocks, scales = mxfp4_lanes.restore(lanes[None], powers[None], out)
    return product(x_Ti, dequantise(blocks[0], scales[0], x_Ti.dtype))


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
            y = product(x_Ti, one["weight"])
        y += one["bias"].astype(jnp.float32)
        if "lora_a" in one:
            y += adapter_product(x_Ti, one["lora_a"], one["lora_b"], self.scale)
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

    def decode(
        self, x_BTD: jax.Array, repeat: jax.Array, *, adapted: bool, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The output and the chosen experts [B, T, X] for a few tokens a row. Matrices are stacked over repeats; `repeat` selects one.

        Tokens that are not in `valid_BT` get no experts, and their output is 0.
        """
        return self._moe(self.kernels.decode_experts, x_BTD, adapted=adapted, layer=repeat, valid_BT=valid_BT)

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
