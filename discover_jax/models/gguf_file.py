"""Opens GGUF files: checks them, and gives their metadata and stored tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` (an extra) parses it.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from discover_jax.exceptions import WeightsError

_MAGIC = b"GGUF"

_T = TypeVar("_T", int, float, str, bool, list)
# Metadata keys whose types are of these Python types. bool is a subclass of int, so integers exclude it.
_KINDS: dict[type, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list"}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file stores it.

    Attributes:
      type: name of its quantisation, such as "Q4_K" or "F32".
      shape: (rows, columns) or (size,), as in PyTorch. The file states it in reverse order.
      data: the file's bytes, mapped. The first axis is that of `shape`; of quantised types, the last one counts bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray


class GgufFile:
    """An open GGUF file.

    Attributes:
      tensors: by name, in the order of the file.
      version: of the package `gguf` that read it.
    """

    def __init__(self, path: str | Path):
        """Parses the header and maps the tensors.

        Raises:
          WeightsError: the file is missing, not GGUF, damaged, truncated, or one part of several; or the package `gguf` is missing.
        """
        try:
            import gguf
        except ImportError as error:
            raise WeightsError("Reading GGUF files requires the package gguf. Install it: pip install 'discover_jax[gguf]'.") from error
        self.path = Path(path)
        size = _check_magic(self.path)
        try:
            self._fields = (reader := gguf.GGUFReader(self.path)).fields
            self.tensors = {
                tensor.name: StoredTensor(tensor.name, tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())), tensor.data)
                for tensor in reader.tensors
            }
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
            raise WeightsError(
                f"Cannot read {self.path} ({size:,} bytes): {error}. The file is truncated or damaged, or newer than the installed package"
                " gguf. Download it again, or upgrade gguf."
            ) from error
        if (parts := self.get("split.count", int, 1)) > 1:
            raise WeightsError(
                f"{self.path} is part {self.get('split.no', int, 0) + 1} of {parts}. Merge the parts into one file:"
                " llama-gguf-split --merge FIRST_PART OUT.gguf."
            )

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """The value of a metadata key.

        Args:
          kind: int, float, str, bool or list.
          default: the value if the key is absent; None makes the key mandatory.

        Raises:
          WeightsError: the key is absent and has no default, or its value is of another type.
        """
        field = self._fields.get(key)
        if field is None:
            if default is None:
                raise WeightsError(f"{self.path} lacks the metadata key {key!r}. Use a file that llama.cpp's converter wrote.")
            return default
        try:
            value: Any = field.contents()
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.path}: the metadata key {key!r} is not valid UTF-8. Download the file again.") from error
        if isinstance(value, int) and kind is float and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise WeightsError(f"{self.path}: the metadata key {key!r} must be {_KINDS[kind]}; got {str(value)[:60]!r}.")
        return value

    def has(self, key: str) -> bool:
        """Whether the metadata has this key."""
        return key in self._fields

    def get_float32(self, key: str, default: float | None = None) -> float:
        """A number that the file stores in float32, as the shortest decimal with that value: 1e-06, not 9.999999974752427e-07."""
        return float(str(np.float32(self.get(key, float, default))))


def _check_magic(path: Path) -> int:
    """The file's size, after a check of its first bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise WeightsError(f"Cannot read {path}: {error.strerror or error}. Set --gguf to a GGUF file.") from error
    if start != _MAGIC:
        raise WeightsError(f"{path} is not a GGUF file: it starts with {start!r}, not {_MAGIC!r}. Set --gguf to a GGUF file.")
    return size
