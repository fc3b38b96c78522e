"""Declarations of parameters: shape, type, logical axes and initialisation. All trees of parameters are derived from them."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from discover_jax.kernels import mxfp4_lanes
from discover_jax.kernels.mxfp4_lanes import Lanes
from discover_jax.kernels.mxfp4_tiles import COLUMNS, ROWS, Slab, lay_out_blocks, lay_out_scales
from discover_jax.models.mxfp4 import BLOCK
from discover_jax.models.sharding import sharding_for

Tree = dict[str, Any]
"""Nested dicts whose leaves are arrays or jax.ShapeDtypeStruct."""


class Frozen(nnx.Variable):
    """A base weight; never trained."""


class Lora(nnx.Variable):
    """An adapter's weight; float32, trained."""


@dataclasses.dataclass(frozen=True)
class Declare:
    """Declares the parameters of a module.

    Attributes:
      dtype: default type of frozen weights.
      repeats: if above 0, how often the pattern of layers repeats: the first axis of stacked parameters.
    """

    dtype: Any
    repeats: int = 0

    def _variable(
        self,
        kind: type[nnx.Variable],
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        init: str | Slab | Lanes,
        dtype: Any,
        gain: float = 1.0,
    ) -> nnx.Variable:
        if len(shape) != len(axes):
            raise AssertionError(f"{len(shape)} sizes but {len(axes)} logical axes: {shape}, {axes}")
        if self.repeats:
            shape, axes = (self.repeats, *shape), ("repeats", *axes)
        return kind(jax.ShapeDtypeStruct(shape, dtype), axes=axes, init=init, gain=gain)

    def weight(
        self, shape: tuple[int, ...], axes: tuple[str, ...], init: str | Slab | Lanes = "fan_in", dtype: Any = None, gain: float = 1.0
    ) -> nnx.Variable:
        """Declares a frozen weight.

        Args:
          shape, axes: sizes and logical axes for one repeat of the pattern of layers.
          init: "fan_in" (normal, variance gain^2 / last axis), "embedding" (normal, variance 1), "ones" or "zeros". For packed MXFP4:
            "blocks" (random bytes) or "scales" (a constant for which products have about this gain). For tiles (`words` and `factors`):
            their slab; for the layout of TPU kernels (`lanes` and `powers`): its `Lanes`. Their values equal those of `blocks` and
            `scales` for the same key.
          dtype: overrides the module's type.
          gain: gain of the product, see `init`.
        """
        return self._variable(Frozen, shape, axes, init, self.dtype if dtype is None else dtype, gain)

    def lora(self, shape: tuple[int, ...], axes: tuple[str, ...], init: str) -> nnx.Variable:
        """Declares an adapter's weight. Use `init` "fan_in" for A and "zeros" for B: the policy then starts equal to the base model."""
        return self._variable(Lora, shape, axes, init, jnp.float32)


def _init_variable(key: jax.Array, variable: nnx.Variable) -> jax.Array:
    struct, (init, gain) = variable.get_value(), (variable.get_metadata()[name] for name in ("init", "gain"))
    if init == "ones":
        return jnp.ones(struct.shape, struct.dtype)
    if init == "zeros":
        return jnp.zeros(struct.shape, struct.dtype)
    if variable.get_metadata()["axes"][0] == "repeats":
        # One repeat at a time: random generation needs several times the memory of its result, and a stack can fill the device.
        one = jax.ShapeDtypeStruct(struct.shape[1:], struct.dtype)
        return jax.lax.map(lambda repeat: _init_array(jax.random.fold_in(key, repeat), one, init, gain), jnp.arange(struct.shape[0]))
    return _init_array(key, struct, init, gain)


def _init_array(key: jax.Array, struct: jax.ShapeDtypeStruct, init: str | Slab | Lanes, gain: float) -> jax.Array:
    if isinstance(init, Slab):
        experts, slabs, columns, m16, last = struct.shape
        shape = (experts, slabs * m16 * ROWS, columns * COLUMNS // BLOCK)
        if last == 8:
            return lay_out_scales(_init_array(key, jax.ShapeDtypeStruct(shape, jnp.uint8), "scales", gain), init)
        return lay_out_blocks(_init_array(key, jax.ShapeDtypeStruct((*shape, BLOCK // 2), jnp.uint8), "blocks", gain), init)
    if isinstance(init, Lanes):
        shape = (struct.shape[0], init.out, init.into // BLOCK)
        if struct.dtype == jnp.uint8:
            return mxfp4_lanes.lay_out_scales(_init_array(key, jax.ShapeDtypeStruct(shape, jnp.uint8), "scales", gain), init.parts)
        blocks = jax.ShapeDtypeStruct((*shape, BLOCK // 2), jnp.uint8)
        return mxfp4_lanes.lay_out_blocks(_init_array(key, blocks, "blocks", gain), init.parts)
    if init == "blocks":
        return jax.random.bits(key, struct.shape, jnp.uint8)
    if init == "scales":
        # Random nibbles have variance 7.33 (mean square of 0, .5, 1, 1.5, 2, 3, 4, 6); 32 values share a scale.
        return jnp.full(struct.shape, 127 + round(math.log2(gain * (struct.shape[-1] * 32 * 7.33) ** -0.5)), jnp.uint8)
    scale = 1.0 if init == "embedding" else gain * struct.shape[-1] ** -0.5
    return (scale * jax.random.normal(key, struct.shape, jnp.float32)).astype(struct.dtype)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _map(function: Any, state: nnx.State) -> Tree:
    """The results of `function(path, variable)` for all variables of a state, as nested dicts."""
    mapped = jax.tree_util.tree_map_with_path(lambda path, leaf: function(jax.tree_util.keystr(path), leaf), state, is_leaf=_is_variable)
    return nnx.to_pure_dict(mapped)


def abstract_tree(state: nnx.State, mesh: Mesh | None) -> Tree:
    """Shapes and types of a state, with shardings if there is a mesh."""

    def struct(_: str, variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        value = variable.get_value()
        if mesh is None:
            return value
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding_for(variable.get_metadata()["axes"], value.shape, mesh))

    return _map(struct, state)


def init_tree(state: nnx.State, key: jax.Array, mesh: Mesh | None) -> Tree:
    """Random values for a state. Each parameter depends only on the key and its path. Tiled weights equal packed ones."""

    def draw(path: str, variable: nnx.Variable) -> jax.Array:
        path = path.replace("['words']", "['blocks']").replace("['lanes']", "['blocks']")
        value = _init_variable(jax.random.fold_in(key, zlib.crc32(path.encode())), variable)
        if mesh is None:
            return value
        return jax.lax.with_sharding_constraint(value, sharding_for(variable.get_metadata()["axes"], value.shape, mesh))

    return _map(draw, state)
