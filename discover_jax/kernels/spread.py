"""Kernels on a mesh: each device runs them on its own part (`jax.shard_map`), and what must meet is gathered or added up.

Rows and tokens are split over the axes `data` and `expert` together where they divide, so that everything is computed once; the experts are
split over `expert`. Every device sees the tokens of its neighbours along `expert`, computes what its own experts say of them, and each gets
back the sum for its own tokens: exact and dropless for any routing. Where tokens do not divide, all devices see all of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from discover_jax.kernels.experts import ExpertMatrix

_ROWS = ("data", "expert")
_EXPERT = "expert"


def can_spread(mesh: Mesh) -> bool:
    """Whether kernels run on a mesh of that shape: none of them computes a part of a head or of an expert's width."""
    return mesh.shape["tensor"] == 1


def rows_axes(size: int, mesh: Mesh) -> tuple[str, ...]:
    """The axes over which rows, or tokens, are split if there are so many: `data` and `expert`, or `data`, or none."""
    return next((axes for axes in (_ROWS, _ROWS[:1]) if size % math.prod(mesh.shape[axis] for axis in axes) == 0), ())


def _on_devices(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    # What kernels return cannot be checked: their rules for types that say over which axes a value varies do not exist.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def spread_attention(attend: Callable, mesh: Mesh) -> Callable:
    """Of packed rows: each device has whole rows."""

    def spread(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks_N: jax.Array, **options: Any
    ) -> jax.Array:
        rows = PartitionSpec(rows_axes(q_BTNH.shape[0], mesh))
        own = _on_devices(functools.partial(attend, **options), mesh, (rows, rows, rows, rows, PartitionSpec()), rows)
        return own(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)

    return spread


class _Own:
    """A matrix of the experts that one device has."""

    def __init__(self, matrix: ExpertMatrix, arrays: dict[str, jax.Array]):
        self._arrays, self.apply, self.scale = arrays, matrix.apply, getattr(matrix, "scale", 0.0)

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        return self._arrays


def spread_experts(mix: Callable, mesh: Mesh) -> Callable:
    """Each device computes its own experts. `mix` must leave out choices of an expert that is not there: those numbered `experts`."""
    parts = mesh.shape[_EXPERT]

    def spread(
        x_TD: jax.Array,
        index_TX: jax.Array,
        weights_TX: jax.Array,
        gate_up: ExpertMatrix,
        down: ExpertMatrix,
        *,
        experts: int,
        adapted: bool,
        layer: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        own, split = experts // parts, rows_axes(x_TD.shape[0], mesh)
        tokens = PartitionSpec(split)

        def of_device(x_TD: jax.Array, index_TX: jax.Array, weights_TX: jax.Array, arrays: tuple, layer: jax.Array | None) -> jax.Array:
            if _EXPERT in split:
                x_TD, index_TX, weights_TX = (lax.all_gather(x, _EXPERT, tiled=True) for x in (x_TD, index_TX, weights_TX))
            local_TX = index_TX - own * lax.axis_index(_EXPERT)
            local_TX = jnp.where((local_TX >= 0) & (local_TX < own), local_TX, own)
            matrices = (_Own(matrix, part) for matrix, part in zip((gate_up, down), arrays, strict=True))
            y_TD = mix(x_TD, local_TX, weights_TX, *matrices, experts=own, adapted=adapted, layer=layer, **options)
            return lax.psum_scatter(y_TD, _EXPERT, tiled=True) if _EXPERT in split else lax.psum(y_TD, _EXPERT)

        arrays = (gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted))
        held = PartitionSpec(_EXPERT) if layer is None else PartitionSpec(None, _EXPERT)
        specs = (tokens, tokens, tokens, held, None if layer is None else PartitionSpec())
        return _on_devices(of_device, mesh, specs, tokens)(x_TD, index_TX, weights_TX, arrays, layer)

    return spread


SPREAD: dict[str, Callable[[Callable, Mesh], Callable]] = {
    "packed_attention": spread_attention,
    "windowed_attention": spread_attention,
    "experts": spread_experts,
}
"""Operation -> how its implementation is spread over a mesh; others run as references there, which XLA splits."""
