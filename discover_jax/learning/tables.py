"""A table of named functions that refuses unknown names. Config strings select functions of `learning` only through such tables."""

from typing import NoReturn, TypeVar

from discover_jax.exceptions import ConfigError

F = TypeVar("F")


class Table(dict[str, F]):
    """Name -> function. `table[name]` raises a ConfigError that lists the known names if `name` is unknown."""

    def __init__(self, kind: str, entries: dict[str, F]):
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name: str) -> NoReturn:
        raise ConfigError(f"{self.kind} {name!r} is unknown; allowed: {', '.join(sorted(self))}.")
