"""The matrices of a layer of experts in the update, on a TPU: unpacked, with their adapters, for the kernels.

Dimensions: P rows of a loop's blocks, F width of an expert, r rank of an adapter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels.exchange import Exchange
from discover_jax.kernels.experts_update_pallas import Owners, Tiles, activation, grouped, unpack, unpack_lanes

Arrays = dict[str, jax.Array]
"""Of one matrix: `lanes` and `powers` (see mxfp4_lanes), `blocks` and `scales`, or `weight`; and `bias`; without the adapter."""
Adapter = tuple[jax.Array, jax.Array]
"""[E, rank, in] and [E, out, rank]."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The constants of a layer: limit and alpha of the activation, scales of the adapters of both matrices, the tiles, and the exchange of
    tokens with other devices."""

    limit: float
    alpha: float
    scale_up: float
    scale_down: float
    tiles: Tiles
    exchange: Exchange = Exchange()  # noqa: RUF009 - frozen


def unpacked(matrix: Arrays, tiles: Tiles, part: int = 0, parts: int = 1) -> jax.Array:
    """[E, in, out/parts], of every `parts`-th output from `part`: gates or ups if there are two."""
    if "lanes" in matrix:
        return unpack_lanes(matrix["lanes"], matrix["powers"], part, matrix["bias"].shape[1] // parts, tiles)
    if "weight" in matrix:
        return matrix["weight"][:, part::parts].swapaxes(1, 2)
    blocks, scales = matrix["blocks"][:, part::parts], matrix["scales"][:, part::parts]
    # A TPU stores `blocks` with the outputs along its lanes, so this copies nothing.
    packed = blocks.transpose(0, 2, 3, 1).reshape(blocks.shape[0], -1, blocks.shape[1])
    return unpack(packed, scales.swapaxes(1, 2), tiles)


def alternating(gates_ErF: jax.Array, ups_ErF: jax.Array) -> jax.Array:
    """[E, 2 F, r] whose even rows are those of gates."""
    both_EF2r = jnp.stack([gates_ErF, ups_ErF], axis=2).transpose(0, 3, 2, 1)
    return both_EF2r.reshape(both_EF2r.shape[0], -1, both_EF2r.shape[3])


class Matrices:
    """The unpacked matrices and the adapters of a layer in the layouts of the kernels, for rows of a dtype.

    Attributes:
      gates, ups: [E, D, F].
      down: [E, F, D].
      a_up, a_down: [E, r, D] and [E, r, F]; None without adapters.
      b_gates, b_ups, b_down: [E, r, F], [E, r, F] and [E, r, D].
    """

    def __init__(self, adapters: tuple[Adapter, Adapter] | None, gate_up: Arrays, down: Arrays, layer: Layer, dtype: Any) -> None:
        self._layer, self._dtype = layer, dtype
        self.gates, self.ups = (unpacked(gate_up, layer.tiles, part, 2) for part in range(2))
        self.down = unpacked(down, layer.tiles)
        biases = gate_up["bias"][:, 0::2], gate_up["bias"][:, 1::2], down["bias"]
        self.bias_gates, self.bias_ups, self.bias_down = (bias.astype(jnp.float32) for bias in biases)
        self.adapted = adapters is not None
        self.a_up: Any = None
        self.a_down: Any = None
        self.b_gates: Any = None
        self.b_ups: Any = None
        self.b_down: Any = None
        if adapters is not None:
            (self.a_up, b_up), (self.a_down, b_down) = jax.tree.map(lambda x: x.astype(dtype), adapters)
            self.b_gates, self.b_ups, self.b_down = (b.swapaxes(1, 2) for b in (b_up[:, 0::2], b_up[:, 1::2], b_down))

    def low(self, scale: float, factors: list[tuple[jax.Array, Any]], owners: Owners) -> Any:
        """Rows times transposed matrices [E, r, K], scaled: float32 [P, r]; None without adapters."""
        return scale * grouped(factors, owners, self._layer.tiles, transposed=True) if self.adapted else None

    def second(self, low_Pr: Any, matrix: Any) -> Any:
        """An adapter's second product for the kernels; None without adapters."""
        return (low_Pr.astype(self._dtype), matrix) if self.adapted else None

    def back_through_down(self, d_PD: jax.Array, owners: Owners) -> tuple[Any, jax.Array]:
        """Of gradients of the output: times the adapter's second matrix, scaled, float32 [P, r] or None; and times the bias, [P].

        The bias is one more row of the matrix [E, r, D], so one product gives both."""
        bias_E1D, r = self.bias_down.astype(self._dtype)[:, None], self.b_down.shape[1] if self.adapted else 0
        rows = jnp.concatenate([self.b_down, bias_E1D], axis=1) if self.adapted else bias_E1D
        low_Pr = grouped([(d_PD, rows)], owners, self._layer.tiles, transposed=True)
        return self._layer.scale_down * low_Pr[:, :r] if self.adapted else None, low_Pr[:, r]

    def activate(self, x_PD: jax.Array, owners: Owners) -> tuple[list[jax.Array], Any]:
        """Activation, gates and ups [P, F], and the adapter's rows [P, r]."""
        low_Pr = self.low(self._layer.scale_up, [(x_PD, self.a_up)], owners)
        halves = [
            (self.gates, self.bias_gates, self.second(low_Pr, self.b_gates)),
            (self.ups, self.bias_ups, self.second(low_Pr, self.b_ups)),
        ]
        return activation(x_PD, halves, owners, self._layer.tiles, limit=self._layer.limit, alpha=self._layer.alpha), low_Pr
