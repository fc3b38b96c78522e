"""Keys and values written into pages of the cache: plain JAX, in place where the arrays are a loop's own or donated."""

import jax


def write_token(
    keys_LPKsH: jax.Array,
    values_LPKsH: jax.Array,
    layer: jax.Array,
    pages_B: jax.Array,
    places_B: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The stacks of pools with one token a row.

    Args:
      keys_LPKsH, values_LPKsH: pools of pages of s places.
      layer: int32 scalar, which of the stack.
      pages_B, places_B: int32, the page and the place in it of each row's token; of a number that is no page nothing is written.
      k_BKH, v_BKH: of the tokens.
    """

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
    """The stacks of pools with whole pages of each row, C = m s.

    Args:
      keys_LPKsH, values_LPKsH, layer: see `write_token`.
      pages_Bm: int32, the page of each row's tokens i s to (i + 1) s - 1; of a number that is no page nothing is written.
      k_BCKH, v_BCKH: of the tokens.
    """

    def write(pool: jax.Array, new_BCKH: jax.Array) -> jax.Array:
        batch, _, kv_heads, head_size = new_BCKH.shape
        paged = new_BCKH.reshape(batch, -1, pool.shape[3], kv_heads, head_size).transpose(0, 1, 3, 2, 4)
        return pool.at[layer, pages_Bm].set(paged, mode="drop")

    return write(keys_LPKsH, k_BCKH), write(values_LPKsH, v_BCKH)


def copy_page(keys_LPKsH: jax.Array, values_LPKsH: jax.Array, source: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stacks of pools, page `target` like page `source` in all layers; nothing happens if `target` is no page."""

    def copy(pool: jax.Array) -> jax.Array:
        return pool.at[:, target].set(pool[:, source], mode="drop")

    return copy(keys_LPKsH), copy(values_LPKsH)
