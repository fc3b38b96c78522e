"""Exchange of tokens around a ring of devices, while experts are computed. Its functions run within `jax.shard_map`.

The tokens of each device visit all others, one after another. Each device computes its own experts for its visitors. The sums follow the
tokens one visit later, and every device adds its own. So a visit needs only what the previous one sent: XLA sends while it computes. XLA
makes no other collective of a TPU asynchronous (libtpu 0.0.42.1). Half of the tokens go around in each direction, by links that are
different if neighbours in the ring are neighbours in the torus (see `ring.ring_of`).

A device's sums are those of its tokens in the order of the ring, so they are the same in each run. They are rounded to `dtype` on each
device. A device without experts of a token adds 0, which changes no digit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from discover_jax.kernels.exchange_ring_pallas import add, join
from discover_jax.kernels.ring import TILE

_ROWS = 16
"""Tokens are sent as groups of rows. XLA sends an array in the layout with the least padding: if the width is not a multiple of 128, it
copies tokens into a layout with the tokens along the lanes, and back. In this view, the other axes are small, so such a layout would have
more padding. A TPU stores 16 rows of bfloat16 together, so the view is free."""


def _halves(x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tokens that go forward, and those that go back."""
    return x_t[: x_t.shape[0] // 2], x_t[x_t.shape[0] // 2 :]


class Sources(NamedTuple):
    """The devices whose tokens visit: of the first half, and of the second."""

    first: jax.Array
    second: jax.Array

    def of(self, x_nt: jax.Array) -> jax.Array:
        """The visitors' part [t, ...] of an array of all devices' tokens [n, t, ...]."""
        half = x_nt.shape[1] // 2
        return jnp.concatenate([x_nt[self.first, :half], x_nt[self.second, half:]])

    def put(self, x_nt: jax.Array, x_t: jax.Array) -> jax.Array:
        """`x_nt` with the visitors' part replaced."""
        half = x_nt.shape[1] // 2
        return x_nt.at[self.first, :half].set(x_t[:half]).at[self.second, half:].set(x_t[half:])


class Ring(NamedTuple):
    """A ring of devices along a mesh axis; `order` as from `ring_of`."""

    axis: str
    order: tuple[int, ...]

    def shift(self, x: jax.Array, steps: int) -> jax.Array:
        """From each device to the next one, or to the one before for `steps` = -1."""
        count, (*more, tokens, width) = len(self.order), x.shape
        pairs = [(self.order[i], self.order[(i + steps) % count]) for i in range(count)]
        view = (*more, tokens // TILE, _ROWS, TILE // _ROWS, width) if tokens % TILE == 0 else x.shape
        return lax.ppermute(x.reshape(view), self.axis, pairs).reshape(x.shape)

    def sources(self, visit: jax.Array) -> Sources:
        """The devices whose tokens are here in a visit. In the last visit, they are this device's own."""
        count, order = len(self.order), np.asarray(self.order)
        place = jnp.asarray(np.argsort(order))[lax.axis_index(self.axis)]
        return Sources(jnp.asarray(order)[(place - 1 - visit) % count], jnp.asarray(order)[(place + 1 + visit) % count])


class Visit(NamedTuple):
    """What a device computes for the tokens that visit it.

    Attributes:
      arrays: the visitors' arrays, [t, D].
      sources: where they are from.
      start_tD: float32 zeros, to which this device's part of the sums is added in place.
    """

    arrays: list[jax.Array]
    sources: Sources
    start_tD: jax.Array


def around(
    ring: Ring,
    own: Sequence[jax.Array],
    start: Any,
    compute: Callable[[Any, Visit], tuple[Any, jax.Array]],
    dtype: Any,
    interpret: Any = False,
) -> tuple[Any, jax.Array]:
    """Sends tokens around the ring. Returns the last state, and for this device's tokens the sums over all devices, [t, D].

    Args:
      ring: the devices.
      own: arrays of this device's tokens, [t, D] of one shape and dtype, t even.
      start: the first state.
      compute: gets the state and a visit. Returns the next state, and this device's part of the visitors' sums, float32 [t, D].
      dtype: of the sums that are sent.
      interpret: as for `pallas_call`.
    """

    def turn(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        state, held, sent, zeros_tD = carry
        following = tuple(ring.shift(x_shD, steps) for x_shD, steps in zip(held, (1, -1), strict=True))
        arrived = [ring.shift(x_hD, steps) for x_hD, steps in zip(sent, (1, -1), strict=True)]
        arrays = [join(held[0], held[1], i, interpret) for i in range(len(own))]
        state, part_tD = compute(state, Visit(arrays, ring.sources(number), zeros_tD))
        # The visitors leave after this visit. Otherwise, XLA would send them on twice before it computes for any.
        following, part_tD = lax.optimization_barrier((following, part_tD))
        *sums, zeros_tD = add(arrived[0], arrived[1], part_tD, interpret)
        return (state, following, tuple(sums), zeros_tD), None

    streams = [jnp.stack(both) for both in zip(*map(_halves, own), strict=True)]
    held = tuple(ring.shift(x_shD, steps) for x_shD, steps in zip(streams, (1, -1), strict=True))
    # XLA would replace zeros that it knows by a choice in each visit, which copies all that arrives.
    *nothing, zeros_tD = lax.optimization_barrier(
        (*(jnp.zeros(x_shD.shape[1:], dtype) for x_shD in streams), jnp.zeros(own[0].shape, jnp.float32))
    )
    carry, visits = (start, held, tuple(nothing), zeros_tD), jnp.arange(len(ring.order))
    # With two visits in the loop's body, tokens arrive in turn in two arrays. With one, XLA copies what arrives to where it was sent from.
    (state, _, sums, _), _ = lax.scan(turn, carry, visits, unroll=2)
    return state, jnp.concatenate(sums)
