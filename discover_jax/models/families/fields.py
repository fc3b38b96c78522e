"""Typed fields of a config.json, which is read as if it could hold anything."""

import math
from collections.abc import Mapping
from typing import Any

from discover_jax.exceptions import WeightsError
from discover_jax.published import show

_MOST = 2**24
"""Largest size of a model that is believed. Larger ones would exhaust the memory before a tensor is found missing."""
_REMEDY = "Use the file that was published with the weights."


class Fields:
    """The fields of a JSON object by name and type.

    All methods raise WeightsError with the field's name, its value and what is allowed. A field that is missing takes the default, and one
    without a default is an error. Null counts as any other value of a wrong type, as in transformers' strict configs.
    """

    def __init__(self, content: Mapping[str, Any], prefix: str = ""):
        """`prefix` precedes the names in messages, such as "rope_scaling."."""
        self.content, self._prefix = content, prefix

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.content.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(name, f"an integer from {least:,} to {most:,}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number. An integer may be given."""
        value = self._value(name, default)
        if not _is_finite(value) or value <= above:
            raise self.error(name, f"a finite number above {above:g}")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a text")
        return value

    def token_id(self, name: str, default: int) -> int:
        """The id of a token, or the first of several; the default also for null and an empty list."""
        value = self.content.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) and -1 <= index < _MOST for index in ids):
            raise self.error(name, "an id, a list of ids or null")
        return ids[0] if ids else default

    def require(self, *names: str) -> None:
        """Raises WeightsError if fields are missing or null, with the names of all."""
        if missing := [self._prefix + name for name in names if not self.has(name)]:
            raise WeightsError(f"config.json lacks {', '.join(missing)}. {_REMEDY}")

    def only(self, name: str, *allowed: Any, family: str) -> None:
        """Raises WeightsError if the field is there with a value that the family does not support."""
        if name in self.content and not any(type(self.content[name]) is type(each) and self.content[name] == each for each in allowed):
            raise WeightsError(
                f"config.json has {self._prefix}{name} = {show(self.content[name])}; {family} supports only"
                f" {' and '.join(map(show, allowed))}."
            )

    def error(self, name: str, allowed: str) -> WeightsError:
        """The error that a field's value is not what is allowed."""
        return WeightsError(f"config.json has {self._prefix}{name} = {show(self.content.get(name))}; it must be {allowed}. {_REMEDY}")

    def _value(self, name: str, default: Any) -> Any:
        if name in self.content:
            return self.content[name]
        if default is None:
            self.require(name)
        return default


def _is_finite(value: Any) -> bool:
    # Integers that no float can represent are not finite.
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
