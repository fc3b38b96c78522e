"""Values as bytes: arguments and results of calls into the sandbox. No pickle; what is decoded is plain data, whatever the bytes.

The bytes are one line of JSON, followed by one .npy file for each array. In the JSON, {"array": i} stands for array i, and {"dict": [[key,
value], ...]} for a dict. Floats keep all of their bits; NaN and infinities are allowed. This file also lies inside the sandbox, next to the
harness, so it must not import this project.
"""

import io
import json
import math
from typing import Any

import numpy as np
from numpy.lib import format as npy

MOST_DEPTH = 64
"""Nesting of lists and dicts."""
_DTYPES = {np.dtype(name).str for name in ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]}
"""Types of arrays, in this machine's byte order."""
_SPARE_LISTS = 1000
"""A value's arrays may stand for as many nested lists as the value has bytes, and this many more."""

_PLAIN: tuple[tuple[type, Any], ...] = ((bool, bool), (int, int.__pos__), (float, float.__pos__), (str, str.__str__))


class ValueTooBigError(ValueError):
    """The value needs more bytes than allowed."""


def encode(value: Any, most_bytes: int) -> bytes:
    """The bytes of a value.

    Args:
      value: None, booleans, numbers, strings, lists, tuples (which become lists), dicts with string keys, and numpy arrays and scalars.
      most_bytes: maximum length of the result.

    Raises:
      ValueTooBigError: it would be longer.
      ValueError: it holds something else, is nested more than MOST_DEPTH deep, or has arrays that stand for too many nested lists.
    """
    arrays: list[np.ndarray] = []
    size = 0

    def add(array: np.ndarray) -> dict[str, int]:
        nonlocal size
        native = array.dtype.newbyteorder("=")
        if native.str not in _DTYPES:
            raise ValueError(f"it holds an array of {array.dtype}; arrays of booleans and of numbers of at most 64 bits can be returned")
        size += array.nbytes
        if size > most_bytes:
            raise ValueTooBigError(f"its arrays need more than {most_bytes:,} bytes")
        arrays.append(np.ascontiguousarray(array, native).reshape(array.shape))
        return {"array": len(arrays) - 1}

    def node(x: Any, depth: int) -> Any:
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        if x is None or x is True or x is False:
            return x
        if isinstance(x, np.generic):
            x = x.item() if x.dtype.kind in "biuf" and x.dtype != np.longdouble else np.asarray(x)
        # Of a subclass, the number or text itself: not what its methods say.
        for kind, plain in _PLAIN:
            if isinstance(x, kind):
                return plain(x)
        if isinstance(x, list | tuple):
            return [node(item, depth + 1) for item in x]
        if isinstance(x, dict):
            if not all(isinstance(key, str) for key in x):
                raise ValueError("it holds a dict with keys that are not strings")
            return {"dict": [[str.__str__(key), node(item, depth + 1)] for key, item in x.items()]}
        if isinstance(x, np.ndarray):
            return add(np.asarray(x))
        raise ValueError(f"it holds an object of type {type(x).__name__}; return numbers, strings, lists, dicts and numpy arrays")

    text = json.dumps(node(value, 0), separators=(",", ":")).encode()
    parts = [text, b"\n"]
    for array in arrays:
        file = io.BytesIO()
        npy.write_array(file, array, allow_pickle=False)
        parts.append(file.getvalue())
    if sum(map(len, parts)) > most_bytes:
        raise ValueTooBigError(f"it needs more than {most_bytes:,} bytes")
    _check_lists(arrays, sum(map(len, parts)))
    return b"".join(parts)


def decode(data: bytes) -> Any:
    """The value of the bytes. It takes memory in proportion to their number, also with its arrays as nested lists.

    Raises:
      ValueError: `encode` does not write such bytes.
    """
    text, newline, rest = data.partition(b"\n")
    if not newline:
        raise ValueError("the value's JSON has no end")
    file = io.BytesIO(rest)
    arrays: list[np.ndarray] = []

    def restore(x: Any, depth: int) -> Any:
        if depth > MOST_DEPTH:
            raise ValueError(f"the value is nested more than {MOST_DEPTH} deep")
        if isinstance(x, list):
            return [restore(item, depth + 1) for item in x]
        if not isinstance(x, dict):
            return x
        if x.keys() == {"array"} and x["array"] == len(arrays) and type(x["array"]) is int:
            arrays.append(_read_array(file, len(rest)))
            return arrays[-1]
        pairs = x.get("dict")
        if x.keys() == {"dict"} and isinstance(pairs, list) and all(_is_pair(pair) for pair in pairs):
            restored = {key: restore(item, depth + 1) for key, item in pairs}
            if len(restored) < len(pairs):
                raise ValueError("the value has a dict with equal keys")
            return restored
        raise ValueError("the value's JSON has an object that stands for neither an array nor a dict")

    try:
        value = restore(json.loads(text.decode()), 0)
    except RecursionError:
        raise ValueError(f"the value is nested more than {MOST_DEPTH} deep") from None
    if file.tell() != len(rest):
        raise ValueError(f"{len(rest) - file.tell():,} bytes follow the value")
    _check_lists(arrays, len(data))
    return value


def to_json(value: Any) -> str:
    """A decoded value as JSON for programs: arrays as nested lists, complex numbers as lists of two. It keeps all digits.

    NaN and infinities are written as Python's json reads them.

    Raises:
      ValueError: an integer has too many digits.
    """
    return json.dumps(value, default=_lists)


def _lists(array: np.ndarray) -> Any:
    if array.dtype.kind == "c":
        array = np.stack([np.real(array), np.imag(array)], -1)
    return array.tolist()


def _check_lists(arrays: list[np.ndarray], size: int) -> None:
    """Raises ValueError if arrays stand for too many nested lists for a value of this number of bytes.

    An array takes few bytes, but many lists, if an axis without entries or many axes of length 1 follow a long one. The list of the first
    axis is not counted.
    """
    count = sum(map(_nested_lists, arrays))
    if count > size + _SPARE_LISTS:
        shapes = ", ".join(str(array.shape) for array in sorted(arrays, key=_nested_lists, reverse=True)[:3])
        raise ValueError(
            f"as lists, its arrays would be {count:,} nested lists, more than its {size:,} bytes and {_SPARE_LISTS:,} allow; the largest"
            f" have the shapes {shapes}"
        )


def _nested_lists(array: np.ndarray) -> int:
    return sum(math.prod(array.shape[:axis]) for axis in range(1, array.ndim))  # integers of Python, which do not overflow


def _is_pair(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and isinstance(x[0], str)


def _read_array(file: io.BytesIO, length: int) -> np.ndarray:
    """The array at the position of a file of this length."""
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except Exception as error:  # numpy and ast raise many types for headers that are not valid
        raise ValueError(f"an array's header is not valid ({type(error).__name__})") from None
    if dtype.str not in _DTYPES or fortran or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"an array of {dtype} in this order is not allowed")
    size = math.prod(shape) * dtype.itemsize
    if size > length - file.tell():
        raise ValueError(f"an array claims {size:,} bytes; {length - file.tell():,} follow")
    try:
        return np.frombuffer(bytearray(file.read(size)), dtype).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"an array's shape is not valid: {error}") from None
