"""Writes keys and values into pages of the cache: plain JAX, in place if the arrays belong to a loop's carry or are donated."""

import jax


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
) -> tuple[jax.Array, jax.Array]:
    """The stacks of pools after writing one token per row.

    Args:
      keys_LPKsH, values_LPKsH: pools of pages of s tokens.
      layer: int32 scalar, the index into the stack.
      pages_B, places_B: int32, the page of each row's token and its place in the page. Numbers that are not pages are skipped.
      k_BKH, v_BKH: keys and values of the tokens.
      tokens: number of consecutive rows that may write to the same page, to different places. All other rows have pages of their own.
    """
    del tokens  # any number of rows may write to a page

    def write(pool: jax.Array, new_BKH: jax.Array) -> jax.Array:
        return pool.at[layer, pages_B, :, places_B].set(new_BKH, mode="drop")

    return write(keys_LPKsH, k_BKH), write(values_LPKsH, v_BKH)


def write_pages(
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_Bm: jax.Array,
    k_BCKH: jax.Array,
    v_BCKH: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The stacks of pools after writing whole pages of each row, C = m s.

    Args:
      keys_LPKsH, values_LPKsH, layer: see `write_token`.
      pages_Bm: int32, entry i is the page of the row's tokens i s to (i + 1) s - 1. Numbers that are not pages are skipped.
      k_BCKH, v_BCKH: keys and values of the tokens.
    """

    def write(pool: jax.Array, new_BCKH: jax.Array) -> jax.Array:
        batch, _, kv_heads, head_size = new_BCKH.shape
        paged = new_BCKH.reshape(batch, -1, pool.shape[3], kv_heads, head_size).transpose(0, 1, 3, 2, 4)
        return pool.at[layer, pages_Bm].set(paged, mode="drop")

    return write(keys_LPKsH, k_BCKH), write(values_LPKsH, v_BCKH)


def copy_page(keys_LPKsH: jax.Array, values_LPKsH: jax.Array, source: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stacks of pools with page `source` copied to page `target` in all layers; unchanged if `target` is not a page."""

    def copy(pool: jax.Array) -> jax.Array:
        return pool.at[:, target].set(pool[:, source], mode="drop")

    return copy(keys_LPKsH), copy(values_LPKsH)
