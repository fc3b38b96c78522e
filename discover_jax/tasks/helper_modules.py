"""Modules beside a competition's or problem's file, which it imports by their names, as a script could.

They are found in the text of the file and of the modules themselves, without running them, so that their bytes can be part of the digest
that identifies a definition. Names that only running code knows, as in `importlib.import_module(name)`, are not found.
"""

import ast
import dataclasses
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from discover_jax.exceptions import ConfigError

_OURS = __name__.split(".")[0]
"""This package, which is beside files in the project's own folder."""


@dataclasses.dataclass(frozen=True)
class Helper:
    """A module beside a definition's file: its file and the bytes that were hashed."""

    path: Path
    code: bytes


def find_helpers(path: Path, code: bytes) -> dict[str, Helper]:
    """The modules beside `path` that its code imports, directly or through others of them, by their full names.

    Raises:
      OSError: a module cannot be read.
    """
    found: dict[str, Helper] = {}
    waiting = list(_imported(code, package=""))
    while waiting:
        name = waiting.pop()
        file = _file_of(path.parent, name)
        if name in found or file is None or name.split(".")[0] == _OURS:
            continue
        found[name] = Helper(file, file.read_bytes())
        is_package = file.name == "__init__.py"
        waiting += _imported(found[name].code, package=name if is_package else name.rpartition(".")[0])
    return found


def helpers_digest(helpers: Mapping[str, Helper]) -> str:
    """sha256 of the names and bytes of the modules; "" if there are none."""
    if not helpers:
        return ""
    parts = [f"{name} {hashlib.sha256(helpers[name].code).hexdigest()}\n" for name in sorted(helpers)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def make_importable(helpers: Mapping[str, Helper], user: Path) -> None:
    """Lets this process import the modules, from the bytes that were hashed. Modules of the same names from before are forgotten.

    Args:
      user: the file that imports them, for messages.

    Raises:
      ConfigError: another module of the same name is installed, or belongs to another competition.
    """
    finder = _finder()
    for name, helper in helpers.items():
        if "." not in name:
            _check_name(name, helper, user, finder.known.get(name))
    for name, helper in helpers.items():
        if finder.known.get(name) != helper:
            finder.known[name] = helper
            sys.modules.pop(name, None)


def _imported(code: bytes, package: str) -> Iterator[str]:
    """Names of the modules that the code may import, each with the packages that contain it. `package`: for relative imports."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # running it will say what is wrong
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]  # a name may be a module of the package
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: count + 1]) for count in range(len(parts)))


def _file_of(folder: Path, name: str) -> Path | None:
    """The file of a module below `folder`; None if there is none."""
    place = folder.joinpath(*name.split("."))
    return next((file for file in (place / "__init__.py", place.with_name(place.name + ".py")) if file.is_file()), None)


def _check_name(name: str, helper: Helper, user: Path, known: Helper | None) -> None:
    if known is not None:
        if known.path != helper.path and known.code != helper.code:
            raise ConfigError(
                f"{user} imports {name!r} from {helper.path}, but another competition or problem of this run uses {known.path} under the"
                " same name. Rename one of them."
            )
        return
    module = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if module is None else module.__spec__
    origin = getattr(module, "__file__", None) or (spec.origin if spec is not None else None)
    if (spec is None and module is None) or (origin is None and spec is not None and spec.loader is None):  # a folder is no rival
        return
    if origin is None or Path(origin).resolve() != helper.path.resolve():
        raise ConfigError(
            f"{user} imports {name!r}. That is a module beside it, {helper.path}, and also one of this Python ({origin or 'built in'})."
            " Rename the file, so that it is clear which one is meant."
        )


class _Finder:
    """Finds the known modules; an entry of `sys.meta_path`."""

    def __init__(self) -> None:
        self.known: dict[str, Helper] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        helper = self.known.get(fullname)
        if helper is None:
            return None
        packages = [str(helper.path.parent)] if helper.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(fullname, helper.path, loader=_Loader(helper), submodule_search_locations=packages)


@dataclasses.dataclass(frozen=True)
class _Loader(importlib.abc.Loader):
    """Runs a module's hashed bytes; writes no compiled file beside it."""

    helper: Helper

    def exec_module(self, module: types.ModuleType) -> None:
        exec(compile(self.helper.code, str(self.helper.path), "exec"), module.__dict__)


def _finder() -> _Finder:
    """The finder of this process; before all others, so that the hashed bytes are those that run."""
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            return finder
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    return finder
