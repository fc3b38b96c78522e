"""Exchange of tokens between devices that hold different experts. Its functions run within `jax.shard_map`.

Each device has some tokens and some experts. It gathers the tokens of all devices, computes its own experts for them, and receives the sum
over all devices for its own tokens. So the result is exact and dropless for any routing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from discover_jax.kernels.experts import ExpertMatrix, MixtureOfExperts


def own_experts(index_TX: jax.Array, experts: int, axis: str) -> jax.Array:
    """Numbers of experts, relative to this device's. Experts on other devices become `experts`.

    Args:
      index_TX: numbers among the experts of all devices along `axis`. Negative ones are on no device.
      experts: number of experts on each device.
      axis: name of the mesh axis.
    """
    local_TX = index_TX - experts * lax.axis_index(axis)
    return jnp.where((index_TX >= 0) & (local_TX >= 0) & (local_TX < experts), local_TX, experts)


def exchanged(
    moe: MixtureOfExperts,
    axis: str,
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    experts: int,
    **options: Any,
) -> jax.Array:
    """The sum over the experts of all devices for this device's tokens, [T, D] float32. All tokens are exchanged at once.

    Args:
      moe: computes this device's experts.
      axis: name of the mesh axis whose devices hold different experts.
      x_TD, weights_TX: as for `MixtureOfExperts`, for this device's tokens.
      index_TX: numbers among the experts of all devices.
      gate_up, down: this device's experts.
      experts: number of experts on this device.
      options: of `moe`.
    """
    x_TD, index_TX, weights_TX = (lax.all_gather(x, axis, tiled=True) for x in (x_TD, index_TX, weights_TX))
    y_TD = moe(x_TD, own_experts(index_TX, experts, axis), weights_TX, gate_up, down, experts=experts, **options)
    return lax.psum_scatter(y_TD, axis, tiled=True)


def chunk_of(tokens: int, devices: int, most: int, tile: int = 1) -> int:
    """A device's tokens in a chunk, a multiple of `tile`. Its chunks are equal; those of `devices` devices have `most` tokens together, but
    for rounding up."""
    chunks = -(-tokens * devices // most)
    return -(-tokens // (chunks * tile)) * tile


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An exchange in chunks of tokens, so that its memory does not grow with the number of devices.

    Attributes:
      axis: name of the mesh axis; empty if this device's tokens are all that it reads. Then there is one chunk.
      most: largest number of tokens of all devices in a chunk.
      tile: tokens of a device's chunk are a multiple of this.
      ring: if not empty, a chunk has at most `most` tokens of each device, which go around these devices (see `exchange_ring`). Then `tile`
        is even.
    """

    axis: str = ""
    most: int = 1
    tile: int = 1
    ring: tuple[int, ...] = ()

    def chunk(self, tokens: int) -> int:
        """This device's tokens in each chunk: equal numbers, so that the last chunk is not mostly padding."""
        if self.ring:
            return chunk_of(tokens, 1, self.most, self.tile)
        return chunk_of(tokens, self._devices(), self.most, self.tile) if self.axis else tokens

    def gathered(self, tokens: int) -> int:
        """Tokens whose experts a device computes at once: all devices' tokens in a chunk, or as many as visit it."""
        return self.chunk(tokens) * (1 if self.ring else self._devices())

    def _devices(self) -> int:
        return lax.axis_size(self.axis) if self.axis else 1

    def split(self, x_T: jax.Array, fill: Any = 0) -> jax.Array:
        """This device's tokens [T, ...] in chunks [n, t, ...], padded with `fill`."""
        chunk = self.chunk(x_T.shape[0])
        padded = jnp.pad(x_T, [(0, -x_T.shape[0] % chunk)] + [(0, 0)] * (x_T.ndim - 1), constant_values=fill)
        return padded.reshape(-1, chunk, *x_T.shape[1:])

    def join(self, x_nt: jax.Array, tokens: int) -> jax.Array:
        """The inverse of `split`."""
        return x_nt.reshape(-1, *x_nt.shape[2:])[:tokens]

    def gather(self, x_t: jax.Array) -> jax.Array:
        """The tokens of all devices in a chunk."""
        return lax.all_gather(x_t, self.axis, tiled=True) if self.axis else x_t

    def scatter(self, x_t: jax.Array) -> jax.Array:
        """For this device's tokens, the sum over all devices. The inverse of `gather`."""
        return lax.psum_scatter(x_t, self.axis, tiled=True) if self.axis else x_t

    def own(self, index_tX: jax.Array, experts: int) -> jax.Array:
        """See `own_experts`. Without an axis, the numbers are relative already."""
        return own_experts(index_tX, experts, self.axis) if self.axis else index_tX
