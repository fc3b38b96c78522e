"""Reads JSON from disk into dataclasses. It trusts nothing: it checks types, sizes and names, and executes nothing.

For files that may have been altered or forged: journal, checkpoints, cached verdicts. None of them is ever unpickled.
"""

import dataclasses
import enum
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

_LARGEST = 2**53  # JSON readers disagree on larger integers, and no count of a run comes near it
_SHOWN = 60
NUMBERS = dict[str, float]
"""The type of a field with numbers by name."""

T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Strict: rejects NaN and Infinity, which Python's reader accepts.

    Raises:
      ValueError: the text is not JSON, or is nested so deeply that reading it would exhaust the stack.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not valid in JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def from_row(kind: type[T], row: Any) -> T:
    """The dataclass of a row, which must have exactly one entry of the right type for each field. Enums are given by their values.

    Fields whose metadata have "later" may be missing, since earlier versions did not write them. Numbers must be finite, and integers at
    most 2**53 in magnitude. An integer may be given for a float; True is not a number.

    Args:
      kind: a dataclass with fields of type str, int, float, bool, enum, list or NUMBERS, optionally None. Elements of lists are not
        checked.
      row: a value of `parse_json`.

    Raises:
      ValueError: the row does not match. The message names the field, its value and what is allowed.
    """
    hints = _hints(kind)
    names = list(hints)
    if not isinstance(row, dict):
        raise ValueError(f"it is {_show(row)}, not an object with the fields {names}")
    missing, unknown = [name for name in _required(kind) if name not in row], [name for name in row if name not in names]
    if missing or unknown:
        raise ValueError(f"its fields are not {names}: missing {missing}, unknown {[name[:_SHOWN] for name in unknown[:5]]}")
    return kind(**{name: _value(name, row[name], hints[name]) for name in names if name in row})


@functools.cache
def _required(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if not field.metadata.get("later")]


@functools.cache  # called for every row of a journal
def _hints(kind: type) -> dict[str, Any]:
    """The type of each field, in order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _value(name: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is float and _is_number(value):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool) and _is_sound(value):
            return value
        if kind in (str, bool) and isinstance(value, kind):
            return value
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str) and value in (member.value for member in kind):
            return kind(value)
        if typing.get_origin(kind) is list and isinstance(value, list):
            return value
        if kind == NUMBERS and isinstance(value, dict) and all(_is_number(number) for number in value.values()):
            return value
    allowed = " or ".join("null" if kind is type(None) else _describe(kind) for kind in kinds)
    raise ValueError(f"its field {name!r} is {_show(value)}; it must be {allowed}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_sound(value)


def _is_sound(number: float) -> bool:
    return abs(number) <= _LARGEST if isinstance(number, int) else math.isfinite(number)


def _describe(kind: type) -> str:
    if typing.get_origin(kind) is list:
        return "a list"
    if kind == NUMBERS:
        return "an object of finite numbers"
    if issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    return {float: "a finite number", int: "an integer of at most 2**53", str: "a string", bool: "true or false"}[kind]


def _show(value: Any) -> str:
    """A value for an error message; a huge integer cannot be printed."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
