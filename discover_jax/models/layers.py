"""The layers of a decoder as flax.nnx modules, and the decoder that has them.

Modules contain declarations (see models.parameters) until `Model` binds arrays to them.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from discover_jax.kernels.kernel_set import KernelSet
from discover_jax.models.attention import Attention
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.experts import Experts
from discover_jax.models.parameters import Declare
from discover_jax.models.projection import Projection, branch_gain, project_stacked, rms_norm


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
