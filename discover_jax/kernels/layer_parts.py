"""The parts of a decoding layer whose kernels can be fused with their neighbours', in plain JAX.

Between the large kernels of a layer, XLA runs about a dozen small ones: they add the parts of a projection, add a branch to the residual
stream, normalise, rotate, write keys and values, and slice the layer's small arrays out of their stacks. With one row, they take longer to
start than to run. A fused kernel reads the parts that the large kernel before it has written, and the stacks in place.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from discover_jax.kernels.attention import paged_attention_reference
from discover_jax.kernels.expert_rows import Blocks
from discover_jax.kernels.experts import ExpertMatrix, moe_reference, route_top
from discover_jax.kernels.pages import write_token
from discover_jax.kernels.projections import Stack, parts_reference


class Branch(NamedTuple):
    """A residual branch that is not yet added to the stream: the sum over p and x of weights[t, x] * parts[p, t, x].

    Attributes:
      parts_PTXD: float32.
      weights_TX: float32; None for weights of 1.
    """

    parts_PTXD: jax.Array
    weights_TX: jax.Array | None = None


class HeadSizes(NamedTuple):
    """Numbers of query heads and of key/value heads, and their size."""

    heads: int
    kv_heads: int
    size: int


def add_and_norm(
    x_TD: jax.Array, branch: Branch, scale_LD: jax.Array, layer: jax.Array, eps: float, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """The stream with the branch added, float32 [T, D], and its root-mean-square norm, scaled by one layer's `scale_LD`, in `dtype`."""
    parts_PTXD = branch.parts_PTXD if branch.weights_TX is None else branch.parts_PTXD * branch.weights_TX[..., None]
    x_TD = x_TD + parts_PTXD.sum(axis=(0, 2))
    normed_TD = x_TD * jax.lax.rsqrt(jnp.mean(jnp.square(x_TD), axis=-1, keepdims=True) + eps)
    scale_D = jax.lax.dynamic_index_in_dim(scale_LD, layer, keepdims=False)
    return x_TD, (normed_TD * scale_D.astype(jnp.float32)).astype(dtype)


def rotate_and_write(
    parts_PTo: jax.Array,
    turns: tuple[jax.Array, jax.Array],
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_T: jax.Array,
    places_T: jax.Array,
    sizes: HeadSizes,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates queries and keys, and writes keys and values into their pages.

    Args:
      parts_PTo: float32; their sum over P is the projection of queries, keys and values, side by side.
      turns: cosines and sines of each token's angles, float32 [T, H/2].
      keys_LPKsH, values_LPKsH, layer, pages_T, places_T: see `pages.write_token`. Page numbers are not negative.
      sizes: of the heads.

    Returns:
      Queries [T, N, H] in the pools' dtype, and both pools. The projection is rounded to that dtype before the rotation and after it.
    """
    dtype, (heads, kv_heads, size) = keys_LPKsH.dtype, sizes
    y_TNH = parts_PTo.sum(axis=0).astype(dtype).reshape(len(pages_T), -1, size)
    q_TNH, k_TKH, v_TKH = jnp.split(y_TNH, [heads, heads + kv_heads], axis=1)
    cos_T1h, sin_T1h = (turn_Th[:, None] for turn_Th in turns)

    def rotate(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos_T1h - second * sin_T1h, second * cos_T1h + first * sin_T1h], axis=-1).astype(dtype)

    pools = write_token(keys_LPKsH, values_LPKsH, layer, pages_T, places_T, rotate(k_TKH), v_TKH)
    return rotate(q_TNH), *pools


def attend(
    q_TNH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_TM: jax.Array,
    counts_T: jax.Array,
    sinks: jax.Array,
) -> jax.Array:
    """`attention.paged_attention_reference` with the sinks of all layers, [L, N]; or of this layer, [N], if the model has none."""
    sinks_N = sinks if sinks.ndim == 1 else jax.lax.dynamic_index_in_dim(sinks, layer, keepdims=False)
    return paged_attention_reference(q_TNH, keys_LPKsH, values_LPKsH, layer, pages_TM, counts_T, sinks_N)


def route(x_TD: jax.Array, router: Stack, experts_per_token: int, layer: jax.Array) -> tuple[jax.Array, jax.Array, Blocks | None]:
    """Router and choice: see `experts.route_reference`."""
    logits_TE = parts_reference(x_TD, [router], layer, 0.0)[0]
    return *route_top(logits_TE, experts_per_token), None


def experts(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    rows: Blocks | None,
    **options: Any,
) -> Branch:
    """`experts.moe_reference` as a branch. `rows` are the sorted choices, if they are known."""
    del rows
    return Branch(moe_reference(x_TD, index_TX, weights_TX, gate_up, down, **options)[None, :, None])


@dataclasses.dataclass(frozen=True)
class LayerKernels:
    """One implementation of each part of a decoding layer. The defaults are the references.

    What `route` returns after the experts of each token is for `experts`, in a form that both know.
    `mesh` has the devices over which the parts are spread; None for one device. `most_rows` is the limit on the rows of a device. For
    more rows, the separate operations are used.
    """

    add_and_norm: Callable[..., tuple[jax.Array, jax.Array]] = add_and_norm
    project: Callable[[jax.Array, Sequence[Stack], jax.Array, float], jax.Array] = parts_reference
    rotate_and_write: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] = rotate_and_write
    attend: Callable[..., jax.Array] = attend
    route: Callable[..., tuple[jax.Array, Any, Any]] = route
    experts: Callable[..., Branch] = experts
    mesh: Any = None
    most_rows: int = 2**30
