"""Where several tokens of a row are read at once in decoding, so that tokens after a rejected one leave nothing behind.

The draft tokens of a row are T consecutive positions. Full layers write them to the row's pages: later tokens overwrite those that are
rejected, and until then no query sees them. A ring has no places to spare, so each token gets a window of its own, which holds what the
ring would hold after it; the ring is written once it is known which tokens are kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from discover_jax.kernels.attention import ring_positions
from discover_jax.models.cache import Cache


class DraftPlaces(NamedTuple):
    """Where T tokens of B rows are written, and where their keys are; all but `positions_BT` are flat, [B T].

    Attributes:
      positions_BT: positions of the tokens.
      valid_BT: whether a token is read at all.
      pages, places: the page of each token and its place in the page. The pages of invalid tokens are out of range.
      table: [B T, M], pages of the full layers.
      counts, window_counts: keys that a query sees in the full and in the sliding layers; 0 for invalid tokens.
    """

    positions_BT: jax.Array
    valid_BT: jax.Array
    pages: jax.Array
    places: jax.Array
    table: jax.Array
    counts: jax.Array
    window_counts: jax.Array


def locate_drafts(cache: Cache, counts_B: jax.Array, tokens: int, window: int) -> DraftPlaces:
    """The places of each row's next tokens: the first `counts_B` of `tokens`, none for rows of length 0."""
    size, lengths_B = cache.pool.page_size, cache.lengths_B
    positions_BT = lengths_B[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    valid_BT = (jnp.arange(tokens) < counts_B[:, None]) & (lengths_B > 0)[:, None]
    pages_BT = jnp.take_along_axis(cache.pages_BM, positions_BT // size, axis=1, mode="clip")
    seen_BT = jnp.where(valid_BT, positions_BT + 1, 0)
    return DraftPlaces(
        positions_BT,
        valid_BT,
        jnp.where(valid_BT, pages_BT, cache.pool.pages).reshape(-1),
        (positions_BT % size).reshape(-1),
        jnp.repeat(cache.pages_BM, tokens, axis=0),
        seen_BT.reshape(-1),
        jnp.minimum(seen_BT, window).reshape(-1),
    )


def windows_of(ring_BKWH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The ring as it would be after each of T new tokens, as pages of one row each: [1, B T, K, W, H]."""
    batch, tokens = positions_BT.shape
    at_BTW = ring_positions(positions_BT + 1, ring_BKWH.shape[2])
    windows = jnp.broadcast_to(ring_BKWH[:, None], (batch, tokens, *ring_BKWH.shape[1:]))
    for t in range(tokens):  # selects are fused, and a gather is not
        here = (at_BTW == positions_BT[:, t, None, None])[:, :, None, :, None]
        windows = jnp.where(here, new_BTKH[:, None, t, :, None], windows)
    return windows.reshape(1, batch * tokens, *ring_BKWH.shape[1:])


def keep_in_rings(ring_LBKWH: jax.Array, new_LBTKH: jax.Array, lengths_B: jax.Array, kept_B: jax.Array) -> jax.Array:
    """The rings after the first `kept_B` of T new tokens, which are at positions from `lengths_B`."""
    at_BW = ring_positions(lengths_B + kept_B, ring_LBKWH.shape[3])
    for t in range(new_LBTKH.shape[2]):
        here = (at_BW == lengths_B[:, None] + t)[None, :, None, :, None]
        ring_LBKWH = jnp.where(here, new_LBTKH[:, :, t, :, None], ring_LBKWH)
    return ring_LBKWH
