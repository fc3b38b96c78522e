"""The decoding layers of a model by `kernels.layer_parts`: what `Model.decode` computes up to the order of sums, in fewer kernels."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from discover_jax.exceptions import ConfigError
from discover_jax.kernels.kernel_set import KernelSet
from discover_jax.kernels.layer_parts import Branch, HeadSizes
from discover_jax.models.cache import Pool
from discover_jax.models.config import ModelConfig
from discover_jax.models.layers import Layer, Repeat
from discover_jax.models.places import TokenPlaces
from discover_jax.models.projection import Projection, stack_of

STACKED = ("norm", "router", "sinks")
"""Parameters that stay stacked over the repeats, because kernels read a layer of them in place."""


class Stream(NamedTuple):
    """The residual stream [T, D] before its last branch is added, float32, and that branch."""

    x_TD: jax.Array
    branch: Branch


def kind_refusal(config: ModelConfig) -> str:
    """Why no kernels of a layer support this kind of model; empty if some may."""
    reasons = [] if config.num_experts else ["models without experts"]
    reasons += ["norms of queries and keys"] if config.qk_norm else []
    return f"kernels of a layer do not support {' and '.join(reasons)}" if reasons else ""


def check_fusable(config: ModelConfig, kernels: KernelSet) -> None:
    """Checks that the kernels of a layer support a model.

    Raises:
      ConfigError: they do not.
    """
    reason = kind_refusal(config)
    if not reason and kernels.layer is not None and kernels.layer.mesh != kernels.mesh:
        reason = "kernels of a layer for one device do not support meshes"
    if reason:
        raise ConfigError(f"KernelSet.layer must be None for this model: {reason}.")


def decode_fused(
    config: ModelConfig,
    layers: Any,
    bind_repeat: Callable[[Any], Repeat],
    x_TD: jax.Array,
    pools: dict[str, Pool],
    at: Mapping[str, TokenPlaces],
    turns: tuple[jax.Array, jax.Array],
    kernels: KernelSet,
    dtype: jax.typing.DTypeLike,
    *,
    adapted: bool,
) -> tuple[Stream, dict[str, Pool], jax.Array]:
    """Reads one token a row in all layers.

    Args:
      config: sizes.
      layers, bind_repeat: slices of the parameters, with those in `STACKED` left out, and a function from one slice to its module.
      x_TD: float32, embeddings of the tokens.
      pools: of each kind of layer.
      at: places of the tokens in them.
      turns: cosines and sines of the tokens' positions, see `rope.turns_of`.
      kernels: `layer` must not be None.
      dtype: of the inputs of products.
      adapted: whether to apply the adapter.

    Returns:
      The stream, the pools with the tokens, and the chosen experts [repeats, layers of the pattern, T, 1, X].
    """

    # The caches are the loop's carry, so that each step writes one place instead of copying them.
    def step(carry: tuple[Stream, dict[str, Pool]], parameters: tuple[jax.Array, Any]):
        (stream, pools), (index, slices) = carry, parameters
        repeat, routes = bind_repeat(slices), []
        for kind in config.pattern:
            layer: Layer = getattr(repeat, kind)
            stream, pool = _attend(config, layer, stream, pools[kind], index, at[kind], turns, kernels, dtype, adapted=adapted)
            stream, index_TX = _feed_forward(config, layer, stream, index, kernels, dtype, adapted=adapted)
            pools = pools | {kind: pool}
            routes.append(index_TX[:, None])
        return (stream, pools), jnp.stack(routes)

    inputs = jnp.arange(config.num_repeats), layers
    start = Stream(x_TD, Branch(jnp.zeros((1, len(x_TD), 1, x_TD.shape[1]), jnp.float32)))
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    (left, _), _ = jax.eval_shape(step, (start, pools), first)  # a repeat leaves a branch of the experts' shape
    start = start._replace(branch=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), left.branch))
    (stream, pools), routes = jax.lax.scan(step, (start, pools), inputs)
    return stream, pools, routes


def _parts(kernels: KernelSet, x_TD: jax.Array, projections: list[Projection], index: jax.Array, *, adapted: bool) -> jax.Array:
    assert kernels.layer is not None, "the caller checks it"
    return kernels.layer.project(x_TD, [stack_of(one, adapted=adapted) for one in projections], index, projections[0].scale)


def _attend(
    config: ModelConfig,
    layer: Layer,
    stream: Stream,
    pool: Pool,
    index: jax.Array,
    at: TokenPlaces,
    turns: tuple[jax.Array, jax.Array],
    kernels: KernelSet,
    dtype: jax.typing.DTypeLike,
    *,
    adapted: bool,
) -> tuple[Stream, Pool]:
    assert kernels.layer is not None, "the caller checks it"
    attention, sizes = layer.attention, HeadSizes(config.num_heads, config.num_kv_heads, config.head_size)
    x_TD, normed_TD = kernels.layer.add_and_norm(*stream, attention.norm[...], index, config.rms_eps, dtype)
    parts_PTo = _parts(kernels, normed_TD, [attention.q, attention.k, attention.v], index, adapted=adapted)
    places = index, at.pages_B, at.places_B
    q_TNH, *written = kernels.layer.rotate_and_write(parts_PTo, turns, pool.keys_LPKsH, pool.values_LPKsH, *places, sizes)
    out_TNH = kernels.layer.attend(q_TNH, *written, index, at.table_BM, at.counts_B, attention.sinks_N)
    out_PTD = _parts(kernels, out_TNH.reshape(len(x_TD), -1).astype(dtype), [attention.o], index, adapted=adapted)
    return Stream(x_TD, Branch(out_PTD[:, :, None])), Pool(*written)


def _feed_forward(
    config: ModelConfig,
    layer: Layer,
    stream: Stream,
    index: jax.Array,
    kernels: KernelSet,
    dtype: jax.typing.DTypeLike,
    *,
    adapted: bool,
) -> tuple[Stream, jax.Array]:
    assert kernels.layer is not None, "the caller checks it"
    experts, chosen = layer.experts, config.experts_per_token
    x_TD, normed_TD = kernels.layer.add_and_norm(*stream, experts.norm[...], index, config.rms_eps, dtype)
    index_TX, weights_TX, rows = kernels.layer.route(normed_TD, stack_of(experts.router, adapted=False), chosen, index)
    options: dict[str, Any] = {"experts": config.num_experts, "adapted": adapted, "layer": index, "rows": rows}
    options |= {"limit": config.swiglu_limit, "alpha": config.swiglu_alpha}
    branch = kernels.layer.experts(normed_TD, index_TX, weights_TX, experts.gate_up, experts.down, **options)
    return Stream(x_TD, branch), index_TX
