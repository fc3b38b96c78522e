"""The KV cache: pages for full layers, and a ring of the last `sliding_window` tokens for sliding layers."""

import dataclasses
from collections.abc import Callable

import jax

from discover_jax.kernels import pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Pages of keys and values of the full layers. Rows get pages as they grow, and may share pages that are no longer written.

    Axes: L pairs of layers, P pages, K key/value heads, s places of a page, H head size.
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
    """A batch of rows. Axes as in `Pool`, and: B rows, W window, M pages of the longest row.

    Attributes:
      pool: of all rows.
      ring_k_LBKWH, ring_v_LBKWH: position p of a row is at place p mod W.
      pages_BM: int32, position p of a row is in page `pages_BM[b, p // s]` at place p mod s. Entries past a row's length are undefined.
      lengths_B: int32, tokens of each row so far; the position of the next one.
    """

    pool: Pool
    ring_k_LBKWH: jax.Array
    ring_v_LBKWH: jax.Array
    pages_BM: jax.Array
    lengths_B: jax.Array


def copy_page(pool: Pool, source: jax.Array, target: jax.Array, copy: Callable[..., tuple[jax.Array, jax.Array]] = pages.copy_page) -> Pool:
    """The pool with page `source` copied to page `target` of the same device; unchanged if `target` is not a page.

    Args:
      pool: pages.
      source, target: int32 scalars.
      copy: the model's kernel, see `Model.copy_page`.
    """
    return Pool(*copy(pool.keys_LPKsH, pool.values_LPKsH, source, target))


def take_pages(pool: Pool, pages_C: jax.Array) -> Pool:
    """A pool of these pages; the contents are undefined for numbers that are not pages."""
    return jax.tree.map(lambda x: x.at[:, pages_C].get(mode="clip"), pool)


def put_pages(pool: Pool, pages_C: jax.Array, other: Pool) -> Pool:
    """The pool with pages replaced by those of `other`; numbers that are not pages are skipped."""
    return jax.tree.map(lambda x, new: x.at[:, pages_C].set(new, mode="drop"), pool, other)
