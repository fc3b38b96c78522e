"""Writes keys and values into pages of the cache, on a TPU, in place.

XLA's scatter first moves the whole pool into another layout. These kernels copy only what changes. They were compiled for TPUs and
interpreted on a CPU. No TPU has run them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels import pages
from discover_jax.kernels.attention_decode_pallas import LANES, flipped
from discover_jax.kernels.attention_decode_tpu import pool_refusal
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.parts_pallas import scalar

Pools = tuple[jax.Array, jax.Array]
SUBLANES = 16
"""Places that are read and written together if a head fills the lanes: rows of a tile of bfloat16."""
AT_ONCE = 8
"""Rows, pages or layers that are copied together."""
_HBM = pl.BlockSpec(memory_space=pl.ANY)


def write_token(
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_B: jax.Array,
    places_B: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    *,
    tokens: int = 1,
) -> Pools:
    """`pages.write_token` by the kernel. If it does not support the arguments, uses the reference and logs the reason once."""
    arguments = (keys_LPKsH, values_LPKsH, layer, pages_B, places_B, k_BKH, v_BKH)
    if reason := pool_refusal(keys_LPKsH, values_LPKsH):
        warn_reference("write_token", reason, "tpu")
        return pages.write_token(*arguments, tokens=tokens)
    return put_tokens(*arguments, tokens=tokens)


def write_pages(
    keys_LPKsH: jax.Array, values_LPKsH: jax.Array, layer: jax.Array, pages_Bm: jax.Array, k_BCKH: jax.Array, v_BCKH: jax.Array
) -> Pools:
    """`pages.write_pages` by the kernel. If it does not support the arguments, uses the reference and logs the reason once."""
    arguments = (keys_LPKsH, values_LPKsH, layer, pages_Bm, k_BCKH, v_BCKH)
    if reason := pool_refusal(keys_LPKsH, values_LPKsH):
        warn_reference("write_pages", reason, "tpu")
        return pages.write_pages(*arguments)
    return put_pages(*arguments)


def copy_page(keys_LPKsH: jax.Array, values_LPKsH: jax.Array, source: jax.Array, target: jax.Array) -> Pools:
    """`pages.copy_page` by the kernel. If it does not support the arguments, uses the reference and logs the reason once."""
    if reason := pool_refusal(keys_LPKsH, values_LPKsH):
        warn_reference("copy_page", reason, "tpu")
        return pages.copy_page(keys_LPKsH, values_LPKsH, source, target)
    return put_copy(keys_LPKsH, values_LPKsH, source, target)


def call_in_place(
    kernel: Callable,
    name: str,
    scalars: tuple,
    inputs: tuple,
    specs: list,
    pools: Pools,
    scratch: list,
    interpret: Any,
    more: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = (),
) -> tuple[list[jax.Array], Pools]:
    """Calls a kernel on a flat list of scalars, inputs, pools, outputs, pools again as outputs, and scratch.

    Returns the outputs in `more`, and the pools, which take the memory of the given ones.
    """
    across = flipped(pools[0].shape[-1])
    held = [pool.swapaxes(3, 4) if across else pool for pool in pools]  # XLA stores them in this order, so nothing is moved
    before, after = len(scalars) + len(inputs), len(more)
    *out, keys, values = pl.pallas_call(
        kernel,
        out_shape=[*(shape for shape, _ in more), *(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in held)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[*specs, _HBM, _HBM],
            out_specs=[*(spec for _, spec in more), _HBM, _HBM],
            scratch_shapes=scratch,
        ),
        input_output_aliases={before: after, before + 1: after + 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), has_side_effects=True),
        interpret=interpret,
        name=name,
    )(*scalars, *inputs, *held)
    return out, tuple(pool.swapaxes(3, 4) if across else pool for pool in (keys, values))


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array in words of 32 bits, in which two of its rows share one."""
    return pltpu.bitcast(x, jnp.int32)


def _of_words(words: jax.Array, dtype: Any) -> jax.Array:
    return pltpu.bitcast(words, dtype)


def _write_token(layer_1, pages_B, places_B, k_new, v_new, _keys, _values, *rest) -> None:
    write_tokens(layer_1[0], 0, pages_B, places_B, k_new, v_new, *rest)


def write_tokens(layer, first_page, pages_B, places_B, k_new, v_new, keys, values, buffers, loaded, stored) -> None:
    """Reads the tiles of a page that have a token's place, replaces the place, and writes them back, for AT_ONCE rows together.

    To be called in a kernel. `first_page` is the number of page 0 of the pools. `k_new` and `v_new` are [K, H, B], padded, for pages
    [K, H, s], else [B, K, 1, H].
    """
    rows, (_, pool, *_), across = pages_B.shape[0], keys.shape, buffers.shape[-1] == LANES and buffers.shape[-2] != SUBLANES

    def copies(row: jax.Array, i: int) -> list:
        step = LANES if across else SUBLANES
        at = pl.ds(pl.multiple_of(lax.div(places_B[row], step) * step, step), step)
        page = jnp.clip(pages_B[row] - first_page, 0, pool - 1)
        tiles = [x.at[layer, page, :, :, at] if across else x.at[layer, page, :, at] for x in (keys, values)]
        return [(tile, buffers.at[i, n]) for n, tile in enumerate(tiles)]

    def valid(row: jax.Array) -> jax.Array:
        page = pages_B[jnp.minimum(row, rows - 1)] - first_page
        return (row < rows) & (page >= 0) & (page < pool)

    def replace(row: jax.Array, i: int) -> None:
        for n, new in enumerate((k_new, v_new)):
            tile = buffers[i, n]
            if across:  # [K, H, B]: a row's token is one lane, which moves to the lane of its place
                at, place = pl.multiple_of(lax.div(row, LANES) * LANES, LANES), lax.rem(places_B[row], LANES)
                moved = pltpu.roll(_words(new[:, :, pl.ds(at, LANES)]), lax.rem(place + LANES - lax.rem(row, LANES), LANES), 2)
                here = lax.broadcasted_iota(jnp.int32, moved.shape, 2) == place
                buffers[i, n] = _of_words(jnp.where(here, moved, _words(tile)), tile.dtype)
            else:
                token = new[row]
                here = lax.broadcasted_iota(jnp.int32, tile.shape, 1) == lax.rem(places_B[row], SUBLANES)
                buffers[i, n] = jnp.where(here, token, tile)

    def some(chunk: jax.Array, _: None) -> None:
        def each(act: Callable) -> None:
            for i in range(AT_ONCE):
                row = chunk * AT_ONCE + i
                pl.when(valid(row))(functools.partial(act, row, i))

        def load(row: jax.Array, i: int) -> None:
            for tile, buffer in copies(row, i):
                pltpu.make_async_copy(tile, buffer, loaded.at[i]).start()

        def store(row: jax.Array, i: int) -> None:
            for tile, buffer in copies(row, i):
                pltpu.make_async_copy(tile, buffer, loaded.at[i]).wait()
            replace(row, i)
            for tile, buffer in copies(row, i):
                pltpu.make_async_copy(buffer, tile, stored.at[i]).start()

        def finish(row: jax.Array, i: int) -> None:
            for tile, buffer in copies(row, i):
                pltpu.make_async_copy(buffer, tile, stored.at[i]).wait()

        for act in (load, store, finish):
            each(act)

    lax.fori_loop(0, -(-rows // AT_ONCE), some, None)


def put_tokens(
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_B: jax.Array,
    places_B: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    *,
    tokens: int = 1,
    interpret: Any = False,
) -> Pools:
    """`pages.write_token` by the kernel. `interpret`: as for `pallas_call`."""
    if tokens > 1:  # rows that write together would overwrite each other's tiles
        for first in range(tokens):
            some = (x[first::tokens] for x in (pages_B, places_B, k_BKH, v_BKH))
            keys_LPKsH, values_LPKsH = put_tokens(keys_LPKsH, values_LPKsH, layer, *some, interpret=interpret)
        return keys_LPKsH, values_LPKsH
    kv_heads, head_size = k_BKH.shape[1:]
    if flipped(head_size):
        inputs = tuple(jnp.pad(x.transpose(1, 2, 0), [(0, 0), (0, 0), (0, -len(x) % LANES)]) for x in (k_BKH, v_BKH))
        tile = (kv_heads, head_size, LANES)
    else:
        inputs = tuple(x[:, :, None] for x in (k_BKH, v_BKH))
        tile = (kv_heads, SUBLANES, head_size)
    inputs = tuple(x.astype(keys_LPKsH.dtype) for x in inputs)
    whole = pl.BlockSpec(inputs[0].shape, lambda *_: (0,) * inputs[0].ndim)
    scalars = scalar(layer), pages_B.astype(jnp.int32), places_B.astype(jnp.int32)
    semaphores = [pltpu.SemaphoreType.DMA((AT_ONCE,))] * 2
    scratch = [pltpu.VMEM((AT_ONCE, 2, *tile), keys_LPKsH.dtype), *semaphores]
    pools = keys_LPKsH, values_LPKsH
    return call_in_place(_write_token, "write_token", scalars, inputs, [whole, whole], pools, scratch, interpret)[1]


def _copy_some(count: int, copies: Callable[[jax.Array], list], valid: Callable[[jax.Array], jax.Array]) -> None:
    """Starts AT_ONCE times the copies of an index below `count`, then waits for them, and so on."""

    def some(chunk: jax.Array, _: None) -> None:
        for act in ("start", "wait"):
            for i in range(AT_ONCE):
                index = chunk * AT_ONCE + i
                here = (index < count) & valid(jnp.minimum(index, count - 1))

                @pl.when(here)
                def _(index: jax.Array = index, act: str = act) -> None:
                    for copy in copies(index):
                        getattr(copy, act)()

    lax.fori_loop(0, -(-count // AT_ONCE), some, None)


def _write_pages(layer_1, pages_n, k_new, v_new, _keys, _values, keys, values, sem) -> None:
    def copies(n: jax.Array) -> list:
        pairs = ((k_new, keys), (v_new, values))
        return [pltpu.make_async_copy(new.at[n], pool.at[layer_1[0], pages_n[n]], sem.at[0]) for new, pool in pairs]

    _copy_some(pages_n.shape[0], copies, lambda n: (pages_n[n] >= 0) & (pages_n[n] < keys.shape[1]))


def put_pages(
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_Bm: jax.Array,
    k_BCKH: jax.Array,
    v_BCKH: jax.Array,
    *,
    interpret: Any = False,
) -> Pools:
    """`pages.write_pages` by the kernel. `interpret`: as for `pallas_call`."""
    (*_, kv_heads, places, head_size), across = keys_LPKsH.shape, flipped(keys_LPKsH.shape[-1])
    order = (0, 2, 3, 1) if across else (0, 2, 1, 3)
    paged = [x.reshape(-1, places, kv_heads, head_size).transpose(order).astype(keys_LPKsH.dtype) for x in (k_BCKH, v_BCKH)]
    scalars = scalar(layer), pages_Bm.reshape(-1).astype(jnp.int32)
    scratch = [pltpu.SemaphoreType.DMA((1,))]
    return call_in_place(_write_pages, "write_pages", scalars, tuple(paged), [_HBM, _HBM], (keys_LPKsH, values_LPKsH), scratch, interpret)[
        1
    ]


def _copy_page(source_1, target_1, _keys, _values, keys, values, sem) -> None:
    pool = keys.shape[1]

    def copies(layer: jax.Array) -> list:
        source = jnp.clip(source_1[0], 0, pool - 1)
        return [pltpu.make_async_copy(x.at[layer, source], x.at[layer, target_1[0]], sem.at[0]) for x in (keys, values)]

    target = target_1[0]
    _copy_some(keys.shape[0], copies, lambda _: (target >= 0) & (target < pool) & (target != source_1[0]))


def put_copy(keys_LPKsH: jax.Array, values_LPKsH: jax.Array, source: jax.Array, target: jax.Array, *, interpret: Any = False) -> Pools:
    """`pages.copy_page` by the kernel. `interpret`: as for `pallas_call`."""
    scalars = scalar(source), scalar(target)
    scratch = [pltpu.SemaphoreType.DMA((1,))]
    return call_in_place(_copy_page, "copy_page", scalars, (), [], (keys_LPKsH, values_LPKsH), scratch, interpret)[1]
