"""Opens GGUF files: checks them, and gives their metadata and stored tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf` builds several arrays for each token and
merge (17 s and 0.5 GB for a vocabulary of Qwen2.5), and its errors name neither the file nor the tensor. So this module parses the header;
the package gives the types' names and block sizes.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from discover_jax.exceptions import WeightsError
from discover_jax.extras import install_command
from discover_jax.published import check_regular

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Ids of metadata types: formats of `struct` for the scalars, and two other types.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MAX_AXES = 4

_T = TypeVar("_T", int, float, str, bool, list)
_KINDS: dict[type, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list"}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file stores it.

    Attributes:
      type: name of its quantisation, such as "Q4_K" or "F32"; "type 99" if the package gguf does not know it.
      shape: (rows, columns) or (size,), as in PyTorch. The file states it in reverse order.
      data: the file's bytes, mapped. The first axis is that of `shape`; of quantised types, the last one counts bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray


class GgufFile:
    """An open GGUF file, or the files of a split one.

    Attributes:
      path: of the file, or of the first one.
      tensors: by name, in the order of the files.
    """

    def __init__(self, path: str | Path):
        """Parses the header and maps the tensors.

        Args:
          path: of a split file, its first part. The other parts must be in the same folder.

        Raises:
          WeightsError: a file is missing, not GGUF, damaged or truncated, or not the first part; or the package `gguf` is missing.
        """
        self.path = Path(path)
        self._metadata, self.tensors = _open(self.path)
        if (count := self.get("split.count", int, 1)) > 1:
            for part in _other_parts(self.path, self.get("split.no", int), count):
                _, tensors = _open(part)
                if twice := self.tensors.keys() & tensors.keys():
                    raise WeightsError(f"{part} has the tensor {min(twice)}, and so has an earlier part. Download the files again.")
                self.tensors |= tensors

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """The value of a metadata key.

        Args:
          kind: int, float, str, bool or list.
          default: the value if the key is absent; None makes the key mandatory.

        Raises:
          WeightsError: the key is absent and has no default, or its value is of another type.
        """
        if key not in self._metadata:
            if default is None:
                raise WeightsError(f"{self.path} lacks the metadata key {key!r}. Use a file that llama.cpp's converter wrote.")
            return default
        value = self._metadata[key]
        if type(value) is int and kind is float:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # bool is a subclass of int
            raise WeightsError(f"{self.path}: the metadata key {key!r} must be {_KINDS[kind]}; got {str(value)[:60]!r}.")
        return value

    def has(self, key: str) -> bool:
        """Whether the metadata has this key."""
        return key in self._metadata

    def get_float32(self, key: str, default: float | None = None) -> float:
        """A number that the file stores in float32, as the shortest decimal with that value: 1e-06, not 9.999999974752427e-07."""
        return float(str(np.float32(self.get(key, float, default))))


def _open(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of one file."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            header = _Header(file, path)
            metadata, infos = header.read()
            end = file.tell()
    except OSError as error:
        raise WeightsError(f"Cannot read {path}: {error.strerror or error}. Set --gguf to a GGUF file.") from error
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise WeightsError(f"{path} is damaged: general.alignment is {alignment!r}, not a positive integer. Download the file again.")
    return metadata, _map_tensors(path, header.size, infos, -(-end // alignment) * alignment)


def _other_parts(path: Path, number: int, count: int) -> list[Path]:
    """The parts of a split file after the first one. llama.cpp names them NAME-00001-of-00003.gguf and so on.

    Args:
      number: of the part at `path`, from 0.
    """
    ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if not path.name.endswith(ending):
        raise WeightsError(f"{path} is part {number + 1} of {count}, so its name must end with {ending!r}. Give all parts their old names.")
    parts = [path.with_name(f"{path.name.removesuffix(ending)}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]
    if number:
        raise WeightsError(f"{path} is part {number + 1} of {count}. Set --gguf to the first part, {parts[0].name}.")
    if missing := [part.name for part in parts if not part.exists()]:
        raise WeightsError(
            f"{path} is part 1 of {count}, and these parts are missing: {', '.join(missing)}. Download them to the same folder."
        )
    return parts[1:]


@dataclasses.dataclass(frozen=True)
class _TensorInfo:
    """What the header says of a tensor.

    Attributes:
      type: number of its type.
      offset: of its first byte, from the start of all tensors.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


class _Header:
    """Reads a file's header: counts, metadata, and a list of the tensors."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path, self.size = file, path, path.stat().st_size

    def read(self) -> tuple[dict[str, Any], dict[str, _TensorInfo]]:
        """The metadata and the list of tensors, by name."""
        if (start := self._file.read(len(_MAGIC))) != _MAGIC:
            raise WeightsError(f"{self._path} is not a GGUF file: it starts with {start!r}, not {_MAGIC!r}. Set --gguf to a GGUF file.")
        if (version := self._scalar("<I")) not in _VERSIONS:
            raise WeightsError(
                f"{self._path} has version {version} of the GGUF format (or big-endian numbers). Supported: versions"
                f" {' and '.join(map(str, _VERSIONS))}, little-endian. Convert the model again with a current llama.cpp."
            )
        num_tensors, num_keys = self._scalar("<Q"), self._scalar("<Q")
        metadata, infos = {}, {}
        for _ in range(num_keys):
            self._add(metadata, self._text(), self._value(self._scalar("<I")))
        for _ in range(num_tensors):
            name, axes = self._text(), self._scalar("<I")
            if axes > _MAX_AXES:
                raise self._damaged(f"tensor {name!r} has {axes} axes")
            shape = tuple(self._scalar("<Q") for _ in range(axes))[::-1]
            self._add(infos, name, _TensorInfo(shape, self._scalar("<I"), self._scalar("<Q")))
        return metadata, infos

    def _add(self, entries: dict[str, Any], name: str, value: Any) -> None:
        if name in entries:
            raise self._damaged(f"it has {name!r} twice")
        entries[name] = value

    def _value(self, kind: int) -> Any:
        """A metadata value of a type."""
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            item, count = self._scalar("<I"), self._scalar("<Q")
            if item in _SCALARS:
                return np.frombuffer(self._bytes(count * struct.calcsize(_SCALARS[item])), _SCALARS[item]).tolist()
            return [self._value(item) for _ in range(count)]
        raise self._damaged(f"a metadata value has the unknown type {kind}")

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _text(self) -> str:
        data = self._bytes(self._scalar("<Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"the text {data[:40]!r} is not valid UTF-8") from error

    def _bytes(self, count: int) -> bytes:
        # The comparison comes first: a damaged length may exceed the memory.
        if count > self.size or len(data := self._file.read(count)) < count:
            raise self._damaged(f"its header needs more than the file's {self.size:,} bytes")
        return data

    def _damaged(self, reason: str) -> WeightsError:
        return WeightsError(f"{self._path} is truncated or damaged: {reason}. Download the file again.")


def _map_tensors(path: Path, size: int, infos: dict[str, _TensorInfo], start: int) -> dict[str, StoredTensor]:
    """The tensors, as views of the mapped file.

    Args:
      size: bytes of the file.
      start: offset of the first tensor.
    """
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(f"Reading GGUF files requires the package gguf. Run {install_command('gguf')}.") from error
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))
    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    tensors = {}
    for name, info in infos.items():
        if info.type not in known:
            tensors[name] = StoredTensor(name, f"type {info.type}", info.shape, np.empty(0, np.uint8))
            continue
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.type)]
        columns = info.shape[-1] if info.shape else 1
        if columns % block:
            raise WeightsError(
                f"{path} is damaged: rows of {name} have {columns} values, but {known[info.type]} stores {block} at a time. Download the"
                " file again."
            )
        row_bytes = columns // block * block_bytes
        first = start + info.offset
        last = first + math.prod(info.shape[:-1]) * row_bytes
        if last > size:
            raise WeightsError(
                f"{path} is truncated or damaged: it has {size:,} bytes, but {name} ends at byte {last:,}. Download the file again."
            )
        data = mapped[first:last].reshape(*info.shape[:-1], row_bytes)
        tensors[name] = StoredTensor(
            name, known[info.type], info.shape, data.view({"F32": "<f4", "F16": "<f2"}.get(known[info.type], np.uint8))
        )
    return tensors
