"""Finds the definition of a competition: a built-in one, one of MLE-bench's, or a .py file that defines COMPETITION."""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
import types
from pathlib import Path

from discover_jax.exceptions import ConfigError, DataError
from discover_jax.tasks import mle_bench
from discover_jax.tasks.competition import Competition

_BUILT_IN = {
    "breast-cancer": "discover_jax.tasks.competitions.breast_cancer",
    "diabetes": "discover_jax.tasks.competitions.diabetes",
    "digits-parity": "discover_jax.tasks.competitions.digits_parity",
    "spaceship-titanic": "discover_jax.tasks.competitions.spaceship_titanic",
}


def locate_competition(competition: str) -> tuple[str, str]:
    """Where a competition's definition is, so that another process can load the same one.

    Args:
      competition: id of a built-in competition, path of a .py file, or "mlebench:ID".

    Returns:
      For a file, its absolute path and the sha256 of its bytes; otherwise `competition` and "".

    Raises:
      ConfigError: neither a known competition nor a .py file.
    """
    if competition in _BUILT_IN or competition.startswith(mle_bench.PREFIX):
        return competition, ""
    path = Path(competition).expanduser()
    if path.is_file() and path.suffix == ".py":
        path = path.resolve()
        return str(path), hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".py":
        problem = "the file does not exist."
    elif path.is_file():
        problem = "the file is not a .py file that defines COMPETITION."
    else:
        close = difflib.get_close_matches(competition, _BUILT_IN, n=1)
        problem = f"no built-in competition has that id{f'; did you mean {close[0]!r}?' if close else '.'}"
    raise ConfigError(
        f"config.task.competition = {competition!r}: {problem} Allowed: {', '.join(sorted(_BUILT_IN))}, the path of a .py file that"
        " defines COMPETITION (docs/own_competition.md shows one), or 'mlebench:ID' for a competition of the installed package mlebench."
    )


@functools.lru_cache(maxsize=64)
def load_competition(source: str, digest: str) -> Competition:
    """Loads what `locate_competition` found; a process gets the same object for the same arguments.

    Raises:
      ConfigError: the file fails, or does not define COMPETITION as a Competition.
      DataError: the file is gone, or changed since it was located.
    """
    if source in _BUILT_IN:
        return importlib.import_module(_BUILT_IN[source]).COMPETITION
    if source.startswith(mle_bench.PREFIX):
        return mle_bench.mlebench_competition(source.removeprefix(mle_bench.PREFIX))
    path = Path(source)
    try:
        code = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"The competition's file {path} cannot be read ({error}). Restore it at the place where it was when the run started."
        ) from error
    if hashlib.sha256(code).hexdigest() != digest:
        raise DataError(f"The competition's file {path} changed during the run. Restore the old file, or start a run in a new folder.")
    module = _execute(path, code, f"discover_jax_competition_{digest[:16]}")
    competition = getattr(module, "COMPETITION", None)
    if not isinstance(competition, Competition):
        found = "no such name" if competition is None else f"COMPETITION = {competition!r}"
        raise ConfigError(
            f"{path} must define COMPETITION, a discover_jax.tasks.competition.Competition; found {found}. docs/own_competition.md"
            " shows one."
        )
    return competition


def _execute(path: Path, code: bytes, name: str) -> types.ModuleType:
    """Runs the bytes that were hashed as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # always found for a .py path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, ConfigError):
            raise
        trace = "".join(traceback.format_exception(error)[-3:]).strip()
        raise ConfigError(f"The competition's file {path} failed while loading:\n{trace}") from error
    return module
