"""Reads checkpoint folders: config.json and *.safetensors, in any layout of `models.layouts`, one tensor at a time."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError

from discover_jax.exceptions import WeightsError
from discover_jax.kernels import mxfp4_lanes
from discover_jax.kernels.mxfp4_lanes import PARTS
from discover_jax.kernels.mxfp4_tiles import SLABS, Slab, check_scales, lay_out_blocks, lay_out_scales
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import find_layout, read_model_config
from discover_jax.models.headers import Header, read_headers, read_json
from discover_jax.models.layouts import Layout, ParamPath, paths_of
from discover_jax.models.mxfp4 import dequantise
from discover_jax.models.parameters import Tree
from discover_jax.models.progress import OnProgress, Progress
from discover_jax.published import folder_hint, is_there, visible_files

READ_BYTES = 1 << 27
"""Bytes of a tensor that are read at a time."""

_NO_ADAPTER = LoraConfig(0, 0, 0)
_FLOATS = ("BF16", "F16", "F32")
_MAX_NAMED = 5
"""Names that an error message lists before it only counts them."""
_AT_ONCE_BYTES = 64 << 20
"""Largest part of a parameter's layers, on one device, that the host reads as a whole before it sends it."""


# ---------------------------------------------------------------------- contents of a folder


@dataclasses.dataclass(frozen=True)
class _Folder:
    path: Path
    config: ModelConfig
    layout: Layout
    headers: dict[str, Header]


def find_folder(path: str | Path) -> Path:
    """The folder itself, or its `original/` if only that has weights, as in a partial download of a published repository."""
    path = Path(path)
    if not visible_files(path, "*.safetensors") and visible_files(path / "original", "*.safetensors"):
        return path / "original"
    return path


def _open_folder(path: Path) -> _Folder:
    """Reads config.json and the headers of all files. This detects truncated files before anything large is read.

    Raises:
      WeightsError: a file is missing or damaged, or the folder is not a checkpoint of a supported family.
    """
    path = find_folder(path)
    if not is_there(path / "config.json"):
        raise WeightsError(
            f"No weights at {str(path)!r}: config.json is missing.{folder_hint(path)} Set config.model.weights to a folder with"
            " config.json and *.safetensors files, or to 'apprentice' for the small model that ships with the project."
        )
    config = read_model_config(read_json(path / "config.json"))
    headers = read_headers(path)
    layout = find_layout(config, set(headers))
    if layout is None:
        raise WeightsError(
            f"{path} is not a checkpoint of {config.family}, which its config.json names: its {len(headers)} tensors"
            f" ({', '.join(sorted(headers)[:3])}, ...) include no known embedding. Download the folder again."
        )
    return _Folder(path, config, layout, headers)


@dataclasses.dataclass(frozen=True)
class _StoredParameter:
    """A parameter's rows of a tensor on disk.

    Attributes:
      shape: the parameter's. If `transposed`, its last two axes are swapped on disk.
      first_row: the parameter's first row in the tensor, which may concatenate several parameters.
    """

    header: Header
    name: str
    shape: tuple[int, ...]
    first_row: int
    transposed: bool

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of the parameter. Only the bytes of this part are read."""
        ranges = [slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)]
        ranges[0] = slice(ranges[0].start + self.first_row, ranges[0].stop + self.first_row)
        if self.transposed:
            ranges[-1], ranges[-2] = ranges[-2], ranges[-1]
        try:
            array = self._read_rows(ranges)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"Cannot read tensor {self.name!r} of {self.header.file}: {error}. The file is damaged or missing; download it again."
            ) from error
        return array.swapaxes(-1, -2) if self.transposed else array

    def _read_rows(self, ranges: list[slice]) -> np.ndarray:
        """These ranges of the tensor on disk. The file is reopened for each `READ_BYTES`: its mapped pages count as memory of this process
        until it is closed."""
        count = ranges[0].stop - ranges[0].start
        row_bytes = self.header.itemsize * math.prod(part.stop - part.start for part in ranges[1:])
        rows = max(1, READ_BYTES // max(row_bytes, 1))
        whole = None
        for first in range(0, count, rows):
            last = min(first + rows, count)
            with safetensors.safe_open(self.header.file, framework="numpy") as opened:
                part = opened.get_slice(self.name)[(slice(ranges[0].start + first, ranges[0].start + last), *ranges[1:])]
            if whole is None:
                whole = part if last == count else np.empty((count, *part.shape[1:]), part.dtype)
            if whole is not part:
                whole[first:last] = part
        assert whole is not None, "no parameter is empty"
        return whole


def _locate_parameters(
    folder: _Folder, structs: dict[ParamPath, jax.ShapeDtypeStruct]
) -> dict[tuple[ParamPath, int | None], _StoredParameter]:
    """Where each parameter is stored on disk, by path and layer.

    Raises:
      WeightsError: tensors are missing, or have a wrong shape or type. The message names the first few and counts all.
    """
    stored: dict[tuple[ParamPath, int | None], _StoredParameter] = {}
    missing, wrong = [], []
    known = set()
    for name, params, layer in folder.layout.tensors(folder.config.num_layers):
        known.add(name)
        rows = [structs[param].shape[0] for param in params]
        shape = (sum(rows), *structs[params[0]].shape[1:])
        transposed = folder.layout.is_transposed(params[0])
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        types = ("U8",) if structs[params[0]].dtype == jnp.uint8 else _FLOATS
        header = folder.headers.get(name)
        if header is None:
            missing.append(name)
            continue
        if header.shape != shape:
            wrong.append(f"{name} in {header.file.name} has shape {header.shape}; config.json requires {shape}")
        elif header.dtype not in types:
            wrong.append(f"{name} in {header.file.name} has type {header.dtype}; allowed: {', '.join(types)}")
        first = 0
        for param, count in zip(params, rows, strict=True):
            stored[param, layer] = _StoredParameter(header, name, structs[param].shape, first, transposed)
            first += count
    if missing:
        raise WeightsError(
            f"{folder.path} has {len(folder.headers)} tensors and lacks {len(missing)}: {', '.join(missing[:_MAX_NAMED])}. The download is"
            " incomplete, or config.json belongs to another model; download the folder again."
        )
    if wrong:
        raise WeightsError(
            f"{folder.path} has {len(wrong)} tensors with a wrong shape or type: {'; '.join(wrong[:_MAX_NAMED])}. The files belong to"
            " different models; download the folder again."
        )
    if unknown := sorted(folder.headers.keys() - known):
        logging.warning("%s: ignoring %d unknown tensors, such as %s", folder.path, len(unknown), ", ".join(unknown[:_MAX_NAMED]))
    return stored


# ---------------------------------------------------------------------- reading


def read_config(path: str | Path) -> ModelConfig:
    """The sizes of the model in a folder.

    Raises:
      WeightsError: config.json or the headers of the weights cannot be read, or belong to another architecture.
    """
    return _open_folder(Path(path)).config


def check_folder(path: str | Path) -> tuple[ModelConfig, int]:
    """The sizes of the model in a folder and the bytes of its tensors, after all of `load_folder`'s checks of names, shapes and types.

    Raises:
      WeightsError: see `load_folder`.
    """
    folder = _open_folder(Path(path))
    form = "dense" if folder.layout.transposed else "packed"
    structs = _parameter_structs(folder, Model(folder.config, _NO_ADAPTER, experts=form))
    stored = _locate_parameters(folder, structs)
    return folder.config, sum(math.prod(entry.shape) * entry.header.itemsize for entry in stored.values())


def load_folder(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    experts: str = "dense",
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[ModelConfig, Tree]:
    """Reads a folder as the frozen tree of `Model(config, dtype=dtype, experts=experts, mesh=mesh)`.

    All names, shapes and types are checked first. Then one tensor of one layer at a time goes from disk to the devices, and only the parts
    that belong on this process's devices. The host therefore needs memory for one such tensor, and briefly for two. Only of small tensors
    are all layers read at once, which needs no compiled function for each shape.

    Raises:
      WeightsError: a file or tensor is missing, damaged, or has a wrong shape or type; the message names it.
      ConfigError: `experts` is "tiled" or "lanes", and a scale is outside the range that this form can represent.
    """
    folder = _open_folder(Path(path))
    config, layout = folder.config, folder.layout
    if layout.transposed and experts != "dense":
        raise WeightsError(
            f"{folder.path} has dequantised experts; packing them again would lose precision. Set config.model.experts='dense', or use the"
            " MXFP4 checkpoint."
        )
    stored_form = "dense" if layout.transposed else "packed"
    structs = _parameter_structs(folder, Model(config, _NO_ADAPTER, dtype=dtype, experts=stored_form, mesh=mesh))
    reader = _Reader(structs, _locate_parameters(folder, structs), on_progress)

    def leaf(path: tuple[str, ...], struct: jax.ShapeDtypeStruct) -> jax.Array:
        if path[0] != config.stack:
            return reader.read(path, None)
        _, kind, *param = path
        param, layers = tuple(param), range(config.pattern.index(kind), config.num_layers, len(config.pattern))
        if param in structs and _local_bytes(struct) <= _AT_ONCE_BYTES:
            return reader.read_stack(param, layers, struct)
        return _stack_layers(struct, (reader.read_layer(param, layer, dtype) for layer in layers))

    abstract = Model(config, _NO_ADAPTER, dtype=dtype, experts=experts, mesh=mesh).abstract_frozen()
    return config, jax.tree_util.tree_map_with_path(lambda path, struct: leaf(tuple(key.key for key in path), struct), abstract)


class _Reader:
    """Reads parameters from disk to the devices, and reports progress."""

    def __init__(
        self,
        structs: dict[ParamPath, jax.ShapeDtypeStruct],
        stored: dict[tuple[ParamPath, int | None], _StoredParameter],
        on_progress: OnProgress | None,
    ):
        self._structs, self._stored = structs, stored
        self._progress = Progress(sum(_local_bytes(structs[param]) for param, _ in stored), on_progress)

    def read(self, param: ParamPath, layer: int | None) -> jax.Array:
        """A parameter as it is stored, except for its type."""
        struct, source = self._structs[param], self._stored[param, layer]
        array = jax.make_array_from_callback(
            struct.shape, _sharding(struct), lambda index: source.read(index or ()).astype(struct.dtype, copy=False)
        )
        self._progress.add(_local_bytes(struct))
        return array

    def read_stack(self, param: ParamPath, layers: Sequence[int], struct: jax.ShapeDtypeStruct) -> jax.Array:
        """A parameter of several layers, as it is stored except for its type, as one array like `struct`."""
        sources = [self._stored[param, layer] for layer in layers]

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            some, *rest = index or (slice(None),)
            return np.stack([source.read(tuple(rest)).astype(struct.dtype, copy=False) for source in sources[some]])

        array = jax.make_array_from_callback(struct.shape, _sharding(struct), part)
        self._progress.add(len(sources) * _local_bytes(self._structs[param]))
        return array

    def read_layer(self, param: ParamPath, layer: int, dtype: Any) -> jax.Array:
        """A layer's parameter. Experts' matrices stored in MXFP4 are tiled or dequantised if the tree has them in that form."""
        if param in self._structs:
            return self.read(param, layer)
        _, matrix, form = param
        blocks, scales = (("experts", matrix, name) for name in ("blocks", "scales"))
        if form == "words":
            return lay_out_blocks(self.read(blocks, layer), SLABS[matrix])
        if form == "factors":
            return _tile_scales(self.read(scales, layer), SLABS[matrix])
        if form == "lanes":
            return mxfp4_lanes.lay_out_blocks(self.read(blocks, layer), PARTS[matrix])
        if form == "powers":
            return _lay_out_scales(self.read(scales, layer), PARTS[matrix])
        return _dequantise(self.read(blocks, layer), self.read(scales, layer), dtype)


def _parameter_structs(folder: _Folder, model: Model) -> dict[ParamPath, jax.ShapeDtypeStruct]:
    """Shape, type and sharding of each parameter as it is read. A layer's parameter lacks the stack's first axis."""
    singles = folder.layout.singles.values()
    return {
        param: struct if param in singles else _without_first_axis(struct)
        for param, struct in paths_of(model.abstract_frozen(), folder.config).items()
    }


def _sharding(struct: jax.ShapeDtypeStruct) -> Sharding:
    return struct.sharding if struct.sharding is not None else SingleDeviceSharding(jax.local_devices()[0])


def _without_first_axis(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = struct.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(struct.shape[1:], struct.dtype, sharding=sharding)


def _local_bytes(struct: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array's distinct parts on this process's devices."""
    indices = _sharding(struct).addressable_devices_indices_map(struct.shape).values()
    parts = {tuple(part.indices(size)[:2] for part, size in zip(index or (), struct.shape, strict=True)) for index in indices}
    return sum(math.prod(stop - start for start, stop in part) for part in parts) * struct.dtype.itemsize


def _stack_layers(struct: jax.ShapeDtypeStruct, layers: Iterator[jax.Array]) -> jax.Array:
    """The layers' arrays as one array. Each is written in place, so that there is never a second copy of the stack."""
    stack = jnp.zeros(struct.shape, struct.dtype, device=_sharding(struct))
    for index, layer in enumerate(layers):
        stack = _set_layer(stack, layer, index)
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, index: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)


_dequantise = jax.jit(dequantise, static_argnums=2)


def _lay_out_scales(scales: jax.Array, parts: int) -> jax.Array:
    mxfp4_lanes.check_scales(scales)
    return mxfp4_lanes.lay_out_scales(scales, parts)


def _tile_scales(scales: jax.Array, slab: Slab) -> jax.Array:
    check_scales(scales)
    return lay_out_scales(scales, slab)
