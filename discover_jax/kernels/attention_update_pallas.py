"""Pallas kernels for TPUs of the update's attention: packed rows, softmax with sinks, forward and backward.

A query sees an interval of keys. The interval ends at the query's own position and begins at `first`. So one rule covers segments and
windows. The grid has one step for each pair of a block of queries and a block of keys that the causal mask and the window allow. Pairs
that segments exclude cost a step, but neither arithmetic nor a read. The forward pass is an online softmax (Milakov and Gimelshein, arXiv
1805.02867; Dao et al., arXiv 2205.14135) that starts with the sink. The backward pass recomputes probabilities from the log-sum-exp, which
includes the sink. One kernel sums the gradient of the queries and another those of keys and values, each in the chip's memory, so there
are no partial sums per block. The order of every sum is the same in each run.

Scores are transposed, keys x queries, and queries, outputs and their gradients are [H, T]. Thus each product is one that the chip computes
without transposition, what belongs to a query is a row of lanes, and arrays with heads of 64 are not padded to 128 lanes.

Dimensions: P pairs of blocks, I blocks of a row, S keys of a block, t queries of a block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.dot_pallas import dot


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a row is cut.

    Attributes:
      size: queries, and keys, of a block; on a TPU a multiple of 128.
      count: blocks of a row.
      window: the most keys that a query sees, its own included; None for no limit.
      interpret: as for `pallas_call`.
    """

    size: int
    count: int
    window: int | None = None
    interpret: Any = False

    def last_queries(self, j: Any) -> Any:
        """The last block of queries that may see keys of block `j`."""
        if self.window is None:
            return self.count - 1
        return jnp.minimum(self.count - 1, (j * self.size + self.size + self.window - 2) // self.size)

    def first_keys(self, i: Any) -> Any:
        """The first block of keys that queries of block `i` may see."""
        return 0 * i if self.window is None else jnp.maximum(0, i * self.size - (self.window - 1)) // self.size

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of queries and of keys of all pairs that causal mask and window allow, int32 [P], in the order of the queries."""
        i, j = np.tril_indices(self.count)
        near = True if self.window is None else (i - j - 1) * self.size + 1 < self.window
        kept = np.broadcast_to(near, i.shape)
        return i[kept].astype(np.int32), j[kept].astype(np.int32)


def reach(first_BT: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """For each block of queries: the first block of keys that any of them sees, and the first that all of them see whole. int32 [B I]."""
    first_BIt = first_BT.reshape(first_BT.shape[0], blocks.count, blocks.size)
    return (first_BIt.min(axis=2) // blocks.size).reshape(-1), (-(-first_BIt.max(axis=2) // blocks.size)).reshape(-1)


def _scores(q_Ht: Any, k_SH: Any, first_1t: Any, i: jax.Array, j: jax.Array, *, masked: bool) -> jax.Array:
    """[S, t], -inf where unseen."""
    scores_St = dot(k_SH[...], q_Ht[...]) * q_Ht.shape[0] ** -0.5
    if not masked:
        return scores_St
    size = scores_St.shape[0]
    keys_St = j * size + lax.broadcasted_iota(jnp.int32, scores_St.shape, 0)
    queries_St = i * size + lax.broadcasted_iota(jnp.int32, scores_St.shape, 1)
    return jnp.where((keys_St >= first_1t[...]) & (keys_St <= queries_St), scores_St, -jnp.inf)


def _when_seen(i: jax.Array, j: jax.Array, at: jax.Array, reach_BI: Any, whole_BI: Any, add: Callable[[bool], None]) -> None:
    """Calls `add` with a mask, or without one, or not at all."""
    whole = (j >= whole_BI[at]) & (j < i)
    pl.when((j >= reach_BI[at]) & jnp.logical_not(whole))(functools.partial(add, True))
    pl.when(whole)(functools.partial(add, False))


def _forward(
    i_P, j_P, reach_BI, whole_BI, sinks_N, q_Ht, k_SH, v_HS, first_1t, out_Ht, lse_1t, sum_Ht, highest_1t, total_1t, *, blocks: Blocks
) -> None:  # fmt: skip
    i, j, head = i_P[pl.program_id(2)], j_P[pl.program_id(2)], pl.program_id(1)

    @pl.when(j == blocks.first_keys(i))
    def _() -> None:
        highest_1t[...] = jnp.full_like(highest_1t, sinks_N[head])
        total_1t[...] = jnp.ones_like(total_1t)
        sum_Ht[...] = jnp.zeros_like(sum_Ht)

    def add(masked: bool) -> None:
        scores_St = _scores(q_Ht, k_SH, first_1t, i, j, masked=masked)
        higher_1t = jnp.maximum(highest_1t[...], scores_St.max(axis=0, keepdims=True))
        shrink_1t, weights_St = jnp.exp(highest_1t[...] - higher_1t), jnp.exp(scores_St - higher_1t)
        total_1t[...] = total_1t[...] * shrink_1t + weights_St.sum(axis=0, keepdims=True)
        sum_Ht[...] = sum_Ht[...] * shrink_1t + dot(v_HS[...], weights_St.astype(v_HS.dtype))
        highest_1t[...] = higher_1t

    _when_seen(i, j, pl.program_id(0) * blocks.count + i, reach_BI, whole_BI, add)

    @pl.when(j == i)
    def _() -> None:
        out_Ht[...] = (sum_Ht[...] / total_1t[...]).astype(out_Ht.dtype)
        lse_1t[...] = highest_1t[...] + jnp.log(total_1t[...])


def _d_scores(weights_St: jax.Array, d_out_Ht: Any, v_SH: Any, delta_1t: Any) -> jax.Array:
    """The gradient of the products of queries and keys, [S, t], rounded to the values' dtype."""
    d_weights_St = dot(v_SH[...], d_out_Ht[...])
    return (weights_St * (d_weights_St - delta_1t[...]) * v_SH.shape[1] ** -0.5).astype(v_SH.dtype)


def _backward_queries(
    i_P, j_P, reach_BI, whole_BI, q_Ht, k_SH, k_HS, v_SH, first_1t, d_out_Ht, lse_1t, delta_1t, dq_Ht, sum_Ht, *, blocks: Blocks
) -> None:  # fmt: skip
    i, j = i_P[pl.program_id(2)], j_P[pl.program_id(2)]

    @pl.when(j == blocks.first_keys(i))
    def _() -> None:
        sum_Ht[...] = jnp.zeros_like(sum_Ht)

    def add(masked: bool) -> None:
        weights_St = jnp.exp(_scores(q_Ht, k_SH, first_1t, i, j, masked=masked) - lse_1t[...])
        sum_Ht[...] += dot(k_HS[...], _d_scores(weights_St, d_out_Ht, v_SH, delta_1t))

    _when_seen(i, j, pl.program_id(0) * blocks.count + i, reach_BI, whole_BI, add)

    @pl.when(j == i)
    def _() -> None:
        dq_Ht[...] = sum_Ht[...].astype(dq_Ht.dtype)


def _backward_keys(
    i_P, j_P, reach_BI, whole_BI, last_BI, q_Ht, k_SH, v_SH, first_1t, d_out_Ht, lse_1t, delta_1t, dk_SH, dv_SH, k_sum_SH, v_sum_SH,
    *, blocks: Blocks,
) -> None:  # fmt: skip
    del last_BI  # only for the index maps
    i, j, head, last_head = i_P[pl.program_id(2)], j_P[pl.program_id(2)], pl.program_id(3), pl.num_programs(3) - 1

    @pl.when((i == j) & (head == 0))
    def _() -> None:
        k_sum_SH[...], v_sum_SH[...] = jnp.zeros_like(k_sum_SH), jnp.zeros_like(v_sum_SH)

    def add(masked: bool) -> None:
        weights_St = jnp.exp(_scores(q_Ht, k_SH, first_1t, i, j, masked=masked) - lse_1t[...])
        v_sum_SH[...] += dot(weights_St.astype(q_Ht.dtype), d_out_Ht[...], (1, 1))
        k_sum_SH[...] += dot(_d_scores(weights_St, d_out_Ht, v_SH, delta_1t), q_Ht[...], (1, 1))

    _when_seen(i, j, pl.program_id(0) * blocks.count + i, reach_BI, whole_BI, add)

    @pl.when((i == blocks.last_queries(j)) & (head == last_head))
    def _() -> None:
        dk_SH[...], dv_SH[...] = k_sum_SH[...].astype(dk_SH.dtype), v_sum_SH[...].astype(dv_SH.dtype)


def _call(
    kernel: Callable,
    name: str,
    blocks: Blocks,
    grid: tuple[int, ...],
    specs: tuple,
    out: Any,
    scratch: list,
    scalars: tuple,
    arrays: tuple,
) -> Any:
    """Calls a kernel. `specs`: of the inputs and of the outputs. The first two axes of the grid are independent."""
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks),
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=grid, in_specs=specs[0], out_specs=specs[1], scratch_shapes=scratch
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(grid) - 2)),
        interpret=blocks.interpret,
        name=name,
    )(*scalars, *arrays)


def _by_queries(blocks: Blocks, group: int, size: int) -> dict[str, pl.BlockSpec]:
    """The blocks of arrays in a grid of rows, query heads and pairs. Unseen keys are not read: the next seen block is."""

    def of_query(b: Any, n: Any, p: Any, i_P: Any, *_: Any) -> tuple:
        return b, n, 0, i_P[p]

    def seen(b: Any, p: Any, i_P: Any, j_P: Any, reach_BI: Any) -> Any:
        return jnp.maximum(j_P[p], reach_BI[b * blocks.count + i_P[p]])

    return {
        "Ht": pl.BlockSpec((None, None, size, blocks.size), of_query),
        "1t": pl.BlockSpec((None, None, 1, blocks.size), of_query),
        "first": pl.BlockSpec((None, 1, blocks.size), lambda b, n, p, i_P, *_: (b, 0, i_P[p])),
        "SH": pl.BlockSpec((None, None, blocks.size, size), lambda b, n, p, i, j, r, *_: (b, n // group, seen(b, p, i, j, r), 0)),
        "HS": pl.BlockSpec((None, None, size, blocks.size), lambda b, n, p, i, j, r, *_: (b, n // group, 0, seen(b, p, i, j, r))),
    }


def _by_keys(blocks: Blocks, group: int, size: int) -> dict[str, pl.BlockSpec]:
    """The blocks of arrays in a grid of rows, key heads, pairs and the query heads of one key head."""

    def seeing(b: Any, p: Any, i_P: Any, j_P: Any, last_BI: Any) -> Any:
        return jnp.minimum(i_P[p], last_BI[b * blocks.count + j_P[p]])

    def of_query(b: Any, k: Any, p: Any, g: Any, i_P: Any, j_P: Any, _reach: Any, _whole: Any, last_BI: Any) -> tuple:
        return b, k * group + g, 0, seeing(b, p, i_P, j_P, last_BI)

    return {
        "Ht": pl.BlockSpec((None, None, size, blocks.size), of_query),
        "1t": pl.BlockSpec((None, None, 1, blocks.size), of_query),
        "first": pl.BlockSpec((None, 1, blocks.size), lambda b, k, p, g, i, j, _r, _w, last: (b, 0, seeing(b, p, i, j, last))),
        "SH": pl.BlockSpec((None, None, blocks.size, size), lambda b, k, p, g, i_P, j_P, *_: (b, k, j_P[p], 0)),
    }


def forward(
    q_BNHT: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, first_BT: jax.Array, sinks_N: jax.Array, blocks: Blocks
) -> list[jax.Array]:
    """The output, [B, N, H, T], and the log of the sum of exponentials, sink included, float32 [B, N, 1, T].

    Args:
      q_BNHT, k_BKTH, v_BKTH: bfloat16 or float32, T = blocks.size * blocks.count.
      first_BT: int32, the first key that each query sees; above the query's own position if it sees none.
      sinks_N: float32, finite.
      blocks: how rows are cut. `first_BT` must respect its window.
    """
    batch, heads, size, tokens = q_BNHT.shape
    spec, (i_P, j_P) = _by_queries(blocks, heads // k_BKTH.shape[1], size), blocks.pairs()
    return _call(
        _forward,
        "attention_forward",
        blocks,
        (batch, heads, len(i_P)),
        ([spec["Ht"], spec["SH"], spec["HS"], spec["first"]], [spec["Ht"], spec["1t"]]),
        [jax.ShapeDtypeStruct(q_BNHT.shape, q_BNHT.dtype), jax.ShapeDtypeStruct((batch, heads, 1, tokens), jnp.float32)],
        [pltpu.VMEM((rows, blocks.size), jnp.float32) for rows in (size, 1, 1)],
        (i_P, j_P, *reach(first_BT, blocks), sinks_N),
        (q_BNHT, k_BKTH, v_BKTH.swapaxes(2, 3), first_BT[:, None]),
    )


def backward(
    q_BNHT: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    first_BT: jax.Array,
    d_out_BNHT: jax.Array,
    lse_BN1T: jax.Array,
    delta_BN1T: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values, in their layouts and dtypes.

    Args:
      q_BNHT, k_BKTH, v_BKTH, first_BT, blocks: as for `forward`.
      d_out_BNHT: the gradient of the output, in the queries' dtype.
      lse_BN1T: the second result of `forward`.
      delta_BN1T: float32, output times its gradient, summed over H.
    """
    batch, heads, size, _ = q_BNHT.shape
    kv_heads = k_BKTH.shape[1]
    group, (i_P, j_P), (reach_BI, whole_BI) = heads // kv_heads, blocks.pairs(), reach(first_BT, blocks)
    spec, sums = _by_queries(blocks, group, size), pltpu.VMEM((blocks.size, size), jnp.float32)
    dq_BNHT = _call(
        _backward_queries,
        "attention_backward_queries",
        blocks,
        (batch, heads, len(i_P)),
        ([spec[key] for key in ("Ht", "SH", "HS", "SH", "first", "Ht", "1t", "1t")], spec["Ht"]),
        jax.ShapeDtypeStruct(q_BNHT.shape, q_BNHT.dtype),
        [pltpu.VMEM((size, blocks.size), jnp.float32)],
        (i_P, j_P, reach_BI, whole_BI),
        (q_BNHT, k_BKTH, k_BKTH.swapaxes(2, 3), v_BKTH, first_BT[:, None], d_out_BNHT, lse_BN1T, delta_BN1T),
    )
    spec, order = _by_keys(blocks, group, size), np.lexsort((i_P, j_P))
    dk_BKTH, dv_BKTH = _call(
        _backward_keys,
        "attention_backward_keys",
        blocks,
        (batch, kv_heads, len(i_P), group),
        ([spec[key] for key in ("Ht", "SH", "SH", "first", "Ht", "1t", "1t")], [spec["SH"], spec["SH"]]),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BKTH, v_BKTH)],
        [sums, sums],
        (i_P[order], j_P[order], reach_BI, whole_BI, _last_seeing(reach_BI, blocks)),
        (q_BNHT, k_BKTH, v_BKTH, first_BT[:, None], d_out_BNHT, lse_BN1T, delta_BN1T),
    )
    return dq_BNHT, dk_BKTH, dv_BKTH


def _last_seeing(reach_BI: jax.Array, blocks: Blocks) -> jax.Array:
    """For each block of keys the last block of queries that sees any of them, int32 [B I]. A block always sees itself."""
    at_I = jnp.arange(blocks.count, dtype=jnp.int32)
    sees_BIJ = (reach_BI.reshape(-1, blocks.count, 1) <= at_I) & (at_I <= at_I[:, None])
    return jnp.where(sees_BIJ, at_I[:, None], 0).max(axis=1).reshape(-1)
