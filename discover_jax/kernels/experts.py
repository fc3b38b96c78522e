"""The mixture of experts' arithmetic: routed, gated, weighted. The plain-JAX reference, exact and dropless for any routing."""

from typing import Protocol

import jax
import jax.numpy as jnp


def gated(h_xF2: jax.Array, *, limit: float, alpha: float) -> jax.Array:
    """gpt-oss's activation [..., 2F] -> [..., F]: even columns gate, odd columns up; (up + 1) gate sigmoid(alpha gate), both clamped."""
    gate, up = h_xF2[..., 0::2], h_xF2[..., 1::2]
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def route_top(logits_TE: jax.Array, experts_per_token: int) -> tuple[jax.Array, jax.Array]:
    """Each token's experts, int32 [T, X], and their weights [T, X] float32: a softmax over the largest logits."""
    top_TX, index_TX = jax.lax.top_k(logits_TE.astype(jnp.float32), experts_per_token)
    return index_TX, jax.nn.softmax(top_TX, axis=-1)


def route(logits_TE: jax.Array, experts_per_token: int) -> jax.Array:
    """Weights [T, E] float32: softmax over each token's largest logits, 0 for the other experts."""
    index_TX, weights_TX = route_top(logits_TE, experts_per_token)
    return jnp.sum(jax.nn.one_hot(index_TX, logits_TE.shape[-1]) * weights_TX[..., None], axis=-2)


class ExpertMatrix(Protocol):
    """One matrix of every expert, with bias and adapter: its arrays [E, ...], and the product of one expert's slice of them with rows."""

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]: ...

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array: ...


def mix_reference(
    x_TD: jax.Array,
    weights_TE: jax.Array,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    adapted: bool,
    limit: float,
    alpha: float,
    active: int | None = None,
) -> jax.Array:
    """sum_e weights[t, e] * down_e(act(gate_up_e(x_t))), [T, D] in x's type, summed in float32.

    Every expert sees every row, one expert after another: experts / active times the needed arithmetic, but exact for any routing, and
    only one expert is ever unpacked at a time. Meant for small models on a CPU and as the yardstick of faster kernels. `active`, the most
    experts that a token has weights for, means nothing here.
    """
    del active

    def add(total_TD: jax.Array, one: tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]) -> tuple[jax.Array, None]:
        weight_T, up, low = one
        out_TD = down.apply(gated(gate_up.apply(x_TD, up), limit=limit, alpha=alpha), low)
        return total_TD + weight_T[:, None] * out_TD.astype(jnp.float32), None

    slices = (weights_TE.T, gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted))
    total_TD, _ = jax.lax.scan(add, jnp.zeros(x_TD.shape, jnp.float32), slices)
    return total_TD.astype(x_TD.dtype)
