"""Headers of the tensors in a checkpoint folder: which file has which tensor, with its shape and type. No weight is read."""

import dataclasses
from pathlib import Path
from typing import Any

import safetensors
from absl import logging
from safetensors import SafetensorError

from discover_jax.exceptions import WeightsError
from discover_jax.models.shards import INDEX
from discover_jax.published import check_regular, is_there, read_object, show, visible_files

_ITEMSIZES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
_MAX_NAMED = 5
"""Names that an error message lists before it only counts them."""


@dataclasses.dataclass(frozen=True)
class Header:
    """File, shape and type of a tensor, as the file's header states them."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return _ITEMSIZES[self.dtype]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file of the folder.

    Raises:
      WeightsError: the file cannot be read, or has another value.
    """
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"Cannot read {path}: {error}. Download the folder again.") from error


def read_headers(path: Path) -> dict[str, Header]:
    """The headers of all tensors. With an index, each is read from the file that the index names, so that left-over files do not count.

    Raises:
      WeightsError: a file is missing or damaged, the index is wrong, or two files have a tensor and there is no index.
    """
    files = visible_files(path, "*.safetensors")
    if not files:
        raise WeightsError(f"{path} has config.json but no *.safetensors files. Download the weights too.")
    if (index := _find_index(path)) is not None:
        return _read_indexed_headers(path, index)
    headers: dict[str, Header] = {}
    for file in files:
        for name, header in _read_file_headers(file).items():
            if name in headers:
                raise WeightsError(
                    f"{path} has tensor {name!r} twice: in {headers[name].file.name} and in {file.name}. Delete the file that does not"
                    " belong to this checkpoint."
                )
            headers[name] = header
    return headers


def _find_index(path: Path) -> Path | None:
    """The index of the safetensors files; None if there is none. Indices of other formats, such as pytorch_model.bin.index.json, do not
    count.

    Raises:
      WeightsError: there are several, and none has the usual name.
    """
    if is_there(path / INDEX):
        return path / INDEX
    found = visible_files(path, "*.safetensors.index.json")
    if len(found) > 1:
        raise WeightsError(
            f"{path} has {len(found)} indices: {', '.join(file.name for file in found[:_MAX_NAMED])}. Keep only that of this checkpoint, or"
            f" call it {INDEX}."
        )
    return found[0] if found else None


def _read_indexed_headers(path: Path, index: Path) -> dict[str, Header]:
    """The header of each tensor from the file that the index names for it."""
    names_in: dict[str, list[str]] = {}
    for name, file in _read_weight_map(index).items():
        names_in.setdefault(file, []).append(name)
    if absent := sorted(file for file in names_in if not is_there(path / file)):
        raise WeightsError(
            f"{path} lacks {len(absent)} of the {len(names_in)} files that {index.name} names:"
            f" {', '.join(absent[:_MAX_NAMED])}. The download is incomplete; download the missing files."
        )
    headers: dict[str, Header] = {}
    for file, names in sorted(names_in.items()):
        found = _read_file_headers(path / file)
        if lost := [name for name in names if name not in found]:
            raise WeightsError(
                f"{path / file} lacks {len(lost)} of the {len(names)} tensors for which {index.name} names it:"
                f" {', '.join(lost[:_MAX_NAMED])}. The two belong to different checkpoints; download both again."
            )
        headers |= {name: found[name] for name in names}
    if others := sorted({file.name for file in visible_files(path, "*.safetensors")} - names_in.keys()):
        logging.warning("%s: ignoring %s, which %s does not name", path, ", ".join(others[:_MAX_NAMED]), index.name)
    return headers


def _read_weight_map(index: Path) -> dict[str, str]:
    """The file name of each tensor.

    Raises:
      WeightsError: the index cannot be read or has no such map, or a file is not one of the folder.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise WeightsError(
            f"{index} has weight_map = {show(found)}; it must be an object with the file name of each tensor. Download the index again."
        )
    for name, file in found.items():
        if not isinstance(file, str) or not file or file != Path(file).name or "\0" in file:
            raise WeightsError(
                f"{index} names {show(file)} as the file of {show(name)}; it must be the name of a file in the same folder. Download the"
                " index again."
            )
    return found


def _read_file_headers(file: Path) -> dict[str, Header]:
    try:
        size = check_regular(file)
    except OSError as error:
        raise WeightsError(f"Cannot read {file}: {error}. Download it again.") from error
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return {name: Header(file, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"Cannot read {file} ({size:,} bytes): {error}. The file is damaged or truncated; download it again.") from error
