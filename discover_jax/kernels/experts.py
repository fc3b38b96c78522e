"""The mixture of experts in plain JAX: routing, activation, and the reference. Exact and dropless for any routing."""

from typing import Protocol

import jax
import jax.numpy as jnp

from discover_jax.kernels.expert_rows import Blocks


def gated(h_xF2: jax.Array, *, limit: float, alpha: float) -> jax.Array:
    """gpt-oss's activation [..., 2F] -> [..., F]: even columns gate, odd columns up; (up + 1) gate sigmoid(alpha gate), both clamped."""
    return activate(h_xF2[..., 0::2], h_xF2[..., 1::2], limit=limit, alpha=alpha)


def activate(gate: jax.Array, up: jax.Array, *, limit: float, alpha: float) -> jax.Array:
    """`gated` of separate gates and ups of one shape. May be called inside a Pallas kernel."""
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def route_top(logits_TE: jax.Array, experts_per_token: int) -> tuple[jax.Array, jax.Array]:
    """Each token's experts, int32 [T, X], and their weights [T, X] float32: a softmax over the largest logits."""
    top_TX, index_TX = jax.lax.top_k(logits_TE.astype(jnp.float32), experts_per_token)
    return index_TX, jax.nn.softmax(top_TX, axis=-1)


def route_reference(logits_TE: jax.Array, experts_per_token: int, layer: jax.Array | int) -> tuple[jax.Array, jax.Array, Blocks | None]:
    """`route_top` in decoding, and None: the experts' kernel sorts the choices itself.

    A kernel that also sorts them returns the rows instead, for this layer of a stack; see `expert_rows_decode.sort_rows_of_layer`.
    """
    del layer
    return *route_top(logits_TE, experts_per_token), None


def route_along(logits_TE: jax.Array, index_TX: jax.Array) -> jax.Array:
    """The weights [T, X] float32 of given experts: a softmax over their logits."""
    return jax.nn.softmax(jnp.take_along_axis(logits_TE.astype(jnp.float32), index_TX, axis=-1), axis=-1)


class ExpertMatrix(Protocol):
    """One matrix of every expert, with bias and adapter."""

    scale: float
    """The adapter's alpha / rank; 0 without an adapter."""

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        """The arrays [E, ...], or [L, E, ...] for a stack of layers. Omits the adapter's if not `adapted`."""
        ...

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array:
        """The float32 product of rows and one expert's slice of `arrays`."""
        ...


class MixtureOfExperts(Protocol):
    """An implementation of one layer's experts: the reference, or the kernels of decoding or of the update."""

    def __call__(
        self,
        x_TD: jax.Array,
        index_TX: jax.Array,
        weights_TX: jax.Array,
        gate_up: ExpertMatrix,
        down: ExpertMatrix,
        *,
        experts: int,
        adapted: bool,
        limit: float,
        alpha: float,
        layer: jax.Array | None = None,
        elsewhere: int = 0,
    ) -> jax.Array:
        """sum_x weights[t, x] * down_e(act(gate_up_e(x_t))), e = index[t, x]: [T, D] float32. Only the activation is rounded to x's dtype.

        Args:
          x_TD: activations.
          index_TX, weights_TX: the experts of each token, all different, and their weights. The number `experts` stands for an expert on
            another device, or for none; it may occur several times and adds nothing.
          gate_up, down: the matrices of all experts on this device.
          experts: number of experts on this device.
          adapted: whether to apply the adapters.
          limit, alpha: of the activation, see `gated`.
          layer: int32 scalar, the layer to use if the matrices' arrays are stacks [L, E, ...].
          elsewhere: number of experts on other devices, at least 1 if `index_TX` has the number `experts`. Kernels estimate from it how
            many choices are for this device.
        """
        ...


def moe_reference(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    experts: int,
    adapted: bool,
    limit: float,
    alpha: float,
    layer: jax.Array | None = None,
    elsewhere: int = 0,
) -> jax.Array:
    """The reference of `MixtureOfExperts`: every expert computes every row, one expert after another.

    This costs experts / active times the necessary arithmetic, but it is exact for any routing and unpacks only one expert at a time. Use
    it for small models on a CPU and for tests of the kernels.
    """
    del elsewhere

    def add(total_TD: jax.Array, one: tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]) -> tuple[jax.Array, None]:
        weight_T, up, low = one
        active_TF = gated(gate_up.apply(x_TD, up), limit=limit, alpha=alpha).astype(x_TD.dtype)
        return total_TD + weight_T[:, None] * down.apply(active_TF, low), None

    weights_TE = jnp.sum(jax.nn.one_hot(index_TX, experts) * weights_TX[..., None], axis=-2)
    up, low = gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted)
    if layer is not None:
        up, low = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), (up, low))
    total_TD, _ = jax.lax.scan(add, jnp.zeros(x_TD.shape, jnp.float32), (weights_TE.T, up, low))
    return total_TD
