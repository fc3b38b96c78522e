"""Shardings: one table from logical axes to mesh axes for all parameters, caches and batches, and transfers between host and devices."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from discover_jax.exceptions import ShardingError
from discover_jax.kernels.spread import ROWS

MESH_AXES = ("data", "expert", "tensor")

# None: replicated. Every logical axis must be listed.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": "data",
    "slots": ROWS,  # rows of the decode batch
    "pages": ROWS,  # a row of the cache and its pages are on the same device
    "prompts": None,  # replicated: few, and read by rollouts on all devices
    "experts": "expert",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "mlp_width": "tensor",
    "repeats": None,
    "layers": None,
    "choices": None,
    "logits": None,  # of the router, which needs the logits of all experts of a token
    "width": None,
    "rank": None,
    "head_size": None,
    "positions": None,
    "blocks": None,
}


def make_mesh(data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the first data * expert * tensor of `devices`, by default of `jax.devices()`.

    Raises:
      ShardingError: there are too few devices.
    """
    shape = (data, expert, tensor)
    devices = jax.devices() if devices is None else devices
    if (needed := int(np.prod(shape))) > len(devices):
        raise ShardingError(
            f"config.mesh asks for {data} x {expert} x {tensor} = {needed} devices (data x expert x tensor), but only {len(devices)} are"
            " available. Lower config.mesh.data, .expert or .tensor."
        )
    return Mesh(np.asarray(devices[:needed]).reshape(shape), MESH_AXES)


def mesh_of_run(data: int, expert: int, tensor: int) -> Mesh | None:
    """The mesh over the devices of all processes of a run; None for one process with one device.

    Raises:
      ShardingError: there are too few devices, or several processes would leave some devices unused.
    """
    needed, processes = data * expert * tensor, jax.process_count()
    if processes == 1:
        return make_mesh(data, expert, tensor) if needed > 1 else None
    if needed != jax.device_count():
        raise ShardingError(
            f"config.mesh is {data} x {expert} x {tensor} = {needed} devices (data x expert x tensor), but the {processes} processes of"
            f" this run have {jax.device_count()}. A run must use all devices of its processes. Set config.mesh so that the product is"
            f" {jax.device_count()}."
        )
    return make_mesh(data, expert, tensor)


def spec_for(axes: Sequence[str]) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Raises:
      ShardingError: an axis is not in the table, or two axes map to the same mesh axis.
    """
    taken: dict[str, str] = {}
    for axis in axes:
        if axis not in RULES:
            raise ShardingError(f"Unknown logical axis {axis!r}; known: {', '.join(RULES)}. Add it to `RULES`.")
        for mesh_axis in _mesh_axes(RULES[axis]):
            if mesh_axis in taken:
                raise ShardingError(f"Logical axes {taken[mesh_axis]!r} and {axis!r} of one array both map to mesh axis {mesh_axis!r}.")
            taken[mesh_axis] = axis
    return PartitionSpec(*(RULES[axis] for axis in axes))


def _mesh_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else rule or ()


def sharding_for(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of an array on a mesh.

    Raises:
      ShardingError: see `spec_for`; or a size is not divisible by its mesh axis.
    """
    spec = spec_for(axes)
    for axis, size, rule in zip(axes, shape, spec, strict=True):
        mesh_axes = _mesh_axes(rule)
        if size % (parts := math.prod(mesh.shape[name] for name in mesh_axes)):
            named = " x ".join(map(repr, mesh_axes))
            raise ShardingError(f"Axis {axis!r} of size {size} cannot be split over mesh axis {named} of size {parts}. Choose a divisor.")
    return NamedSharding(mesh, spec)


def shardings(tree: Any) -> Any:
    """The sharding of each array, concrete or abstract; None if it has none."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding that replicates an array on every device, so that every process can read it; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def local_bytes(tree: Any) -> int:
    """Bytes of these arrays, concrete or abstract, on one device. Arrays without a sharding count fully."""

    def leaf_bytes(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------- between hosts and devices


def lay_out(value: Any, sharding: NamedSharding | None) -> Any:
    """Puts a host array on the devices. All processes must have the same array; each one transfers the parts of its own devices.

    Without a sharding, returns the array unchanged.
    """
    if sharding is None:
        return value
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(tree: Any) -> Any:
    """Copies device arrays to numpy arrays on every host. All processes must call it with the same tree."""
    return jax.device_get(jax.tree.map(_fully_addressable, tree))


def _fully_addressable(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    assert isinstance(leaf.sharding, NamedSharding), "only arrays on a mesh span several processes"
    return _replicate(leaf.sharding.mesh)(leaf)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))
