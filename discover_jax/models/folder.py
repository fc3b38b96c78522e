"""Checkpoint folders: config.json and *.safetensors, in any layout of `models.layouts`, read and written a tensor at a time."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError

from discover_jax.exceptions import WeightsError
from discover_jax.files import replacement
from discover_jax.kernels.mxfp4_tiles import SLABS, Slab, check_scales, lay_out_blocks, lay_out_scales, restore
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.gpt_oss import Model
from discover_jax.models.layouts import HUGGINGFACE, LAYOUTS, Layout, ParamPath, layout_of, paths_of
from discover_jax.models.mxfp4 import dequantise, quantise
from discover_jax.models.parameters import Tree

SHARD_BYTES = 1 << 30
"""A file is closed when it holds so much; a tensor is never cut."""

READ_BYTES = 1 << 27
"""So much of a tensor is read at once."""

OnProgress = Callable[[int, int], None]
"""(bytes done, bytes in all) of what this process reads or writes."""

_INDEX = "model.safetensors.index.json"
_KINDS = ("sliding", "full")
_FLOATS = ("BF16", "F16", "F32")
_ITEMSIZES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
_SHOWN = 5


# ---------------------------------------------------------------------- what lies in a folder


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a file says of one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return _ITEMSIZES[self.dtype]


@dataclasses.dataclass(frozen=True)
class _Folder:
    path: Path
    config: ModelConfig
    layout: Layout
    headers: dict[str, _Header]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}. Fetch the folder again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object. Fetch the folder again.")
    return content


def find_folder(path: str | Path) -> Path:
    """The folder itself, or its `original/` where only that has weights, as the published repositories can be fetched."""
    path = Path(path)
    if not any(path.glob("*.safetensors")) and any((path / "original").glob("*.safetensors")):
        return path / "original"
    return path


def _open(path: Path) -> _Folder:
    """Lists a folder from its files' headers, which also shows truncated files, before anything large is read."""
    path = find_folder(path)
    if not (path / "config.json").exists():
        raise WeightsError(
            f"No weights at {str(path)!r}: it has no config.json. Set config.model.weights to a folder with config.json and *.safetensors,"
            " or to 'apprentice' for the small model that ships with the project."
        )
    config = ModelConfig.from_json(_read_json(path / "config.json"))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{path} has a config.json but no *.safetensors; fetch the weights too.")
    for index in sorted(path.glob("*.index.json")):
        named = _read_json(index).get("weight_map", {}).values()
        absent = sorted({str(name) for name in named} - {file.name for file in files})
        if absent:
            raise WeightsError(
                f"{path} lacks {len(absent)} of the {len(set(named))} files that {index.name} names: {', '.join(absent[:_SHOWN])}."
                " The download is incomplete; fetch them."
            )
    headers: dict[str, _Header] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(name)
                    headers[name] = _Header(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            raise WeightsError(
                f"{file} ({size:,} bytes) cannot be read: {error}. The file is damaged or truncated; fetch it again."
            ) from error
    layout = layout_of(headers)
    if layout is None:
        raise WeightsError(
            f"The tensors of {path} have no names of a gpt-oss checkpoint (it has {len(headers)}, such as"
            f" {', '.join(sorted(headers)[:3])}). Take a folder of gpt-oss-20b or -120b."
        )
    return _Folder(path, config, layout, headers)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Rows of one tensor on disk, as they are wanted: `shape` is the parameter's, [E, in, out] on disk where `transposed`."""

    header: _Header
    name: str
    shape: tuple[int, ...]
    first_row: int
    transposed: bool

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of the parameter; only its bytes are read."""
        ranges = [slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)]
        ranges[0] = slice(ranges[0].start + self.first_row, ranges[0].stop + self.first_row)
        if self.transposed:
            ranges[-1], ranges[-2] = ranges[-2], ranges[-1]
        # A tensor is read in parts, since the mapped pages of what is read count as this process's memory until the file is closed.
        count = ranges[0].stop - ranges[0].start
        row_bytes = self.header.itemsize * math.prod(part.stop - part.start for part in ranges[1:])
        rows = max(1, READ_BYTES // max(row_bytes, 1))
        try:
            whole = None
            for first in range(0, count, rows):
                last = min(first + rows, count)
                with safetensors.safe_open(self.header.file, framework="numpy") as opened:
                    part = opened.get_slice(self.name)[(slice(ranges[0].start + first, ranges[0].start + last), *ranges[1:])]
                if whole is None:
                    whole = part if last == count else np.empty((count, *part.shape[1:]), part.dtype)
                if whole is not part:
                    whole[first:last] = part
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"Tensor {self.name!r} cannot be read from {self.header.file}: {error}. The file is damaged or missing; fetch it again."
            ) from error
        assert whole is not None, "no parameter is empty"
        return whole.swapaxes(-1, -2) if self.transposed else whole


def _check(folder: _Folder, shapes: dict[ParamPath, jax.ShapeDtypeStruct]) -> dict[tuple[ParamPath, int | None], _Stored]:
    """Where each parameter is stored on disk.

    Raises:
      WeightsError: tensors are missing or of another shape or type; names the first few and counts the rest.
    """
    stored: dict[tuple[ParamPath, int | None], _Stored] = {}
    missing, wrong = [], []
    known = set()
    for name, params, layer in folder.layout.tensors(folder.config.num_layers):
        known.add(name)
        rows = [shapes[param].shape[0] for param in params]
        shape = (sum(rows), *shapes[params[0]].shape[1:])
        transposed = folder.layout.is_transposed(params[0])
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        types = ("U8",) if shapes[params[0]].dtype == jnp.uint8 else _FLOATS
        header = folder.headers.get(name)
        if header is None:
            missing.append(name)
            continue
        if header.shape != shape:
            wrong.append(f"{name} in {header.file.name} has shape {header.shape}, and config.json demands {shape}")
        elif header.dtype not in types:
            wrong.append(f"{name} in {header.file.name} is {header.dtype}, and must be {' or '.join(types)}")
        first = 0
        for param, count in zip(params, rows, strict=True):
            stored[param, layer] = _Stored(header, name, shapes[param].shape, first, transposed)
            first += count
    if missing:
        raise WeightsError(
            f"{folder.path} lacks {len(missing)} tensors, such as {', '.join(missing[:_SHOWN])} (it has {len(folder.headers)}). The"
            " download is incomplete, or config.json belongs to another model; fetch the folder again."
        )
    if wrong:
        raise WeightsError(
            f"{folder.path} has {len(wrong)} tensors that do not fit: {'; '.join(wrong[:_SHOWN])}. The files do not belong together; fetch"
            " the folder again."
        )
    if unknown := sorted(folder.headers.keys() - known):
        logging.warning("%s: %d tensors are not used, such as %s", folder.path, len(unknown), ", ".join(unknown[:_SHOWN]))
    return stored


# ---------------------------------------------------------------------- reading


def read_config(path: str | Path) -> ModelConfig:
    """The sizes of the model in a folder.

    Raises:
      WeightsError: there is no readable config.json of a gpt-oss model.
    """
    return _open(Path(path)).config


def check_folder(path: str | Path) -> tuple[ModelConfig, int]:
    """The sizes of the model in a folder and the bytes of its tensors, after all of `load_folder`'s checks of names, shapes and types.

    Raises:
      WeightsError: see `load_folder`.
    """
    folder = _open(Path(path))
    form = "dense" if folder.layout.transposed else "packed"
    structs = _structs(folder, Model(folder.config, LoraConfig(0, 0, 0), experts=form))
    stored = _check(folder, structs)
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

    All names, shapes and types are checked before anything is read. Then one tensor of one layer at a time goes from disk to the devices,
    and of it only what this process's devices hold, so that the host needs room for one such tensor (twice for a moment).

    Raises:
      WeightsError: a file or tensor is missing, damaged, or of another shape or type; the message names it.
      ConfigError: the experts are wanted in tiles, which cannot hold them.
    """
    folder = _open(Path(path))
    config, layout = folder.config, folder.layout
    if layout.transposed and experts != "dense":
        raise WeightsError(
            f"{folder.path} holds dequantised experts; they are not packed again, which would lose digits. Set"
            " config.model.experts='dense', or use the MXFP4 checkpoint."
        )
    wanted = Model(config, LoraConfig(0, 0, 0), dtype=dtype, experts=experts, mesh=mesh).abstract_frozen()
    form = "dense" if layout.transposed else "packed"
    structs = _structs(folder, Model(config, LoraConfig(0, 0, 0), dtype=dtype, experts=form, mesh=mesh))
    stored = _check(folder, structs)
    progress = _Progress(sum(_local_bytes(structs[param]) for param, _ in stored), on_progress)

    def read(param: ParamPath, layer: int | None) -> jax.Array:
        struct, source = structs[param], stored[param, layer]
        array = jax.make_array_from_callback(
            struct.shape, _sharding(struct), lambda index: source.read(index or ()).astype(struct.dtype, copy=False)
        )
        progress.add(_local_bytes(struct))
        return array

    def leaf(path: tuple[str, ...], struct: jax.ShapeDtypeStruct) -> jax.Array:
        if path[0] != "pairs":
            return read(path, None)
        _, kind, *inside = path
        param, layers = tuple(inside), range(_KINDS.index(kind), config.num_layers, 2)
        if param in structs:
            parts = (read(param, layer) for layer in layers)
        elif param[-1] == "words":
            parts = (lay_out_blocks(read((*param[:-1], "blocks"), layer), SLABS[param[1]]) for layer in layers)
        elif param[-1] == "factors":
            parts = (_factors(read((*param[:-1], "scales"), layer), SLABS[param[1]]) for layer in layers)
        else:  # a dense matrix from its MXFP4 form
            blocks, scales = ((*param[:-1], name) for name in ("blocks", "scales"))
            parts = (_dequantise(read(blocks, layer), read(scales, layer), dtype) for layer in layers)
        return _stack(struct, parts)

    return config, jax.tree_util.tree_map_with_path(lambda path, struct: leaf(tuple(key.key for key in path), struct), wanted)


def _structs(folder: _Folder, model: Model) -> dict[ParamPath, jax.ShapeDtypeStruct]:
    """Each parameter as it is read; a layer's has the shape and sharding of the stack without its first axis."""
    singles = folder.layout.singles.values()
    return {
        param: struct if param in singles else _without_first_axis(struct) for param, struct in paths_of(model.abstract_frozen()).items()
    }


def _sharding(struct: jax.ShapeDtypeStruct) -> Sharding:
    return struct.sharding if struct.sharding is not None else SingleDeviceSharding(jax.local_devices()[0])


def _without_first_axis(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = struct.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(struct.shape[1:], struct.dtype, sharding=sharding)


def _local_bytes(struct: jax.ShapeDtypeStruct) -> int:
    """Bytes of the distinct parts of an array that this process's devices hold."""
    indices = _sharding(struct).addressable_devices_indices_map(struct.shape).values()
    parts = {tuple(part.indices(size)[:2] for part, size in zip(index or (), struct.shape, strict=True)) for index in indices}
    return sum(math.prod(stop - start for start, stop in part) for part in parts) * struct.dtype.itemsize


def _stack(struct: jax.ShapeDtypeStruct, parts: Iterator[jax.Array]) -> jax.Array:
    """The parts as one array on the devices, each written in place: there is never a second copy of the stack."""
    stack = jnp.zeros(struct.shape, struct.dtype, device=_sharding(struct))
    for index, part in enumerate(parts):
        stack = _put(stack, part, index)
    return stack


_dequantise = jax.jit(dequantise, static_argnums=2)


def _factors(scales: jax.Array, slab: Slab) -> jax.Array:
    check_scales(scales)
    return lay_out_scales(scales, slab)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, part: jax.Array, index: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part.astype(stack.dtype), index, 0)


class _Progress:
    def __init__(self, total: int, report: OnProgress | None):
        self._done, self._total, self._report = 0, total, report

    def add(self, amount: int) -> None:
        self._done += amount
        if self._report is not None:
            self._report(self._done, self._total)


# ---------------------------------------------------------------------- writing


def save_folder(path: str | Path, config: ModelConfig, frozen: Tree, *, layout: str = HUGGINGFACE.name) -> None:
    """Writes a frozen tree as a folder, see `write_folder`.

    Args:
      frozen: of a `Model` of that config, its experts in any form; dense ones are rounded to the nearest MXFP4.
    """
    leaves_of = {kind: paths_of(frozen, kind) for kind in _KINDS}

    @functools.lru_cache(maxsize=1)
    def packed(matrix: str, layer: int) -> dict[str, jax.Array]:
        leaves = leaves_of[_KINDS[layer % 2]]
        forms = {
            name: leaves["experts", matrix, name][layer // 2]
            for name in ("weight", "words", "factors")
            if ("experts", matrix, name) in leaves
        }
        values = quantise(forms["weight"]) if "weight" in forms else restore(**forms, paired=SLABS[matrix].paired)
        return dict(zip(("blocks", "scales"), values, strict=True))

    def tensor(param: ParamPath, layer: int | None) -> np.ndarray:
        leaves = leaves_of[_KINDS[(layer or 0) % 2]]
        if layer is None:
            return np.asarray(leaves[param])
        if param not in leaves:
            return np.asarray(packed(param[1], layer)[param[2]])
        return np.asarray(leaves[param][layer // 2])

    write_folder(path, config, tensor, layout=layout)


def write_folder(
    path: str | Path,
    config: ModelConfig,
    tensor: Callable[[ParamPath, int | None], np.ndarray],
    *,
    layout: str = HUGGINGFACE.name,
    on_progress: OnProgress | None = None,
) -> None:
    """Writes config.json and safetensors: bfloat16, and experts in MXFP4. Each file is replaced at once, config.json last.

    Args:
      path: the folder; made if it is not there. Other files in it stay.
      tensor: (param, layer or None) -> the parameter; called once for each, in the order of the file.
      layout: a name in `layouts.LAYOUTS`.

    Raises:
      WeightsError: an unknown layout, a folder that holds other weights already, or a disk without room.
    """
    if layout not in LAYOUTS:
        raise WeightsError(f"Layout {layout!r} is not known; allowed: {', '.join(LAYOUTS)}.")
    chosen, path = LAYOUTS[layout], Path(path)
    shapes = paths_of(Model(config, LoraConfig(0, 0, 0), dtype=jnp.bfloat16, experts="packed").abstract_frozen())
    shapes |= {param: _without_first_axis(struct) for param, struct in shapes.items() if param not in chosen.singles.values()}
    shards: list[list[tuple[str, tuple[ParamPath, ...], int | None]]] = []
    room, total = 0, 0
    for entry in chosen.tensors(config.num_layers):
        size = sum(math.prod(shapes[param].shape) * shapes[param].dtype.itemsize for param in entry[1])
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(entry)
        room, total = room - size, total + size

    names = [chosen.file.format(number=number, count=len(shards)) for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    _prepare(path, {*names, _INDEX} if len(shards) > 1 else {*names}, total)
    progress = _Progress(total, on_progress)
    for name, shard in zip(names, shards, strict=True):
        arrays = {}
        for entry, params, layer in shard:
            parts = [tensor(param, layer) for param in params]
            parts = [part if part.dtype == np.uint8 else part.astype(ml_dtypes.bfloat16, copy=False) for part in parts]
            arrays[entry] = np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])
        replace_file(path / name, lambda file, arrays=arrays: safetensors.numpy.save_file(arrays, file, metadata={"format": "pt"}))
        progress.add(sum(array.nbytes for array in arrays.values()))
    if len(shards) > 1:
        file_of = {entry: name for name, shard in zip(names, shards, strict=True) for entry, *_ in shard}
        _write_json(path / _INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})
    _write_json(path / "config.json", config.to_hf() if chosen is HUGGINGFACE else config.to_original())


def _prepare(path: Path, names: set[str], total: int) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = {file.name for pattern in ("*.safetensors", "*.index.json") for file in path.glob(pattern)} - names
        if others:
            raise WeightsError(
                f"{path} holds other weights already: {', '.join(sorted(others)[:_SHOWN])}. Choose another folder, or delete them."
            )
        # What is replaced stays until its successor is written, so its room does not count.
        if (free := shutil.disk_usage(path).free) < total:
            raise WeightsError(f"{path} has room for {free:,} bytes, and the weights are {total:,}. Free some space, or choose another.")
    except OSError as error:
        raise WeightsError(f"{path} cannot be used for weights: {error}.") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file at once by what `write` puts into the path that it is given.

    Raises:
      WeightsError: it cannot be written; the old file is then still there.
    """
    try:
        with replacement(path) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} could not be written: {error}. Free some space, or choose another folder.") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda file: file.write_text(text))
