"""Linear projections with adapters, applied unmerged: y = x W^T + b + (alpha / rank) (x A^T) B^T. Also the norm before them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from discover_jax.kernels.projections import Stack
from discover_jax.models.config import ModelConfig
from discover_jax.models.parameters import Declare


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Root-mean-square norm in float32, scaled and then cast to `dtype` (default: x's type)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype if dtype is None else dtype)


@jax.custom_vjp
def product(x: jax.Array, weight_oi: jax.Array) -> jax.Array:
    """x W^T in float32. Weights and the result's gradient are cast to x's type: float32 products take twice as long, and would need a cast
    of x."""
    return jnp.einsum("...i,oi->...o", x, weight_oi.astype(x.dtype), preferred_element_type=jnp.float32)


def _product_forward(x: jax.Array, weight_oi: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, weight_oi), (x, weight_oi)


def _product_backward(residuals: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_oi = residuals
    d_y = d_y.astype(x.dtype)
    d_x = jnp.einsum("...o,oi->...i", d_y, weight_oi.astype(x.dtype), preferred_element_type=jnp.float32)
    d_weight_oi = jnp.einsum("...o,...i->oi", d_y, x, preferred_element_type=jnp.float32)  # XLA removes it if unused
    return d_x.astype(x.dtype), d_weight_oi.astype(weight_oi.dtype)


product.defvjp(_product_forward, _product_backward)


def adapter_product(x: jax.Array, a_ri: jax.Array, b_or: jax.Array, scale: float) -> jax.Array:
    """scale (x A^T) B^T in float32, rounded to x's type between the two products."""
    # Without the barrier, XLA merges A and the weights into one product and copies both at each use (1.2 GB for the head).
    x = jax.lax.optimization_barrier(x)
    return product((scale * product(x, a_ri)).astype(x.dtype), b_or)


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
        y = product(x, weight_oi)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        if adapted and self.lora_a is not None and self.lora_b is not None:
            y += adapter_product(x, self.lora_a[...], self.lora_b[...], self.scale)
        return y.astype(x.dtype if out_dtype is None else out_dtype)

    def arrays(self, *, adapted: bool, weight_oi: jax.Array | None = None) -> dict[str, jax.Array]:
        """The arrays of a `kernels.projections.Stack` that the projection has. `weight_oi`: of a tied projection."""
        weight = weight_oi if self.weight is None else self.weight[...]
        assert weight is not None, "a tied projection needs the weight"
        found = {"weight": weight} | ({} if self.bias is None else {"bias": self.bias[...]})
        if adapted and self.lora_a is not None and self.lora_b is not None:
            found |= {"lora_a": self.lora_a[...], "lora_b": self.lora_b[...]}
        return found


def stack_of(projection: Projection, *, adapted: bool) -> Stack:
    """The arrays of a projection whose stacks are bound."""
    return Stack(**projection.arrays(adapted=adapted))


def project_stacked(
    project: Callable[..., list[jax.Array]], projections: list[Projection], x: jax.Array, layer: jax.Array, *, adapted: bool
) -> list[jax.Array]:
    """Projects x [..., in] by one layer of stacked weights with the kernel `project`. Returns float32 [..., out] for each projection."""
    stacks = [stack_of(one, adapted=adapted) for one in projections]
    ys = project(x.reshape(-1, x.shape[-1]), stacks, layer, projections[0].scale)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def branch_gain(config: ModelConfig) -> float:
    """Gain of the last weights of a residual branch (two a layer): the stream's variance does not grow with depth (as in GPT-2)."""
    return (2 * config.num_layers) ** -0.5
