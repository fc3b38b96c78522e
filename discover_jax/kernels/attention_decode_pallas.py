"""A Pallas kernel for TPUs of attention to cached keys in pages, in any order.

The kernel goes through the groups of pages of all rows, one group after another. While it computes one, the pages of the next are copied
from HBM, also across the end of a row. So rows of any lengths keep the memory busy, and pages without seen keys are not read. It is an
online softmax (Milakov and Gimelshein, arXiv 1805.02867) that starts with the sink. Sums are float32. Queries, the weights of the values,
and the result are rounded to the values' dtype, as in the reference. The grid is for chips with two cores: each has about half of the
groups, and whole rows. It counts the groups itself: in XLA, that would be 13 small operations a layer.

Dimensions: S lines of sinks, R queries of one key/value head (its heads times the row's tokens, padded), s places of
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
from discover_jax.kernels.parts_pallas import line_of, scalar, whole

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


def _each(count: int, body: Any, start: Any) -> Any:
    """A loop over the integers below `count`."""
    return lax.fori_loop(0, count, body, start)


def rows_of_core(core: Any, rows: int, groups_of: Any) -> tuple[Any, Any]:
    """The first row of a core, and its number of groups: the first core has the rows that end in the first half of the groups.

    Args:
      core: 0 or 1.
      rows: number of rows.
      groups_of: the number of groups of a row, at least 1.
    """
    total = _each(rows, lambda row, total: total + groups_of(row), jnp.int32(0))

    def add(row: Any, found: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        end, before, groups = found
        end += groups_of(row)
        inside = end <= lax.div(total + 1, 2)
        return end, jnp.where(inside, row + 1, before), jnp.where(inside, end, groups)

    _, before, groups = _each(rows, add, (jnp.int32(0),) * 3)
    return jnp.where(core == 0, 0, before), jnp.where(core == 0, groups, total - groups)


def _attend(
    layer_1, line_1, first_page_1, pages_BM, ends_B, sinks_SN, q_BKRH, keys, values, out_BKRH,
    q_buffers, k_buffers, v_buffers, out_buffer, sinks_KR1, highest, total, sums, sems, out_sem,
    *, head_size: int, places: int, count: int, settings: Pages,
) -> None:  # fmt: skip
    # Integers are divided by lax: their `//` and `%` compile only where there is a TPU.
    layer, first_page, across = layer_1[0], first_page_1[0], flipped(head_size)
    (batch, columns), rows = pages_BM.shape, q_BKRH.shape[0]
    size, share = settings.pages * places, rows // batch
    _lay_out_sinks(sinks_SN, line_1[0], sinks_KR1, settings.tokens)

    def seen_by(row: Any) -> tuple[Any, Any]:
        """Keys that the last token of a row sees, and those that the row has."""
        end = ends_B[lax.div(row, share)]
        seen = end - count + (lax.rem(row, share) + 1) * settings.tokens
        return seen, jnp.minimum(jnp.minimum(seen, end), columns * places)

    def groups_of(row: Any) -> Any:
        """An empty row has one group, which gives 0."""
        return jnp.maximum(lax.div(seen_by(row)[1] + size - 1, size), 1)

    def after(row: Any, group: Any) -> tuple[Any, Any]:
        last = group + 1 >= groups_of(jnp.minimum(row, rows - 1))
        return jnp.where(last, row + 1, row), jnp.where(last, 0, group + 1)

    begin, groups = rows_of_core(pl.program_id(0), rows, groups_of)

    def each(row: Any, group: Any, slot: Any, act: Any) -> None:
        """Starts the copies of a group, or waits for them."""
        held = seen_by(row)[1]
        act(pltpu.make_async_copy(q_BKRH.at[row], q_buffers.at[slot], sems.at[slot]))
        for i in range(settings.pages):
            number = group * settings.pages + i

            @pl.when(number * places < held)
            def _(i: int = i, number: Any = number) -> None:
                page = jnp.clip(pages_BM[lax.div(row, share), number] - first_page, 0, keys.shape[1] - 1)
                at = pl.ds(i * places, places)
                for pool, buffers in ((keys, k_buffers), (values, v_buffers)):
                    target = buffers.at[slot, :, :, at] if across else buffers.at[slot, :, at]
                    act(pltpu.make_async_copy(pool.at[layer, page], target, sems.at[slot]))

    def start(g: Any, ahead: tuple[Any, Any]) -> tuple[Any, Any]:
        """Starts the copies of group g, at `ahead`. Returns the place of the next group."""
        row, group = ahead
        pl.when(g < groups)(lambda: each(row, group, lax.rem(g, settings.buffers), lambda copy: copy.start()))
        return after(row, group)

    ahead = begin, jnp.int32(0)
    for i in range(settings.buffers - 1):
        ahead = start(jnp.int32(i), ahead)

    def result(row: jax.Array) -> Any:
        return pltpu.make_async_copy(out_buffer, out_BKRH.at[row], out_sem.at[0])

    def add(row: Any, group: Any, slot: Any, *, masked: bool) -> None:
        before, (seen, held) = group * size, seen_by(row)
        k, v = k_buffers[slot], v_buffers[slot]
        scores = dot(q_buffers[slot], k, (2, 1 if across else 2), _HEADS) * head_size**-0.5
        if masked:
            at = before + lax.broadcasted_iota(jnp.int32, scores.shape, 2)
            token = lax.rem(lax.broadcasted_iota(jnp.int32, scores.shape, 1), settings.tokens)
            scores = jnp.where((at <= seen - settings.tokens + token) & (at < held), scores, -jnp.inf)
            # Unused places may hold NaN, and 0 * NaN is NaN.
            used = before + lax.broadcasted_iota(jnp.int32, v.shape, 2 if across else 1) < held
            v = jnp.where(used, v, jnp.zeros_like(v))
        higher = jnp.maximum(highest[...], scores.max(axis=2, keepdims=True))
        shrink, weights = jnp.exp(highest[...] - higher), jnp.exp(scores - higher)
        total[...] = total[...] * shrink + weights.sum(axis=2, keepdims=True)
        sums[...] = sums[...] * shrink + dot(weights.astype(v.dtype), v, (2, 2 if across else 1), _HEADS)
        highest[...] = higher

    def step(g: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        row, group, ahead, sent = carry
        (seen, held), slot = seen_by(row), lax.rem(g, settings.buffers)
        ahead = start(g + settings.buffers - 1, ahead)

        @pl.when(group == 0)
        def _() -> None:
            highest[...] = sinks_KR1[...]
            total[...] = jnp.ones_like(total)
            sums[...] = jnp.zeros_like(sums)

        each(row, group, slot, lambda copy: copy.wait())
        masked = (group + 1) * size > jnp.minimum(held, seen - settings.tokens + 1)
        pl.when(masked)(functools.partial(add, row, group, slot, masked=True))
        pl.when(jnp.logical_not(masked))(functools.partial(add, row, group, slot, masked=False))
        done = (group + 1) * size >= held

        @pl.when(done)
        def _() -> None:
            pl.when(sent > 0)(lambda: result(row).wait())
            out_buffer[...] = (sums[...] / total[...]).astype(out_buffer.dtype)
            result(row).start()

        return *after(row, group), ahead, sent + done.astype(jnp.int32)

    *_, sent = _each(groups, step, (begin, jnp.int32(0), ahead, jnp.int32(0)))
    pl.when(sent > 0)(lambda: result(jnp.int32(0)).wait())


def _lay_out_sinks(sinks_SN: Any, line: Any, sinks_KR1: Any, tokens: int) -> None:
    """One line of the sinks, for each query of each key/value head; 0 for padding."""
    (kv_heads, queries, _), heads = sinks_KR1.shape, sinks_SN.shape[1]
    sinks_1N, shape = line_of(sinks_SN, line), (queries, heads)
    head = lax.div(lax.broadcasted_iota(jnp.int32, shape, 0), tokens)
    group = heads // kv_heads
    number = jnp.where(head < group, head, heads)  # among those of the key/value head
    for k in range(kv_heads):
        here = lax.broadcasted_iota(jnp.int32, shape, 1) == number + k * group
        sinks_KR1[k] = jnp.sum(jnp.where(here, sinks_1N, 0.0), axis=1, keepdims=True)


def attend(
    q_BKRH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    pages_BM: jax.Array,
    ends_B: jax.Array,
    sinks_SN: jax.Array,
    settings: Pages,
    *,
    count: int = 1,
    line: jax.Array | int = 0,
    first_page: jax.Array | int = 0,
) -> jax.Array:
    """The attention of each query row, [rows, K, R, H] in the dtype of the values; 0 for rows without keys.

    Args:
      q_BKRH: queries in the dtype of the values. R counts heads of one key/value head times `settings.tokens`, tokens last; padding
        follows. R is a multiple of 8. Equally many consecutive query rows share a row of the table.
      keys, values: [L, P, K, s, H], or [L, P, K, H, s] if `flipped`.
      layer: int32 scalar.
      pages_BM: int32 page numbers. Those of unused places may be invalid.
      ends_B: int32, keys of a row up to its last query. Query row r of a row has tokens from r * `settings.tokens`. A token sees its own
        and earlier keys.
      sinks_SN: finite sinks, a line for each layer or one for all.
      settings: see `Pages`. A group has at most M pages.
      count: tokens of a row that are not padding of its last query row.
      line: int32 scalar, the line of the sinks.
      first_page: int32 scalar, the number of page 0 of `keys`.
    """
    _, kv_heads, queries, head_size = q_BKRH.shape
    places = keys.shape[4 if flipped(head_size) else 3]
    size = settings.pages * places
    # Kernels get numbers of rows and pages as they are: in each layer, XLA would need several small operations to prepare them.
    scalars = (*map(scalar, (layer, line, first_page)), pages_BM, ends_B)
    buffer = (settings.buffers, kv_heads, *((head_size, size) if flipped(head_size) else (size, head_size)))
    sums = [pltpu.VMEM((kv_heads, queries, last), jnp.float32) for last in (1, 1, 1, head_size)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_attend, head_size=head_size, places=places, count=count, settings=settings),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, values.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(CORES,),
            in_specs=[whole(*sinks_SN.shape), anywhere, anywhere, anywhere],
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
    )(*scalars, sinks_SN, q_BKRH, keys, values)
