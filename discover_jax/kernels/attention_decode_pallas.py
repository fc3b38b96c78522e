"""A Pallas kernel for TPUs of attention to cached keys in pages, in any order.

The kernel goes through the groups of pages of all rows, one group after another. While it computes one, the pages of the next are copied
from HBM, also across the end of a row. So rows of any lengths keep the memory busy, and pages without seen keys are not read. It is an
online softmax (Milakov and Gimelshein, arXiv 1805.02867) that starts with the sink. Sums are float32. Queries, the weights of the values,
and the result are rounded to the values' dtype, as in the reference. The grid is for chips with two cores: each has about half of the
groups, and whole rows.

Dimensions: g groups of all rows, R queries of one key/value head (its heads times the row's tokens, padded), S keys of a group, s places of
a page. Where a head is smaller than a TPU's lanes, pages are [K, H, s]: XLA stores them in this order, which has no padding.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.dot_pallas import dot

LANES = 128
CORES = 2
_HEADS = (0,)
"""The axis of key/value heads: each has products of its own."""


@dataclasses.dataclass(frozen=True)
class Pages:
    """How rows are read.

    Attributes:
      pages: pages of a group.
      buffers: number of groups in the chip's memory. The kernel computes with one group while the next ones are copied.
      tokens: consecutive tokens of a row that are queries.
      memory: limit on a core's vector memory, bytes.
      interpret: as for `pallas_call`.
    """

    pages: int
    buffers: int
    tokens: int = 1
    memory: int = 64 * 2**20
    interpret: Any = False


def flipped(head_size: int) -> bool:
    """Whether pages are [K, H, s] instead of [K, s, H]."""
    return head_size < LANES


def _attend(
    layer_1, bounds_3, row_g, group_g, pages_BM, counts_B, held_B, sinks_KR1, q_BKRH, keys, values, out_BKRH,
    q_buffers, k_buffers, v_buffers, out_buffer, highest, total, sums, sems, out_sem, *, head_size: int, places: int, settings: Pages,
) -> None:  # fmt: skip
    # Integers are divided by lax: their `//` and `%` compile only where there is a TPU.
    core, layer, across = pl.program_id(0), layer_1[0], flipped(head_size)
    begin, end = bounds_3[core], bounds_3[core + 1]
    size, share = settings.pages * places, counts_B.shape[0] // pages_BM.shape[0]

    def each(g: jax.Array, slot: jax.Array, act: Any) -> None:
        """Starts the copies of a group, or waits for them."""
        row, first = row_g[g], group_g[g] * settings.pages
        act(pltpu.make_async_copy(q_BKRH.at[row], q_buffers.at[slot], sems.at[slot]))
        for i in range(settings.pages):

            @pl.when((first + i) * places < held_B[row])
            def _(i: int = i) -> None:
                page = pages_BM[lax.div(row, share), first + i]
                at = pl.ds(i * places, places)
                for pool, buffers in ((keys, k_buffers), (values, v_buffers)):
                    target = buffers.at[slot, :, :, at] if across else buffers.at[slot, :, at]
                    act(pltpu.make_async_copy(pool.at[layer, page], target, sems.at[slot]))

    def start(g: jax.Array, slot: jax.Array) -> None:
        pl.when(g < end)(lambda: each(g, slot, lambda copy: copy.start()))

    for i in range(settings.buffers - 1):
        start(begin + i, jnp.int32(i))

    def result(row: jax.Array) -> Any:
        return pltpu.make_async_copy(out_buffer, out_BKRH.at[row], out_sem.at[0])

    def add(g: jax.Array, slot: jax.Array, *, masked: bool) -> None:
        row, before = row_g[g], group_g[g] * size
        k, v = k_buffers[slot], v_buffers[slot]
        scores = dot(q_buffers[slot], k, (2, 1 if across else 2), _HEADS) * head_size**-0.5
        if masked:
            at = before + lax.broadcasted_iota(jnp.int32, scores.shape, 2)
            token = lax.rem(lax.broadcasted_iota(jnp.int32, scores.shape, 1), settings.tokens)
            last = counts_B[row] - settings.tokens + token
            scores = jnp.where((at <= last) & (at < held_B[row]), scores, -jnp.inf)
            # Unused places may hold NaN, and 0 * NaN is NaN.
            seen = before + lax.broadcasted_iota(jnp.int32, v.shape, 2 if across else 1) < held_B[row]
            v = jnp.where(seen, v, jnp.zeros_like(v))
        higher = jnp.maximum(highest[...], scores.max(axis=2, keepdims=True))
        shrink, weights = jnp.exp(highest[...] - higher), jnp.exp(scores - higher)
        total[...] = total[...] * shrink + weights.sum(axis=2, keepdims=True)
        sums[...] = sums[...] * shrink + dot(weights.astype(v.dtype), v, (2, 2 if across else 1), _HEADS)
        highest[...] = higher

    def step(g: jax.Array, sent: jax.Array) -> jax.Array:
        row, group = row_g[g], group_g[g]
        slot = lax.rem(g - begin, settings.buffers)
        start(g + settings.buffers - 1, lax.rem(g - begin + settings.buffers - 1, settings.buffers))

        @pl.when(group == 0)
        def _() -> None:
            highest[...] = sinks_KR1[...]
            total[...] = jnp.ones_like(total)
            sums[...] = jnp.zeros_like(sums)

        each(g, slot, lambda copy: copy.wait())
        masked = (group + 1) * size > jnp.minimum(held_B[row], counts_B[row] - settings.tokens + 1)
        pl.when(masked)(functools.partial(add, g, slot, masked=True))
        pl.when(jnp.logical_not(masked))(functools.partial(add, g, slot, masked=False))
        done = (group + 1) * size >= held_B[row]

        @pl.when(done)
        def _() -> None:
            pl.when(sent > 0)(lambda: result(row).wait())
            out_buffer[...] = (sums[...] / total[...]).astype(out_buffer.dtype)
            result(row).start()

        return sent + done.astype(jnp.int32)

    sent = lax.fori_loop(begin, end, step, jnp.int32(0))
    pl.when(sent > 0)(lambda: result(jnp.int32(0)).wait())


def groups_of(counts_B: jax.Array, most: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where each core begins and ends, int32 [CORES + 1], and each group's row and number in its row, int32 [B most].

    Args:
      counts_B: keys of each row.
      most: groups of the longest row.
      size: keys of a group.
    """
    # Comparisons with sums are few operations on a TPU, unlike a cumulative sum and gathers of scalars.
    needed_B, rows = -(-counts_B // size), jnp.arange(len(counts_B), dtype=jnp.int32)
    ends_B = jnp.sum(jnp.where(rows[None] <= rows[:, None], needed_B[None], 0), axis=1)
    group_g = jnp.arange(len(counts_B) * most, dtype=jnp.int32)
    row_g = jnp.minimum(jnp.sum(ends_B[None] <= group_g[:, None], axis=1), len(counts_B) - 1)
    first_g = jnp.sum(jnp.where(rows[None] == row_g[:, None], (ends_B - needed_B)[None], 0), axis=1)
    total = jnp.sum(needed_B)
    # A row is on one core: the first core has the rows that end in the first half.
    middle = jnp.max(jnp.where(ends_B <= -(-total // CORES), ends_B, 0))
    bounds = jnp.stack([jnp.zeros_like(middle), middle, total])
    return bounds.astype(jnp.int32), row_g.astype(jnp.int32), (group_g - first_g).astype(jnp.int32)


def attend(
    q_BKRH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    counts_B: jax.Array,
    held_B: jax.Array,
    sinks_KR1: jax.Array,
    settings: Pages,
) -> jax.Array:
    """The attention of each query row, [B, K, R, H] in the dtype of the values. That of rows without keys is undefined.

    Args:
      q_BKRH: queries in the dtype of the values. R counts heads of one key/value head times `settings.tokens`, tokens last; padding
        follows. R is a multiple of 8.
      keys, values: [L, P, K, s, H], or [L, P, K, H, s] if `flipped`.
      layer: int32 scalar.
      pages_BM: int32, valid page numbers. Consecutive query rows may share a row of the table: B is a multiple of its rows.
      counts_B, held_B: int32. Token t sees the first count - tokens + t + 1 keys of its row, but at most `held`, which is at most M s. They
        differ where tokens are padding.
      sinks_KR1: float32, finite.
      settings: see `Pages`. A group has at most M pages.
    """
    _, kv_heads, queries, head_size = q_BKRH.shape
    places = keys.shape[4 if flipped(head_size) else 3]
    size = settings.pages * places
    groups = groups_of(held_B, -(-pages_BM.shape[1] // settings.pages), size)
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), *groups, pages_BM, counts_B, held_B)
    buffer = (settings.buffers, kv_heads, *((head_size, size) if flipped(head_size) else (size, head_size)))
    sums = [pltpu.VMEM((kv_heads, queries, last), jnp.float32) for last in (1, 1, head_size)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_attend, head_size=head_size, places=places, settings=settings),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, values.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(CORES,),
            in_specs=[pl.BlockSpec(sinks_KR1.shape, lambda *_: (0, 0, 0)), anywhere, anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((settings.buffers, kv_heads, queries, head_size), q_BKRH.dtype),
                pltpu.VMEM(buffer, keys.dtype),
                pltpu.VMEM(buffer, values.dtype),
                pltpu.VMEM((kv_heads, queries, head_size), values.dtype),
                *sums,
                pltpu.SemaphoreType.DMA((settings.buffers,)),
                pltpu.SemaphoreType.DMA((1,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=settings.memory),
        interpret=settings.interpret,
        name="attention_pages",
    )(*scalars, sinks_KR1, q_BKRH, keys, values)
