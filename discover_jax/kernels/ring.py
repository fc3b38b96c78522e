"""The order of devices in a ring, see `exchange_ring`. Nothing here needs a kernel, so every platform may import it."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh

TILE = 256
"""Tokens of each half of a device's chunk, which goes around in one direction, should be a multiple of this."""
Place = tuple[int, ...]
"""Coordinates of a device in the torus; its core on the chip last."""


def ring_of(places: Sequence[Place]) -> tuple[int, ...]:
    """Numbers of devices in an order in which neighbours, the last and the first included, are neighbours in the torus.

    If there is no such order, or if the places fill no box, the order is as good as was found: the devices' own at worst.
    """
    box = [sorted({place[axis] for place in places}) for axis in range(len(places[0]))]
    sizes = [len(values) for values in box]
    natural = tuple(range(len(places)))
    if len(set(places)) < len(places) or int(np.prod(sizes)) != len(places):
        return natural
    numbers = {tuple(values.index(x) for values, x in zip(box, place, strict=True)): number for number, place in enumerate(places)}
    even = next((axis for axis, size in enumerate(sizes) if size % 2 == 0), 0)
    columns = _snake([1 if axis == even else size for axis, size in enumerate(sizes)])

    def at(row: int, column: int) -> int:
        return numbers[tuple(row if axis == even else x for axis, x in enumerate(columns[column]))]

    rows = sizes[even]
    if rows % 2 or len(columns) == 1:
        order = [at(row, column) for row in range(rows) for column in _turned(range(len(columns)), row)]
    else:  # there through all columns but the first, and back through that one
        there = [at(row, column) for row in range(rows) for column in _turned(range(1, len(columns)), row)]
        order = [at(0, 0), *there, *(at(row, 0) for row in range(rows - 1, 0, -1))]
    return tuple(order)


def _turned(steps: range, row: int) -> range:
    return steps[::-1] if row % 2 else steps


def _snake(sizes: Sequence[int]) -> list[Place]:
    """All places of a box, each a neighbour of the one before."""
    if not sizes:
        return [()]
    inner = _snake(sizes[1:])
    return [(x, *place) for x in range(sizes[0]) for place in (inner[::-1] if x % 2 else inner)]


def ring_along(mesh: Mesh | AbstractMesh, axis: str) -> tuple[int, ...]:
    """The ring of devices along an axis of a mesh, at the first place of its other axes. Devices without coordinates keep their order."""
    size = mesh.shape[axis]
    if isinstance(mesh, AbstractMesh):
        return tuple(range(size))
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(size, -1)[:, 0]
    if not all(hasattr(device, "coords") for device in devices):
        return tuple(range(size))
    return ring_of([(*device.coords, getattr(device, "core_on_chip", 0)) for device in devices])
