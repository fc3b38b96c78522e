"""Pallas kernels for TPUs of the small operations of a decoding layer: norms, rotation with writing, and the router with its choice.

XLA runs about 40 small operations in their place, and estimates at least 1.2 us for each. The kernels were compiled for TPUs and
interpreted on a CPU. No TPU has run them.

Dimensions: T rows, D width, P parts, L layers, N query heads, K key/value heads, R query heads of one (padded to 8), H head size,
E experts, X experts per token.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.dot_pallas import dot
from discover_jax.kernels.expert_steps_tpu import packed_column, put_choices
from discover_jax.kernels.layer_parts import HeadSizes
from discover_jax.kernels.pages_tpu import AT_ONCE, LANES, call_in_place, write_tokens
from discover_jax.kernels.parts_pallas import line_of, scalar, whole
from discover_jax.kernels.projections import Stack
from discover_jax.kernels.projections_tpu import outputs_along_lanes

ROWS = 128
"""Rows that one step of a grid normalises."""
_MEMORY = 64 * 2**20


# ---------------------------------------------------------------------- norm


def _add_and_norm(layer_1: Any, x_TD: Any, parts_PTD: Any, scale_LD: Any, sum_TD: Any, normed_TD: Any, *, eps: float) -> None:
    width = x_TD.shape[1]
    x = x_TD[...] + sum((parts_PTD[part, :, :width] for part in range(1, parts_PTD.shape[0])), parts_PTD[0, :, :width])
    sum_TD[...] = x
    normed = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + eps)
    normed_TD[...] = (normed * line_of(scale_LD, layer_1[0])).astype(normed_TD.dtype)


def add_and_norm(
    x_TD: jax.Array,
    parts_PTD: jax.Array,
    scale_LD: jax.Array,
    layer: jax.Array,
    eps: float,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`layer_parts.add_and_norm` of a branch without weights. The parts may be wider than the stream; the rest is not read.

    `interpret`: as for `pallas_call`.
    """
    (tokens, width), (parts, _, wide) = x_TD.shape, parts_PTD.shape
    rows = min(tokens, ROWS)
    own = pl.BlockSpec((rows, width), lambda block, layer_1: (block, 0))
    return pl.pallas_call(
        functools.partial(_add_and_norm, eps=eps),
        out_shape=(jax.ShapeDtypeStruct(x_TD.shape, jnp.float32), jax.ShapeDtypeStruct(x_TD.shape, dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-tokens // rows),),
            in_specs=[
                own,
                pl.BlockSpec((parts, rows, wide), lambda block, layer_1: (0, block, 0)),
                whole(*scale_LD.shape),
            ],
            out_specs=(own, own),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_MEMORY),
        interpret=interpret,
        name="layer_norm",
    )(scalar(layer), x_TD, parts_PTD, scale_LD)


# ---------------------------------------------------------------------- rotation and writing


def _rotated(y: jax.Array, cos: jax.Array, sin: jax.Array, half: int) -> jax.Array:
    """Heads side by side along the lanes, rotated; see `rope.rotate`. `sin` is negative for the first half of a head."""
    first = lax.rem(lax.broadcasted_iota(jnp.int32, y.shape, 1), 2 * half) < half
    other = jnp.where(first, pltpu.roll(y, LANES - half, 1), pltpu.roll(y, half, 1))
    return y * cos + other * sin


def _rotate_and_write(
    layer_1, first_page_1, pages_T, places_T, parts_PTo, cos_Th, sin_Th, _keys, _values, q_TKRH, keys, values, turned_To, new_2nT,
    buffers, loaded, stored,
    *, sizes: HeadSizes,
) -> None:  # fmt: skip
    (heads, kv_heads, size), tokens, dtype = sizes, parts_PTo.shape[1], keys.dtype
    cos, sin = cos_Th[...], sin_Th[...]
    repeats = LANES // size
    cos, sin = jnp.concatenate([cos, cos] * repeats, axis=1), jnp.concatenate([-sin, sin] * repeats, axis=1)
    for begin in range(0, parts_PTo.shape[2], LANES):
        at = slice(begin, begin + LANES)
        y = parts_PTo[0, :, at]
        for part in range(1, parts_PTo.shape[0]):
            y += parts_PTo[part, :, at]
        y = y.astype(dtype).astype(jnp.float32)
        turned = begin < (heads + kv_heads) * size
        turned_To[:tokens, at] = _rotated(y, cos, sin, size // 2) if turned else y
    _spread_heads(turned_To, q_TKRH, heads // kv_heads)
    for n in range(2):
        begin = (heads + n * kv_heads) * size
        for block in range(0, tokens, LANES):
            block_nT = turned_To[block : block + LANES, begin : begin + kv_heads * size].T
            new_2nT[n, :, :, block : block + LANES] = block_nT.reshape(kv_heads, size, LANES).astype(dtype)
    new = new_2nT.at[0], new_2nT.at[1]
    write_tokens(layer_1[0], first_page_1[0], pages_T, places_T, *new, keys, values, buffers, loaded, stored)


def _spread_heads(turned_To: Any, q_TKRH: Any, group: int) -> None:
    """Moves query heads from the lanes to the sublanes."""
    tokens, kv_heads, queries, size = q_TKRH.shape
    share = LANES // size
    line = lax.broadcasted_iota(jnp.int32, (queries, LANES), 0)

    def one(token: Any, _: None) -> None:
        row_1o = turned_To[pl.ds(token, 1)]  # a whole row: Mosaic does not load a part of a row that is chosen at run time
        for k in range(kv_heads):
            wide = jnp.zeros((queries, LANES), jnp.float32)
            for g in range(group):
                begin = (k * group + g) // share * LANES
                wide = jnp.where(line == g, row_1o[:, begin : begin + LANES], wide)
            found = wide
            for place in range(1, share):  # a register of lanes has `share` heads
                here = (lax.rem(line + k * group, share) == place) & (line < group)
                found = jnp.where(here, pltpu.roll(wide, LANES - place * size, 1), found)
            q_TKRH[token, k] = found[:, :size].astype(q_TKRH.dtype)

    lax.fori_loop(0, tokens, one, None)


def rotate_and_write(
    parts_PTo: jax.Array,
    turns: tuple[jax.Array, jax.Array],
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_T: jax.Array,
    places_T: jax.Array,
    sizes: HeadSizes,
    *,
    first_page: jax.Array | int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`layer_parts.rotate_and_write` for heads smaller than the lanes, with the queries as `attention_decode_pallas.attend` reads them.

    Args:
      parts_PTo, turns, keys_LPKsH, values_LPKsH, layer, pages_T, places_T, sizes: see there. LANES is a multiple of the head size.
      first_page: int32 scalar, the number of page 0 of the pools.
      interpret: as for `pallas_call`.
    """
    heads, kv_heads, size = sizes
    _, tokens, out = parts_PTo.shape
    padded, queries = -(-tokens // LANES) * LANES, -(-(heads // kv_heads) // 8) * 8

    q = jax.ShapeDtypeStruct((tokens, kv_heads, queries, size), keys_LPKsH.dtype)
    scratch = [
        pltpu.VMEM((padded, out), jnp.float32),
        pltpu.VMEM((2, kv_heads, size, padded), keys_LPKsH.dtype),
        pltpu.VMEM((AT_ONCE, 2, kv_heads, size, LANES), keys_LPKsH.dtype),
        *[pltpu.SemaphoreType.DMA((AT_ONCE,))] * 2,
    ]
    (q,), pools = call_in_place(
        functools.partial(_rotate_and_write, sizes=sizes),
        "rotate_and_write",
        (scalar(layer), scalar(first_page), pages_T.astype(jnp.int32), places_T.astype(jnp.int32)),
        (parts_PTo, *turns),
        [whole(*parts_PTo.shape), *(whole(*turn.shape) for turn in turns)],
        (keys_LPKsH, values_LPKsH),
        scratch,
        interpret,
        more=[(q, whole(*q.shape))],
    )
    return q, *pools


# ---------------------------------------------------------------------- router and choice


def _ordered(bits: jax.Array) -> jax.Array:
    """Swaps a float32's bits and an integer of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _route(layer_1: Any, x_TD: Any, weight: Any, bias_LE: Any, index_XT: Any, sent_TW: Any, *, along_lanes: bool) -> None:
    (tokens, width), experts, share = x_TD.shape, bias_LE.shape[1], index_XT.shape[0]
    logits = dot(x_TD[...], weight[...].astype(x_TD.dtype), (1, 0) if along_lanes else (1, 1)) + line_of(bias_LE, layer_1[0])
    least = jnp.int32(-(2**31))
    expert_TE = lax.broadcasted_iota(jnp.int32, (tokens, experts), 1)
    ranks_TE = _ordered(lax.bitcast_convert_type(logits, jnp.int32))
    chosen, values = [], []
    for _ in range(share):
        best_T1 = jnp.max(ranks_TE, axis=1, keepdims=True)
        index_T1 = jnp.min(jnp.where(ranks_TE == best_T1, expert_TE, experts), axis=1, keepdims=True)
        ranks_TE = jnp.where(expert_TE == index_T1, least, ranks_TE)
        chosen.append(index_T1)
        values.append(lax.bitcast_convert_type(_ordered(best_T1), jnp.float32))
    powers = [jnp.exp(value - values[0]) for value in values]
    total = sum(powers[1:], powers[0])
    diagonal = lax.broadcasted_iota(jnp.int32, (tokens, tokens), 0) == lax.broadcasted_iota(jnp.int32, (tokens, tokens), 1)
    for x, index_T1 in enumerate(chosen):
        index_XT[x : x + 1] = jnp.sum(jnp.where(diagonal, index_T1, 0), axis=0, keepdims=True)
    begin = packed_column(width)
    sent_TW[:, :width] = x_TD[...]
    if begin > width:
        sent_TW[:, width:begin] = jnp.zeros((tokens, begin - width), sent_TW.dtype)
    choices = put_choices(chosen, [power / total for power in powers])
    sent_TW[:, begin:] = choices.astype(sent_TW.dtype)


def route(
    x_TD: jax.Array, router: Stack, experts_per_token: int, layer: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """The experts of each token, int32 [T, X], and what the experts' devices need: the tokens' inputs and choices, see `put_choices`.

    The choice is that of `jax.lax.top_k`: logits in the total order of their bits, the lower expert first among equal ones.

    Args:
      x_TD, router, experts_per_token, layer: see `layer_parts.route`. The router has a bias.
      interpret: as for `pallas_call`.
    """
    (tokens, width), (_, experts, _) = x_TD.shape, router.weight.shape
    assert router.bias is not None, "the caller checks it"
    along_lanes = outputs_along_lanes(experts, width)
    weight = router.weight.swapaxes(1, 2) if along_lanes else router.weight

    wide = packed_column(width) + LANES
    index_XT, sent_TW = pl.pallas_call(
        functools.partial(_route, along_lanes=along_lanes),
        out_shape=(jax.ShapeDtypeStruct((experts_per_token, tokens), jnp.int32), jax.ShapeDtypeStruct((tokens, wide), x_TD.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[
                whole(tokens, width),
                pl.BlockSpec((None, *weight.shape[1:]), lambda step, layer_1: (layer_1[0], 0, 0)),
                whole(*router.bias.shape),
            ],
            out_specs=(whole(experts_per_token, tokens), whole(tokens, wide)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_MEMORY),
        interpret=interpret,
        name="route_decode",
    )(scalar(layer), x_TD, weight, router.bias)
    return index_XT.T, sent_TW  # XLA stores the experts of all layers with the tokens along the lanes
