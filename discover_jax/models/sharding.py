"""Logical axes of arrays to axes of the mesh: one table for all parameters, caches and batches."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from discover_jax.exceptions import ShardingError
from discover_jax.kernels.spread import ROWS

MESH_AXES = ("data", "expert", "tensor")

# A logical axis that is not named here is replicated by being None.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": "data",
    "slots": ROWS,  # rows of the decode batch
    "pages": ROWS,  # of the cache: a row's pages lie where it does
    "prompts": None,  # few, and each is read by rollouts all over the mesh
    "experts": "expert",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "expert_width": "tensor",
    "pairs": None,
    "layers": None,
    "choices": None,
    "logits": None,  # of a router: every token needs all of its own
    "width": None,
    "rank": None,
    "head_size": None,
    "positions": None,
    "blocks": None,
}


def make_mesh(data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the first data * expert * tensor of the devices, by default jax's own.

    Raises:
      ShardingError: there are fewer devices.
    """
    shape = (data, expert, tensor)
    devices = jax.devices() if devices is None else devices
    if (needed := int(np.prod(shape))) > len(devices):
        raise ShardingError(
            f"config.mesh asks for {data} x {expert} x {tensor} = {needed} devices (data x expert x tensor);"
            f" {len(devices)} are there. Lower one."
        )
    return Mesh(np.asarray(devices[:needed]).reshape(shape), MESH_AXES)


def mesh_of_run(data: int, expert: int, tensor: int) -> Mesh | None:
    """The mesh of a run on jax's own devices, of all processes; None for one device of a process that is alone.

    Raises:
      ShardingError: there are fewer devices, or some of several processes would have nothing to do.
    """
    needed, processes = data * expert * tensor, jax.process_count()
    if processes == 1:
        return make_mesh(data, expert, tensor) if needed > 1 else None
    if needed != jax.device_count():
        raise ShardingError(
            f"config.mesh is {data} x {expert} x {tensor} = {needed} devices (data x expert x tensor), and the {processes} processes of"
            f" this run have {jax.device_count()}. Each takes part with all its devices: make the product {jax.device_count()}."
        )
    return make_mesh(data, expert, tensor)


def spec_for(axes: Sequence[str]) -> PartitionSpec:
    """Partition of an array with these logical axes.

    Raises:
      ShardingError: an axis is not in the table, or two axes of the array fall on the same mesh axis.
    """
    taken: dict[str, str] = {}
    for axis in axes:
        if axis not in RULES:
            raise ShardingError(f"Logical axis {axis!r} is not in the table; known: {', '.join(RULES)}.")
        for mesh_axis in _mesh_axes(RULES[axis]):
            if mesh_axis in taken:
                raise ShardingError(f"Logical axes {taken[mesh_axis]!r} and {axis!r} of one array both fall on mesh axis {mesh_axis!r}.")
            taken[mesh_axis] = axis
    return PartitionSpec(*(RULES[axis] for axis in axes))


def _mesh_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else rule or ()


def shardings(tree: Any) -> Any:
    """The sharding of each array, abstract or not; None for those that have none."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Whole on every device of a mesh, so that every process can read it; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of abstract ones; those without a sharding are whole on it."""

    def of(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))


def sharding_for(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Sharding of an array on a mesh.

    Raises:
      ShardingError: see `spec_for`; or a size that its mesh axis does not divide.
    """
    spec = spec_for(axes)
    for axis, size, rule in zip(axes, shape, spec, strict=True):
        mesh_axes = _mesh_axes(rule)
        if size % (parts := math.prod(mesh.shape[name] for name in mesh_axes)):
            named = " x ".join(map(repr, mesh_axes))
            raise ShardingError(f"Axis {axis!r} of size {size} cannot be split over mesh axis {named} of size {parts}; choose a divisor.")
    return NamedSharding(mesh, spec)
