"""A table of named functions that refuses unknown names: the one way in which config strings choose code in learning."""

from typing import NoReturn, TypeVar

from discover_jax.exceptions import ConfigError

F = TypeVar("F")


class Table(dict[str, F]):
    """Name -> function. `table[name]` with an unknown name is a ConfigError that lists the known ones."""

    def __init__(self, kind: str, entries: dict[str, F]):
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name: str) -> NoReturn:
        raise ConfigError(f"{self.kind} {name!r} is unknown; allowed: {', '.join(sorted(self))}.")
