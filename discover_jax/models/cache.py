"""Keys and values of the tokens so far: all of them for full layers, a ring of the last `sliding_window` for sliding ones."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Axes: L pairs of layers, B rows, K key/value heads, S positions (capacity), W window, H head size.

    Attributes:
      full_k_LBKSH, full_v_LBKSH: position p of a row lies at place p.
      ring_k_LBKWH, ring_v_LBKWH: position p lies at place p mod W.
      lengths_B: int32, tokens of each row so far; the next one gets this position.
    """

    full_k_LBKSH: jax.Array
    full_v_LBKSH: jax.Array
    ring_k_LBKWH: jax.Array
    ring_v_LBKWH: jax.Array
    lengths_B: jax.Array

    @property
    def capacity(self) -> int:
        return self.full_k_LBKSH.shape[3]


def take_rows(cache: Cache, rows_R: jax.Array) -> Cache:
    """A cache whose row r is row `rows_R[r]` of the given one; rows may repeat."""
    return Cache(
        cache.full_k_LBKSH[:, rows_R],
        cache.full_v_LBKSH[:, rows_R],
        cache.ring_k_LBKWH[:, rows_R],
        cache.ring_v_LBKWH[:, rows_R],
        cache.lengths_B[rows_R],
    )


def put_rows(cache: Cache, rows_R: jax.Array, other: Cache) -> Cache:
    """The cache with row `rows_R[r]` replaced by row r of `other`; rows outside the cache are dropped.

    `other` may have the smaller capacity: what lies behind its places is then left as it was, and its lengths say that it is not in use.
    """

    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        return into.at[:, rows_R, :, : new.shape[3]].set(new, mode="drop")

    return Cache(
        put(cache.full_k_LBKSH, other.full_k_LBKSH),
        put(cache.full_v_LBKSH, other.full_v_LBKSH),
        put(cache.ring_k_LBKWH, other.ring_k_LBKWH),
        put(cache.ring_v_LBKWH, other.ring_v_LBKWH),
        cache.lengths_B.at[rows_R].set(other.lengths_B, mode="drop"),
    )


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The cache with places cut off or added at the end of its full layers; rows longer than `capacity` would lose keys."""
    held = cache.capacity

    def resize(x: jax.Array) -> jax.Array:
        if capacity <= held:
            return x[:, :, :, :capacity]
        return jax.numpy.pad(x, ((0, 0), (0, 0), (0, 0), (0, capacity - held), (0, 0)))

    return dataclasses.replace(cache, full_k_LBKSH=resize(cache.full_k_LBKSH), full_v_LBKSH=resize(cache.full_v_LBKSH))
