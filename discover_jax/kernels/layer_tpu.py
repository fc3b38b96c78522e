"""The parts of a decoding layer of experts on a TPU, in fewer and larger kernels than XLA makes of `layer_parts`.

They were compiled for TPUs and interpreted on a CPU. No TPU has run them. Queries, and the choices of experts, are passed from one part to
the next in the form that its kernel reads.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from discover_jax.kernels import attention_decode_pallas, layer_pallas
from discover_jax.kernels.attention_decode_tpu import choose_pages
from discover_jax.kernels.experts import ExpertMatrix
from discover_jax.kernels.experts_decode_tpu import MOST_COMPARED, moe_packed
from discover_jax.kernels.layer_parts import Branch, HeadSizes, LayerKernels
from discover_jax.kernels.projections import Stack
from discover_jax.kernels.projections_tpu import LANES, MOST_ROWS, choose_outputs, project_together

HEAD_SIZES = (64,)
"""The rotation writes pages [K, H, s], so heads are smaller than the lanes."""
MOST_CHOSEN = 25
"""Experts per token whose numbers and weights fit the lanes."""


def layer_refusal(sizes: HeadSizes, experts_per_token: int, form: str, dtype: Any) -> str:
    """Why these kernels do not support a model; empty if they do.

    Args:
      sizes: of the heads.
      experts_per_token: as the router chooses.
      form: that of the experts' weights, see `models.decoder.Model`.
      dtype: that of the model.
    """
    outs = [count * sizes.size for count in (sizes.heads, sizes.kv_heads)]
    if sizes.size not in HEAD_SIZES:
        return f"the head size is {sizes.size}; the kernels support {', '.join(map(str, HEAD_SIZES))}"
    if not choose_outputs([*outs, outs[1]]):
        return f"queries and keys have {outs[0]} and {outs[1]} values; the kernels support multiples of {LANES}"
    if experts_per_token > MOST_CHOSEN:
        return f"a token has {experts_per_token} experts; the kernels support {MOST_CHOSEN}"
    if form != "lanes" or dtype != jnp.bfloat16:
        return f"the experts' weights are {form} and activations {dtype}; the kernels support packed weights and bfloat16"
    return ""


def most_rows(experts_per_token: int, expert: int) -> int:
    """Limit on the rows of a device, if `expert` devices exchange them."""
    return min(MOST_ROWS, MOST_COMPARED // (experts_per_token * expert))


def add_and_norm(
    x_TD: jax.Array,
    branch: Branch,
    scale_LD: jax.Array,
    layer: jax.Array,
    eps: float,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`layer_parts.add_and_norm` by the kernel, for a branch of one part per row."""
    parts, rows, share, width = branch.parts_PTXD.shape
    assert share == 1, "`experts` has added them"
    assert branch.weights_TX is None, "`experts` has weighed them"
    return layer_pallas.add_and_norm(x_TD, branch.parts_PTXD.reshape(parts, rows, width), scale_LD, layer, eps, dtype, interpret=interpret)


def project(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float, *, interpret: Any = False) -> jax.Array:
    """`projections.parts_reference` by the kernel."""
    return project_together(x_Ti, stacks, layer, scale, interpret=interpret)[None]


def attend(
    q_TKRH: jax.Array,
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_TM: jax.Array,
    counts_T: jax.Array,
    sinks: jax.Array,
    *,
    first_page: jax.Array | int = 0,
    interpret: Any = False,
) -> jax.Array:
    """`layer_parts.attend` by the kernel, for the queries of `layer_pallas.rotate_and_write`.

    `first_page`: int32 scalar, the number of page 0 of the pools.
    """
    (rows, kv_heads, queries, size), (*_, places, _) = q_TKRH.shape, keys_LPKsH.shape
    line, sinks_SN = (0, sinks[None]) if sinks.ndim == 1 else (layer, sinks)
    page_bytes = 2 * kv_heads * places * size * keys_LPKsH.dtype.itemsize
    settings = choose_pages(pages_TM.shape[1], page_bytes, kv_heads * queries, places, 1)
    out_TKRH = attention_decode_pallas.attend(
        q_TKRH,
        keys_LPKsH.swapaxes(3, 4),
        values_LPKsH.swapaxes(3, 4),
        layer,
        pages_TM.astype(jnp.int32),
        counts_T.astype(jnp.int32),
        sinks_SN,
        dataclasses.replace(settings, interpret=interpret),
        line=line,
        first_page=first_page,
    )
    return out_TKRH[:, :, : sinks_SN.shape[1] // kv_heads].reshape(rows, -1, size)


def route(
    x_TD: jax.Array, router: Stack, experts_per_token: int, layer: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, None, jax.Array]:
    """`layer_parts.route` by the kernel. In place of weights and sorted rows, it returns what `experts` needs."""
    index_TX, sent_TW = layer_pallas.route(x_TD, router, experts_per_token, layer, interpret=interpret)
    return index_TX, None, sent_TW


def experts(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: None,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    experts: int,
    adapted: bool,
    limit: float,
    alpha: float,
    layer: jax.Array,
    rows: jax.Array,
    axis: str = "",
    interpret: Any = False,
) -> Branch:
    """`layer_parts.experts` by the kernels, with the exchange of tokens along a mesh axis.

    Args:
      x_TD, index_TX, weights_TX: only their shapes matter: `rows` has the tokens.
      gate_up, down, experts, adapted, limit, alpha, layer: see `MixtureOfExperts`; of this device.
      rows: inputs and choices of this device's tokens, from `route`.
      axis: name of the mesh axis along which other devices have other experts; empty without.
      interpret: as for `pallas_call`.
    """
    del weights_TX
    share, width = index_TX.shape[1], x_TD.shape[1]
    up, low = gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted)
    options: dict[str, Any] = {
        "scales": (gate_up.scale, down.scale),
        "limit": limit,
        "alpha": alpha,
        "layer": layer,
        "interpret": interpret,
    }
    if not axis:
        return Branch(moe_packed(rows, share, up, low, experts=experts, **options)[:, :, None])
    rows = lax.all_gather(rows, axis, tiled=True)
    others = {"first": experts * lax.axis_index(axis), "elsewhere": experts * (lax.axis_size(axis) - 1)}
    parts_CTM = moe_packed(rows, share, up, low, experts=experts, **options, **others)
    sum_TD = lax.psum_scatter(parts_CTM.sum(axis=0)[:, :width], axis, tiled=True)
    return Branch(sum_TD[None, :, None])


KERNELS = LayerKernels(
    add_and_norm=add_and_norm,
    project=project,
    rotate_and_write=layer_pallas.rotate_and_write,
    attend=attend,
    route=route,
    experts=experts,
)
