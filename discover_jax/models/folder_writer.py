"""Writes checkpoint folders: config.json and *.safetensors, in any writable layout of the family, one file at a time."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from discover_jax.exceptions import WeightsError
from discover_jax.files import replacement, storage_remedy
from discover_jax.kernels import mxfp4_lanes
from discover_jax.kernels.mxfp4_tiles import SLABS, restore
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import config_content, family_of
from discover_jax.models.layouts import HF_NAME, Layout, ParamPath, TensorEntry, paths_of
from discover_jax.models.mxfp4 import quantise
from discover_jax.models.parameters import Tree
from discover_jax.models.progress import OnProgress, Progress
from discover_jax.models.shards import INDEX, name_files, split_into_shards

# They only move bits. Operation by operation, dozens of functions would be compiled.
_restore_tiles = jax.jit(restore, static_argnames="paired")
_restore_lanes = jax.jit(mxfp4_lanes.restore, static_argnames="out")

_MAX_NAMED = 5
"""Names that an error message lists."""


def save_folder(path: str | Path, config: ModelConfig, frozen: Tree, *, layout: str = HF_NAME) -> None:
    """Writes a frozen tree as a folder, see `write_folder`.

    Args:
      frozen: the tree of a `Model` of this config, with experts in any form. Dense experts are rounded to the nearest MXFP4 values.
    """
    leaves_of = {kind: paths_of(frozen, config, kind) for kind in config.pattern}

    @functools.lru_cache(maxsize=1)
    def packed(matrix: str, layer: int) -> dict[str, jax.Array]:
        kind, repeat = config.position(layer)
        leaves = leaves_of[kind]
        names = ("weight", "words", "factors", "lanes", "powers")
        forms = {name: leaves["experts", matrix, name][repeat] for name in names if ("experts", matrix, name) in leaves}
        if "weight" in forms:
            values = quantise(forms["weight"])
        elif "lanes" in forms:
            values = _restore_lanes(**forms, out=leaves["experts", matrix, "bias"].shape[-1])
        else:
            values = _restore_tiles(**forms, paired=SLABS[matrix].paired)
        return dict(zip(("blocks", "scales"), values, strict=True))

    def tensor(param: ParamPath, layer: int | None) -> np.ndarray:
        kind, repeat = config.position(layer or 0)
        leaves = leaves_of[kind]
        if layer is None:
            return np.asarray(leaves[param])
        if param not in leaves:
            return np.asarray(packed(param[1], layer)[param[2]])
        return np.asarray(leaves[param][repeat])

    write_folder(path, config, tensor, layout=layout)


def write_folder(
    path: str | Path,
    config: ModelConfig,
    tensor: Callable[[ParamPath, int | None], np.ndarray],
    *,
    layout: str = HF_NAME,
    on_progress: OnProgress | None = None,
) -> None:
    """Writes config.json and safetensors: experts in MXFP4, everything else in bfloat16.

    Each file is replaced atomically. config.json is written last.

    Args:
      path: the folder; created if missing. Other files in it are kept.
      tensor: (param, layer or None) -> the parameter. It is called once for each parameter, in the order of the files.
      layout: name of a writable layout of the family.

    Raises:
      WeightsError: the layout is unknown, the folder already contains other weights, or the disk has too little space.
    """
    layouts = {each.name: each for each in family_of(config).layouts(config) if each.writable}
    if layout not in layouts:
        raise WeightsError(f"Unknown layout {layout!r} of {config.family}; allowed: {', '.join(layouts)}.")
    chosen, path = layouts[layout], Path(path)
    sizes = _parameter_bytes(config, chosen)

    def size_of(entry: TensorEntry) -> int:
        return sum(sizes[param] for param in entry[1])

    shards = split_into_shards(chosen.tensors(config.num_layers), size_of)
    total = sum(size_of(entry) for shard in shards for entry in shard)
    sharded = len(shards) > 1
    names = name_files(chosen.file, len(shards))
    _prepare_folder(path, {*names, INDEX} if sharded else {*names}, total)
    progress = Progress(total, on_progress)
    for name, shard in zip(names, shards, strict=True):
        progress.add(_write_shard(path / name, shard, tensor))
    if sharded:
        file_of = {entry: name for name, shard in zip(names, shards, strict=True) for entry, *_ in shard}
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})
    _write_json(path / "config.json", config_content(config, chosen))


def _parameter_bytes(config: ModelConfig, layout: Layout) -> dict[ParamPath, int]:
    """Bytes on disk of each parameter; for a parameter of layers, those of one layer."""
    abstract = Model(config, LoraConfig(0, 0, 0), dtype=jnp.bfloat16, experts="packed").abstract_frozen()
    singles = layout.singles.values()
    return {
        param: math.prod(struct.shape if param in singles else struct.shape[1:]) * struct.dtype.itemsize
        for param, struct in paths_of(abstract, config).items()
    }


def _write_shard(file: Path, shard: list[TensorEntry], tensor: Callable[[ParamPath, int | None], np.ndarray]) -> int:
    """Writes the tensors of one file; returns their bytes. They are freed on return, so that two shards are never in memory together."""
    arrays = {name: _concatenate([tensor(param, layer) for param in params]) for name, params, layer in shard}
    replace_file(file, lambda temporary: safetensors.numpy.save_file(arrays, temporary, metadata={"format": "pt"}))
    return sum(array.nbytes for array in arrays.values())


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """The rows of all parts in one contiguous array: uint8, or bfloat16 for any other type."""
    parts = [part if part.dtype == np.uint8 else part.astype(ml_dtypes.bfloat16, copy=False) for part in parts]
    return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])


def _prepare_folder(path: Path, names: set[str], total: int) -> None:
    """Creates the folder and checks that it has no weights but files of these names, and space for `total` bytes."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = {file.name for pattern in ("*.safetensors", "*.index.json") for file in path.glob(pattern)} - names
        if others:
            raise WeightsError(
                f"{path} already contains other weights: {', '.join(sorted(others)[:_MAX_NAMED])}. Choose another folder, or delete these"
                " files."
            )
        # A replaced file is kept until the new one is written, so its space does not count as free.
        if (free := shutil.disk_usage(path).free) < total:
            raise WeightsError(f"{path} has {free:,} bytes free; the weights need {total:,}. Free some space, or choose another folder.")
    except OSError as error:
        raise WeightsError(f"Cannot write weights to {path}: {error}. Choose another folder.") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file atomically. `write` writes the new content to the path that it is given.

    Raises:
      WeightsError: the file cannot be written; the old one is unchanged.
    """
    try:
        with replacement(path) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"Cannot write {path}: {error}. {storage_remedy(error)} Or choose another folder.") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda file: file.write_text(text))
