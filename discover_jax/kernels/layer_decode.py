"""The parts of a decoding layer on a GPU, in fewer and larger kernels than XLA makes of `layer_parts`. Needs the extra `cuda`."""

import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.exceptions import ConfigError
from discover_jax.kernels import layer_parts, layer_triton
from discover_jax.kernels.attention_decode import HEAD_SIZES, paged_attention
from discover_jax.kernels.expert_rows import Blocks
from discover_jax.kernels.experts import ExpertMatrix
from discover_jax.kernels.experts_decode import moe_parts, tiled_matrices
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.layer_parts import Branch, HeadSizes, LayerKernels
from discover_jax.kernels.projections import Stack, parts_reference
from discover_jax.kernels.projections_decode import MOST_ROWS, project_parts
from discover_jax.kernels.route_decode import route_parts, route_sorted
from discover_jax.kernels.triton_call import call_kernel, power_of_two

FUSIONS = ("norm", "rotation", "router")
"""What one kernel computes. norm: sums of parts, residual and norm. rotation: sums of parts, rotation and writing. router: the projections'
kernel computes the logits, and the choice adds their parts."""
HEADS = 8
"""Limit on the heads that one kernel instance rotates."""


def layer_refusal(sizes: HeadSizes, experts_per_token: int, form: str, dtype: Any) -> str:
    """Why these kernels do not support a model; empty if they do. See `layer_tpu.layer_refusal`."""
    del experts_per_token  # any number
    if sizes.size not in HEAD_SIZES:
        return f"the head size is {sizes.size}; the kernels support {' and '.join(map(str, HEAD_SIZES))}"
    if form != "tiled" or dtype != jnp.bfloat16:
        return f"the experts' weights are {form} and activations {dtype}; the kernels support tiled weights and bfloat16"
    return ""


def most_rows(experts_per_token: int, expert: int) -> int:
    """Limit on the rows: for more, XLA computes the projections in both paths, and nothing was measured. See `layer_tpu.most_rows`."""
    del experts_per_token, expert
    return MOST_ROWS


def _vector(layer: jax.Array) -> jax.Array:
    return jnp.asarray(layer, jnp.int32).reshape(1)


def add_and_norm(
    x_TD: jax.Array, branch: Branch, scale_LD: jax.Array, layer: jax.Array, eps: float, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """`layer_parts.add_and_norm` by the kernel."""
    (tokens, width), (parts, _, share, _) = x_TD.shape, branch.parts_PTXD.shape
    block = power_of_two(width)
    weights = x_TD if branch.weights_TX is None else branch.weights_TX.astype(jnp.float32)
    sizes = {"D": width, "BLOCK": block, "PARTS": parts, "X": share}
    return call_kernel(
        layer_triton.add_and_norm,
        *(x_TD, branch.parts_PTXD, weights, scale_LD, _vector(layer), tokens),
        out=[jax.ShapeDtypeStruct(x_TD.shape, jnp.float32), jax.ShapeDtypeStruct(x_TD.shape, dtype)],
        grid=(tokens,),
        warps=max(1, min(8, block // 256)),
        stages=1,
        constants={**sizes, "WEIGHTED": branch.weights_TX is not None, "EPS": eps},
    )


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
    """`layer_parts.rotate_and_write` by the kernel, in the pools' memory, for pools of bfloat16; else by plain JAX."""
    arguments = parts_PTo, turns, keys_LPKsH, values_LPKsH, layer, pages_T, places_T, sizes
    if keys_LPKsH.dtype != jnp.bfloat16 or sizes.size & (sizes.size - 1):
        warn_reference(
            "rotate_and_write", f"keys are {keys_LPKsH.dtype} and heads have {sizes.size} values; it needs bfloat16 and a power of 2"
        )
        return layer_parts.rotate_and_write(*arguments)
    parts, tokens, _ = parts_PTo.shape
    _, pool, kv_heads, page, size = keys_LPKsH.shape
    each = math.gcd(sizes.heads, kv_heads, HEADS)
    constants = {"N": sizes.heads, "K": kv_heads, "H": size, "HEADS": each, "PARTS": parts, "POOL": pool, "PAGE": page}
    q_TNH = jax.ShapeDtypeStruct((tokens, sizes.heads, size), jnp.bfloat16)
    pools = keys_LPKsH, values_LPKsH
    return call_kernel(
        layer_triton.rotate_and_write,
        *(parts_PTo, *turns, *pools, _vector(layer), pages_T, places_T, tokens),
        out=(q_TNH, *(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in pools)),
        grid=(tokens, (sizes.heads + 2 * kv_heads) // each),
        warps=1,
        stages=1,
        constants=constants,
        aliases={3: 1, 4: 2},
    )


def route(x_TD: jax.Array, router: Stack, experts_per_token: int, layer: jax.Array) -> tuple[jax.Array, jax.Array, Blocks]:
    """`layer_parts.route` in two or three kernels, which also sort the choices."""
    return route_parts(project_parts(x_TD, [router], layer, 0.0), experts_per_token, layer)


def route_separately(
    x_TD: jax.Array, router: Stack, experts_per_token: int, layer: jax.Array
) -> tuple[jax.Array, jax.Array, Blocks | None]:
    """`layer_parts.route` as without the fusion: XLA computes the logits, and a kernel chooses and sorts where it is faster."""
    return route_sorted(parts_reference(x_TD, [router], layer, 0.0)[0], experts_per_token, layer)


def attend(*arguments: jax.Array) -> jax.Array:
    """`layer_parts.attend` by the kernels; for other pools and heads than theirs, by plain JAX."""
    return paged_attention(*arguments, reference=layer_parts.attend)


def experts(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    experts: int,
    adapted: bool,
    layer: jax.Array,
    limit: float,
    alpha: float,
    rows: Blocks | None,
) -> Branch:
    """`layer_parts.experts` by the kernels; the caller weighs and adds the experts of a token. For other matrices, by plain JAX."""
    options: dict[str, Any] = {"limit": limit, "alpha": alpha, "layer": layer, "rows": rows}
    tiled = tiled_matrices(gate_up, down, adapted=adapted)
    if tiled is None:
        return layer_parts.experts(x_TD, index_TX, weights_TX, gate_up, down, experts=experts, adapted=adapted, **options)
    return Branch(moe_parts(x_TD, index_TX, *tiled, **options), weights_TX)


def fused(names: Collection[str] = FUSIONS) -> LayerKernels:
    """The kernels with these of the `FUSIONS`. Projections, attention and experts always use their kernels.

    Raises:
      ConfigError: a name is unknown.
    """
    if unknown := set(names) - set(FUSIONS):
        raise ConfigError(f"Unknown fusions: {', '.join(sorted(unknown))}; allowed: {', '.join(FUSIONS)}.")
    return LayerKernels(
        add_and_norm=add_and_norm if "norm" in names else layer_parts.add_and_norm,
        project=project_parts,
        rotate_and_write=rotate_and_write if "rotation" in names else layer_parts.rotate_and_write,
        attend=attend,
        route=route if "router" in names else route_separately,
        experts=experts,
    )


KERNELS = fused()
"""On an H200, a step of the 120b is 7% faster than with the separate kernels with one row, and 1.4% with 128 rows."""
