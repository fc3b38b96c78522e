"""Pallas kernels for TPUs of the update's attention: packed rows, softmax with sinks, forward and backward.

A query sees an interval of keys. The interval ends at the query's own position and begins at `first`. So one rule covers segments and
windows. The grid has one step for each pair of a block of queries and a block of keys in which a query sees a key. These pairs depend on
the segments, so they are listed at run time; of several rows, the one with most pairs sets the number of steps. The forward pass is an
online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135) that starts with the sink. The backward pass
recomputes probabilities from the log-sum-exp, which includes the sink. Its sums are in the chip's vector memory, so there are no partial
sums per block. One kernel computes all gradients if those of the keys and values of a whole row fit there. Otherwise, one kernel computes
the gradient of the queries, and another those of keys and values. The order of every sum is the same in each run.

Scores are transposed, keys x queries; queries, outputs and all gradients are [H, T]. Thus each product is one that the chip computes
without transposition, what belongs to a query is a row of lanes, and arrays with heads of 64 are not padded to 128 lanes.

Dimensions: P pairs of blocks that causal mask and window allow, I blocks of a row, S keys of a block, t queries of a block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.dot_pallas import dot
from discover_jax.kernels.parts_pallas import VECTOR_MEMORY

MOST_FORWARD, MOST_BACKWARD = 8, 8
"""Most query heads of one key head that a step computes. In the schedule, the products of a head overlap with the softmax of another."""
ROW_MEMORY = 45 * 2**20
"""Part of it for the gradients of a row's keys and values. The rest is for blocks and their products."""


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


class _Pairs(NamedTuple):
    """The pairs of blocks in which a query sees a key, in the order in which a kernel computes them. All arrays are int32.

    Attributes:
      counts_B: number of pairs of each row.
      i_BP, j_BP: blocks of queries and of keys, flat. After the pairs of a row, its last pair is repeated.
      steps: the most pairs of a row.
    """

    counts_B: jax.Array
    i_BP: jax.Array
    j_BP: jax.Array
    steps: jax.Array


def _seen_pairs(reach_BI: jax.Array, blocks: Blocks, *, by_keys: bool = False) -> _Pairs:
    """The pairs in the order of the queries or of the keys."""
    i_P, j_P = blocks.pairs()
    if by_keys:
        order = np.lexsort((i_P, j_P))
        i_P, j_P = i_P[order], j_P[order]
    seen_BP = j_P >= reach_BI.reshape(-1, blocks.count)[:, i_P]
    place_BP = jnp.where(seen_BP, jnp.arange(i_P.size, dtype=jnp.int32), i_P.size)
    last_B1 = jnp.max(jnp.where(seen_BP, place_BP, 0), axis=1, keepdims=True)
    place_BP = jnp.minimum(lax.sort(place_BP, dimension=1, is_stable=False), last_B1)
    counts_B = jnp.sum(seen_BP, axis=1, dtype=jnp.int32)
    return _Pairs(counts_B, jnp.asarray(i_P)[place_BP].reshape(-1), jnp.asarray(j_P)[place_BP].reshape(-1), jnp.max(counts_B))


def _scores(q_Ht: Any, k_SH: Any, first_1t: Any, i: jax.Array, j: jax.Array, *, masked: bool) -> jax.Array:
    """[S, t], -inf where unseen."""
    scores_St = dot(k_SH[...], q_Ht[...]) * k_SH.shape[1] ** -0.5
    if not masked:
        return scores_St
    size = scores_St.shape[0]
    keys_St = j * size + lax.broadcasted_iota(jnp.int32, scores_St.shape, 0)
    queries_St = i * size + lax.broadcasted_iota(jnp.int32, scores_St.shape, 1)
    return jnp.where((keys_St >= first_1t[...]) & (keys_St <= queries_St), scores_St, -jnp.inf)


class _Step(NamedTuple):
    """A step of a kernel's grid: its row, pair and blocks, and whether it computes; it does not after the last pair of a row."""

    row: jax.Array
    i: jax.Array
    j: jax.Array
    live: jax.Array

    def when(self, condition: jax.Array) -> Callable:
        """Decorates a part of the kernel that runs if the step computes and the condition holds."""
        return pl.when(self.live & condition)

    def add(self, whole_BI: Any, count: int, add: Callable[[bool], None]) -> None:
        """Calls `add` with a mask, or without one where all queries see all keys."""
        whole = (self.j >= whole_BI[self.row * count + self.i]) & (self.j < self.i)
        self.when(jnp.logical_not(whole))(functools.partial(add, True))
        self.when(whole)(functools.partial(add, False))


def _step(counts_B: Any, i_BP: Any, j_BP: Any, pair_axis: int = 2) -> _Step:
    row, pair = pl.program_id(0), pl.program_id(pair_axis)
    at = row * (i_BP.shape[0] // counts_B.shape[0]) + pair
    return _Step(row, i_BP[at], j_BP[at], pair < counts_B[row])


def _forward(
    counts_B, i_BP, j_BP, reach_BI, whole_BI, sinks_N, q_nHt, k_SH, v_HS, first_1t, out_nHt, lse_n1t, sum_nHt, highest_n1t, total_n1t,
    *, blocks: Blocks,
) -> None:  # fmt: skip
    """For some query heads n of one key head."""
    step, heads = _step(counts_B, i_BP, j_BP), range(q_nHt.shape[0])
    first_head = pl.program_id(1) * len(heads)

    @step.when(step.j == reach_BI[step.row * blocks.count + step.i])
    def _() -> None:
        for n in heads:
            highest_n1t[n] = jnp.full_like(highest_n1t[n], sinks_N[first_head + n])
        total_n1t[...] = jnp.ones_like(total_n1t)
        sum_nHt[...] = jnp.zeros_like(sum_nHt)

    def add(masked: bool) -> None:
        for n in heads:
            scores_St = _scores(q_nHt.at[n], k_SH, first_1t, step.i, step.j, masked=masked)
            higher_1t = jnp.maximum(highest_n1t[n], scores_St.max(axis=0, keepdims=True))
            shrink_1t, weights_St = jnp.exp(highest_n1t[n] - higher_1t), jnp.exp(scores_St - higher_1t)
            total_n1t[n] = total_n1t[n] * shrink_1t + weights_St.sum(axis=0, keepdims=True)
            sum_nHt[n] = sum_nHt[n] * shrink_1t + dot(v_HS[...], weights_St.astype(v_HS.dtype))
            highest_n1t[n] = higher_1t

    step.add(whole_BI, blocks.count, add)

    @step.when(step.j == step.i)
    def _() -> None:
        out_nHt[...] = (sum_nHt[...] / total_n1t[...]).astype(out_nHt.dtype)
        lse_n1t[...] = highest_n1t[...] + jnp.log(total_n1t[...])


def _d_scores(weights_St: jax.Array, d_out_Ht: Any, v_SH: Any, delta_1t: Any) -> jax.Array:
    """The gradient of the products of queries and keys, [S, t], rounded to the values' dtype."""
    d_weights_St = dot(v_SH[...], d_out_Ht[...])
    return (weights_St * (d_weights_St - delta_1t[...]) * v_SH.shape[1] ** -0.5).astype(v_SH.dtype)


def _backward_queries(
    counts_B, i_BP, j_BP, reach_BI, whole_BI, q_Ht, k_SH, k_HS, v_SH, first_1t, d_out_Ht, lse_1t, delta_1t, dq_Ht, sum_Ht, *, blocks: Blocks
) -> None:  # fmt: skip
    step = _step(counts_B, i_BP, j_BP)

    @step.when(step.j == reach_BI[step.row * blocks.count + step.i])
    def _() -> None:
        sum_Ht[...] = jnp.zeros_like(sum_Ht)

    def add(masked: bool) -> None:
        weights_St = jnp.exp(_scores(q_Ht, k_SH, first_1t, step.i, step.j, masked=masked) - lse_1t[...])
        sum_Ht[...] += dot(k_HS[...], _d_scores(weights_St, d_out_Ht, v_SH, delta_1t))

    step.add(whole_BI, blocks.count, add)

    @step.when(step.j == step.i)
    def _() -> None:
        dq_Ht[...] = sum_Ht[...].astype(dq_Ht.dtype)


def _backward_keys(
    counts_B, i_BP, j_BP, last_BI, whole_BI, q_Ht, k_SH, v_SH, first_1t, d_out_Ht, lse_1t, delta_1t, dk_HS, dv_HS, k_sum_HS, v_sum_HS,
    *, blocks: Blocks,
) -> None:  # fmt: skip
    step, head, last_head = _step(counts_B, i_BP, j_BP), pl.program_id(3), pl.num_programs(3) - 1

    @step.when((step.i == step.j) & (head == 0))
    def _() -> None:
        k_sum_HS[...], v_sum_HS[...] = jnp.zeros_like(k_sum_HS), jnp.zeros_like(v_sum_HS)

    def add(masked: bool) -> None:
        weights_St = jnp.exp(_scores(q_Ht, k_SH, first_1t, step.i, step.j, masked=masked) - lse_1t[...])
        v_sum_HS[...] += dot(d_out_Ht[...], weights_St.astype(q_Ht.dtype), (1, 1))
        k_sum_HS[...] += dot(q_Ht[...], _d_scores(weights_St, d_out_Ht, v_SH, delta_1t), (1, 1))

    step.add(whole_BI, blocks.count, add)

    @step.when((step.i == last_BI[step.row * blocks.count + step.j]) & (head == last_head))
    def _() -> None:
        dk_HS[...], dv_HS[...] = k_sum_HS[...].astype(dk_HS.dtype), v_sum_HS[...].astype(dv_HS.dtype)


def _backward_row(
    counts_B, i_BP, j_BP, reach_BI, whole_BI, q_nHt, k_SH, k_HS, v_SH, first_1t, d_out_nHt, lse_n1t, delta_n1t, dq_nHt, dk_HT, dv_HT,
    sum_nHt, k_sum_HT, v_sum_HT, *, blocks: Blocks,
) -> None:  # fmt: skip
    """All gradients, for some query heads n of a key head and the pairs of a row."""
    step, heads, pair = _step(counts_B, i_BP, j_BP, pair_axis=3), pl.program_id(2), pl.program_id(3)

    @pl.when((heads == 0) & (pair == 0))
    def _() -> None:
        k_sum_HT[...], v_sum_HT[...] = jnp.zeros_like(k_sum_HT), jnp.zeros_like(v_sum_HT)

    @step.when(step.j == reach_BI[step.row * blocks.count + step.i])
    def _() -> None:
        sum_nHt[...] = jnp.zeros_like(sum_nHt)

    def add(masked: bool) -> None:
        keys = pl.ds(pl.multiple_of(step.j * blocks.size, blocks.size), blocks.size)
        for n in range(q_nHt.shape[0]):
            weights_St = jnp.exp(_scores(q_nHt.at[n], k_SH, first_1t, step.i, step.j, masked=masked) - lse_n1t[n])
            d_scores_St = _d_scores(weights_St, d_out_nHt.at[n], v_SH, delta_n1t.at[n])
            sum_nHt[n] += dot(k_HS[...], d_scores_St)
            v_sum_HT[:, keys] += dot(d_out_nHt[n], weights_St.astype(d_out_nHt.dtype), (1, 1))
            k_sum_HT[:, keys] += dot(q_nHt[n], d_scores_St, (1, 1))

    step.add(whole_BI, blocks.count, add)

    @step.when(step.j == step.i)
    def _() -> None:
        dq_nHt[...] = sum_nHt[...].astype(dq_nHt.dtype)

    @pl.when((heads == pl.num_programs(2) - 1) & (pair == pl.num_programs(3) - 1))
    def _() -> None:
        dk_HT[...], dv_HT[...] = k_sum_HT[...].astype(dk_HT.dtype), v_sum_HT[...].astype(dv_HT.dtype)


def _call(
    kernel: Callable,
    name: str,
    blocks: Blocks,
    grid: tuple[Any, ...],
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(grid) - 2), vmem_limit_bytes=VECTOR_MEMORY
        ),
        interpret=blocks.interpret,
        name=name,
    )(*scalars, *arrays)


def _specs(
    blocks: Blocks, size: int, at: Callable[..., tuple], key_head: Callable[..., Any], heads: int | None = None
) -> dict[str, pl.BlockSpec]:
    """The blocks of arrays. `at` and `key_head` get the axes of the grid; `at` returns row, query head or block of `heads` query heads, and
    place in the flat pairs."""

    def query(*of: Any) -> tuple:
        b, n, p, i_BP, _ = at(*of)
        return b, n, 0, i_BP[p]

    def key(*of: Any) -> tuple[Any, Any, Any]:
        b, _, p, _, j_BP = at(*of)
        return b, key_head(*of), j_BP[p]

    def keys(*of: Any) -> tuple:
        b, k, j = key(*of)
        return b, k, j, 0

    def transposed(*of: Any) -> tuple:
        b, k, j = key(*of)
        return b, k, 0, j

    def first(*of: Any) -> tuple:
        b, _, _, i = query(*of)
        return b, 0, i

    return {
        "Ht": pl.BlockSpec((None, heads, size, blocks.size), query),
        "1t": pl.BlockSpec((None, heads, 1, blocks.size), query),
        "first": pl.BlockSpec((None, 1, blocks.size), first),
        "SH": pl.BlockSpec((None, None, blocks.size, size), keys),
        "HS": pl.BlockSpec((None, None, size, blocks.size), transposed),
    }


def _by_queries(blocks: Blocks, group: int, size: int, most: int, heads: int | None = None) -> dict[str, pl.BlockSpec]:
    """In a grid of rows, query heads or blocks of `heads` of them, and pairs. `most`: places for pairs of a row in the flat arrays."""

    def at(b: Any, n: Any, p: Any, _counts: Any, i_BP: Any, j_BP: Any, *_: Any) -> tuple:
        return b, n, b * most + p, i_BP, j_BP

    return _specs(blocks, size, at, lambda _b, n, *_: n * (heads or 1) // group, heads)


def _by_rows(blocks: Blocks, group: int, size: int, most: int, heads: int) -> dict[str, pl.BlockSpec]:
    """In a grid of rows, key heads, blocks of `heads` query heads of one key head, and pairs."""

    def at(b: Any, k: Any, g: Any, p: Any, _counts: Any, i_BP: Any, j_BP: Any, *_: Any) -> tuple:
        return b, k * (group // heads) + g, b * most + p, i_BP, j_BP

    whole = pl.BlockSpec((None, None, size, blocks.size * blocks.count), lambda b, k, *_: (b, k, 0, 0))
    return _specs(blocks, size, at, lambda _b, k, *_: k, heads) | {"HT": whole}


def _by_keys(blocks: Blocks, group: int, size: int, most: int) -> dict[str, pl.BlockSpec]:
    """In a grid of rows, key heads, pairs and the query heads of one key head."""

    def at(b: Any, k: Any, p: Any, g: Any, _counts: Any, i_BP: Any, j_BP: Any, *_: Any) -> tuple:
        return b, k * group + g, b * most + p, i_BP, j_BP

    return _specs(blocks, size, at, lambda _b, k, *_: k)


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
    reach_BI, whole_BI = reach(first_BT, blocks)
    pairs = _seen_pairs(reach_BI, blocks)
    group = heads // k_BKTH.shape[1]
    each = _heads_at_once(group, MOST_FORWARD)
    spec = _by_queries(blocks, group, size, pairs.i_BP.size // batch, each)
    return _call(
        _forward,
        "attention_forward",
        blocks,
        (batch, heads // each, pairs.steps),
        ([spec["Ht"], spec["SH"], spec["HS"], spec["first"]], [spec["Ht"], spec["1t"]]),
        [jax.ShapeDtypeStruct(q_BNHT.shape, q_BNHT.dtype), jax.ShapeDtypeStruct((batch, heads, 1, tokens), jnp.float32)],
        [pltpu.VMEM((each, rows, blocks.size), jnp.float32) for rows in (size, 1, 1)],
        (*pairs[:3], reach_BI, whole_BI, sinks_N),
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
    """The gradients of queries, keys and values, in their dtypes: [B, N, H, T], [B, K, H, T] and [B, K, H, T].

    Args:
      q_BNHT, k_BKTH, v_BKTH, first_BT, blocks: as for `forward`.
      d_out_BNHT: the gradient of the output, in the queries' dtype.
      lse_BN1T: the second result of `forward`.
      delta_BN1T: float32, output times its gradient, summed over H.
    """
    batch, heads, size, tokens = q_BNHT.shape
    kv_heads = k_BKTH.shape[1]
    group, (reach_BI, whole_BI) = heads // kv_heads, reach(first_BT, blocks)
    pairs, sums = _seen_pairs(reach_BI, blocks), pltpu.VMEM((size, blocks.size), jnp.float32)
    most, of_keys = pairs.i_BP.size // batch, [jax.ShapeDtypeStruct((batch, kv_heads, size, tokens), x.dtype) for x in (k_BKTH, v_BKTH)]
    of_queries = ("Ht", "SH", "HS", "SH", "first", "Ht", "1t", "1t")
    arrays = q_BNHT, k_BKTH, k_BKTH.swapaxes(2, 3), v_BKTH, first_BT[:, None], d_out_BNHT, lse_BN1T, delta_BN1T
    if _row_fits(size, tokens, k_BKTH.dtype.itemsize):
        each = _heads_at_once(group, MOST_BACKWARD)
        spec, row = _by_rows(blocks, group, size, most, each), pltpu.VMEM((size, tokens), jnp.float32)
        return tuple(
            _call(
                _backward_row,
                "attention_backward",
                blocks,
                (batch, kv_heads, group // each, pairs.steps),
                ([spec[key] for key in of_queries], [spec["Ht"], spec["HT"], spec["HT"]]),
                [jax.ShapeDtypeStruct(q_BNHT.shape, q_BNHT.dtype), *of_keys],
                [pltpu.VMEM((each, size, blocks.size), jnp.float32), row, row],
                (*pairs[:3], reach_BI, whole_BI),
                arrays,
            )
        )
    spec = _by_queries(blocks, group, size, most)
    dq_BNHT = _call(
        _backward_queries,
        "attention_backward_queries",
        blocks,
        (batch, heads, pairs.steps),
        ([spec[key] for key in of_queries], spec["Ht"]),
        jax.ShapeDtypeStruct(q_BNHT.shape, q_BNHT.dtype),
        [sums],
        (*pairs[:3], reach_BI, whole_BI),
        arrays,
    )
    spec, pairs = _by_keys(blocks, group, size, most), _seen_pairs(reach_BI, blocks, by_keys=True)
    dk_BKHT, dv_BKHT = _call(
        _backward_keys,
        "attention_backward_keys",
        blocks,
        (batch, kv_heads, pairs.steps, group),
        ([spec[key] for key in ("Ht", "SH", "SH", "first", "Ht", "1t", "1t")], [spec["HS"], spec["HS"]]),
        of_keys,
        [sums, sums],
        (*pairs[:3], _last_seeing(reach_BI, blocks), whole_BI),
        (q_BNHT, k_BKTH, v_BKTH, first_BT[:, None], d_out_BNHT, lse_BN1T, delta_BN1T),
    )
    return dq_BNHT, dk_BKHT, dv_BKHT


def _heads_at_once(group: int, most: int) -> int:
    """Query heads of one key head that a step computes. `group`: those of a key head."""
    return next(heads for heads in range(most, 0, -1) if group % heads == 0)


def _row_fits(size: int, tokens: int, itemsize: int) -> bool:
    """Whether the gradients of keys and values of a whole row fit in the vector memory: float32 sums, and results in two buffers."""
    return 2 * size * tokens * (4 + 2 * itemsize) <= ROW_MEMORY


def _last_seeing(reach_BI: jax.Array, blocks: Blocks) -> jax.Array:
    """For each block of keys the last block of queries that sees any of them, int32 [B I]. A block always sees itself."""
    at_I = jnp.arange(blocks.count, dtype=jnp.int32)
    sees_BIJ = (reach_BI.reshape(-1, blocks.count, 1) <= at_I) & (at_I <= at_I[:, None])
    return jnp.where(sees_BIJ, at_I[:, None], 0).max(axis=1).reshape(-1)
