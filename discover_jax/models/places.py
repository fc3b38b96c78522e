"""Where the tokens of a prompt's chunk, and the next token of each row, are in the cache. For draft tokens, see models.drafts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from discover_jax.exceptions import CapacityError
from discover_jax.kernels.attention import ring_positions
from discover_jax.models.cache import Cache


class Chunk(NamedTuple):
    """Where a chunk of C tokens a row is, in pages of s places: m pages. W: places of a ring.

    Attributes:
      positions_BC: positions of the tokens.
      pages_Bm: pages to write; on a mesh, those of all devices. The pages of padding are out of range, so they are not written.
      kept_BW: for each place of the ring after the chunk, the index among its W places before the chunk and the C tokens; None without
        sliding layers.
    """

    positions_BC: jax.Array
    pages_Bm: jax.Array
    kept_BW: jax.Array | None


def locate_chunk(cache: Cache, counts_B: jax.Array, chunk: int, window: int | None) -> Chunk:
    """The places of a chunk's tokens.

    Args:
      cache, counts_B: as for `Model.prefill`.
      chunk: number of tokens of a row, padding included.
      window: of the sliding layers; None without such layers.

    Raises:
      CapacityError: the chunk is not whole pages, or exceeds the pages of a row.
    """
    batch, size, row_pages = len(counts_B), cache.pool.page_size, cache.pages_BM.shape[1]
    if chunk % size or chunk > row_pages * size:
        raise CapacityError(
            f"A chunk of {chunk} tokens cannot be read into rows of {row_pages} pages of {size} tokens. It must be whole pages, and no more"
            " than a row has."
        )
    lengths_B = cache.lengths_B
    positions_BC = lengths_B[:, None] + jnp.arange(chunk, dtype=jnp.int32)
    firsts_m = jnp.arange(0, chunk, size)
    # The pages differ between devices; the places in them do not.
    pages_RBM, places_Bm = cache.pages_BM.reshape(-1, batch, row_pages), (lengths_B[:, None] + firsts_m) // size
    pages_RBm = jnp.take_along_axis(pages_RBM, places_Bm[None], axis=2, mode="clip")
    pages_RBm = jnp.where(firsts_m < counts_B[:, None], pages_RBm, cache.pool.pages)  # pages of padding are not written
    pages_Bm = pages_RBm.reshape(-1, len(firsts_m))
    if window is None:
        return Chunk(positions_BC, pages_Bm, None)
    after_BW, before_B1 = ring_positions(lengths_B + counts_B, window), lengths_B[:, None]
    return Chunk(positions_BC, pages_Bm, jnp.where(after_BW >= before_B1, window + after_BW - before_B1, jnp.arange(window)))


def keep_chunk(ring_BKWH: jax.Array, x_BCKH: jax.Array, kept_BW: jax.Array) -> jax.Array:
    """The ring after a chunk; see `Chunk.kept_BW`."""
    return jnp.take_along_axis(jnp.concatenate([ring_BKWH, x_BCKH.transpose(0, 2, 1, 3)], axis=2), kept_BW[:, None, :, None], axis=2)


class TokenPlaces(NamedTuple):
    """Where the next token of each row is written, and where its keys are: `counts_B` places of the pages in `table_BM`."""

    pages_B: jax.Array
    places_B: jax.Array
    table_BM: jax.Array
    counts_B: jax.Array


def locate_in_pages(cache: Cache) -> TokenPlaces:
    """The places of each row's next token in the pages of full layers. Nothing is written for rows of length 0."""
    size, lengths_B = cache.pool.page_size, cache.lengths_B
    pages_B = jnp.take_along_axis(cache.pages_BM, lengths_B[:, None] // size, axis=1, mode="clip")[:, 0]
    pages_B = jnp.where(lengths_B > 0, pages_B, cache.pool.pages)  # past the last page, so the write is dropped
    return TokenPlaces(pages_B, lengths_B % size, cache.pages_BM, lengths_B + 1)


def locate_in_rings(cache: Cache, window: int) -> TokenPlaces:
    """The places of each row's next token in the rings of sliding layers: a ring is one page per row, filled from its first place."""
    rows_B = jnp.arange(len(cache.lengths_B))
    return TokenPlaces(rows_B, cache.lengths_B % max(window, 1), rows_B[:, None], jnp.minimum(cache.lengths_B + 1, window))
