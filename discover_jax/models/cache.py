"""The KV cache: pages for full layers, and a ring of the last `sliding_window` tokens for sliding layers."""

import dataclasses
from collections.abc import Callable

import jax

from discover_jax.kernels import pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Pages of keys and values of the full layers. Rows get pages as they grow, and can share pages that are no longer written.

    Axes: L full layers, P pages, K key/value heads, s positions of a page, H head size.
    """

    keys_LPKsH: jax.Array
    values_LPKsH: jax.Array

    @property
    def pages(self) -> int:
        """Number of pages."""
        return self.keys_LPKsH.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.keys_LPKsH.shape[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The KV cache of a batch of rows. Axes: those of `Pool`, B rows, W window, M pages of the longest row.

    Attributes:
      pool: the pages of all rows.
      ring_k_LBKWH, ring_v_LBKWH: position p of a row is at index p mod W of its ring.
      pages_BM: int32. Position p of row b is at index p mod s of page `pages_BM[b, p // s]`. Entries past a row's length are undefined.
      lengths_B: int32, number of tokens of each row, which is also the position of the next token.
    """

    pool: Pool
    ring_k_LBKWH: jax.Array
    ring_v_LBKWH: jax.Array
    pages_BM: jax.Array
    lengths_B: jax.Array


def copy_page(pool: Pool, source: jax.Array, target: jax.Array, copy: Callable[..., tuple[jax.Array, jax.Array]] = pages.copy_page) -> Pool:
    """The pool with page `source` copied to page `target` of the same device; unchanged if `target` is not a valid page.

    Args:
      source, target: int32 scalars.
      copy: the kernel, see `Model.copy_page`.
    """
    return Pool(*copy(pool.keys_LPKsH, pool.values_LPKsH, source, target))


def take_pages(pool: Pool, pages_C: jax.Array) -> Pool:
    """A pool of these C pages. Contents are undefined for invalid page numbers."""
    return jax.tree.map(lambda x: x.at[:, pages_C].get(mode="clip"), pool)


def put_pages(pool: Pool, pages_C: jax.Array, other: Pool) -> Pool:
    """The pool with these C pages replaced by those of `other`. Invalid page numbers are skipped."""
    return jax.tree.map(lambda x, new: x.at[:, pages_C].set(new, mode="drop"), pool, other)
