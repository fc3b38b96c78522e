"""Finds the definition of a competition or a problem: a built-in one, one of MLE-bench's, or a .py file with COMPETITION or PROBLEM."""

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
from discover_jax.tasks.helper_modules import Helper, find_helpers, helpers_digest, make_importable
from discover_jax.tasks.problem import Problem

_COMPETITIONS = "discover_jax.tasks.competitions"
_PROBLEMS = "discover_jax.tasks.problems"
_BUILT_IN = {
    "autocorrelation-1": (f"{_PROBLEMS}.autocorrelation", "PROBLEM_1"),
    "autocorrelation-2": (f"{_PROBLEMS}.autocorrelation", "PROBLEM_2"),
    "breast-cancer": (f"{_COMPETITIONS}.breast_cancer", "COMPETITION"),
    "circle-packing-26": (f"{_PROBLEMS}.circle_packing", "PROBLEM_26"),
    "circle-packing-32": (f"{_PROBLEMS}.circle_packing", "PROBLEM_32"),
    "counting-inversions": (f"{_PROBLEMS}.counting_inversions", "PROBLEM"),
    "diabetes": (f"{_COMPETITIONS}.diabetes", "COMPETITION"),
    "digits-parity": (f"{_COMPETITIONS}.digits_parity", "COMPETITION"),
    "erdos-overlap": (f"{_PROBLEMS}.erdos_overlap", "PROBLEM"),
    "online-bin-packing": (f"{_PROBLEMS}.online_bin_packing", "PROBLEM"),
    "spaceship-titanic": (f"{_COMPETITIONS}.spaceship_titanic", "COMPETITION"),
}
"""Module and name of each built-in definition."""

Definition = Competition | Problem


def locate_definition(name: str) -> tuple[str, str]:
    """Where the definition of a competition or a problem is, so that another process can load the same one.

    Args:
      name: id of a built-in one, path of a .py file, or "mlebench:ID".

    Returns:
      For a file, its absolute path; otherwise `name`. Then the sha256 of the bytes of a file or of a built-in problem's modules, so that
      scores of another verifier are not taken for its own; otherwise "". If a file imports modules beside it, "+" and a hash of these
      follow; see `helper_modules`.

    Raises:
      ConfigError: neither a known name nor a .py file.
      DataError: a module beside the file cannot be read.
    """
    if name in _BUILT_IN and _BUILT_IN[name][0].startswith(_PROBLEMS):
        digest = hashlib.sha256()
        for module in (_BUILT_IN[name][0], f"{_PROBLEMS}.exact"):
            spec = importlib.util.find_spec(module)
            assert spec is not None
            assert spec.origin is not None
            digest.update(Path(spec.origin).read_bytes())
        return name, digest.hexdigest()
    if name in _BUILT_IN or name.startswith(mle_bench.PREFIX):
        return name, ""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".py":
        path = path.resolve()
        return str(path), _file_digest(code := path.read_bytes(), _helpers(path, code))
    if path.suffix == ".py":
        problem = "the file does not exist."
    elif path.is_file():
        problem = "the file is not a .py file that defines COMPETITION or PROBLEM."
    else:
        close = difflib.get_close_matches(name, _BUILT_IN, n=1)
        problem = f"no built-in competition or problem has that id{f'; did you mean {close[0]!r}?' if close else '.'}"
    raise ConfigError(
        f"config.task.competition = {name!r}: {problem} Allowed: {', '.join(sorted(_BUILT_IN))}, the path of a .py file that defines"
        " COMPETITION (docs/own_competition.md shows one) or PROBLEM (docs/own_problem.md), or 'mlebench:ID' for a competition of the"
        " installed package mlebench."
    )


@functools.lru_cache(maxsize=64)
def load_definition(source: str, digest: str) -> Definition:
    """Loads what `locate_definition` found; a process gets the same object for the same arguments.

    Raises:
      ConfigError: the file fails, or defines neither COMPETITION as a Competition nor PROBLEM as a Problem.
      DataError: the file is gone, or changed since it was located.
    """
    if source in _BUILT_IN:
        module, name = _BUILT_IN[source]
        return getattr(importlib.import_module(module), name)
    if source.startswith(mle_bench.PREFIX):
        return mle_bench.mlebench_competition(source.removeprefix(mle_bench.PREFIX))
    path = Path(source)
    try:
        code = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"The task's file {path} cannot be read ({error}). Restore it at the place where it was when the run started."
        ) from error
    helpers = _helpers(path, code)
    if _file_digest(code, helpers) != digest:
        beside = f", or a module beside it ({', '.join(sorted(helpers))})," if helpers else ""
        raise DataError(f"The task's file {path}{beside} changed during the run. Restore the old file, or start a run in a new folder.")
    make_importable(helpers, path)
    module = _execute(path, code, "discover_jax_task_" + digest[:16] + digest[64:81].replace("+", "_"))
    found = {name: getattr(module, name) for name in ("COMPETITION", "PROBLEM") if hasattr(module, name)}
    if len(found) == 1:
        (definition,) = found.values()
        if isinstance(definition, Definition):
            return definition
    listed = ", ".join(f"{name} = {value!r}" for name, value in found.items()) or "neither"
    raise ConfigError(
        f"{path} must define either COMPETITION, a discover_jax.tasks.competition.Competition, or PROBLEM, a"
        f" discover_jax.tasks.problem.Problem; found {listed}. docs/own_competition.md and docs/own_problem.md show one of each."
    )


def _helpers(path: Path, code: bytes) -> dict[str, Helper]:
    try:
        return find_helpers(path, code)
    except OSError as error:
        raise DataError(f"A module beside the task's file {path} cannot be read: {error}.") from error


def _file_digest(code: bytes, helpers: dict[str, Helper]) -> str:
    beside = helpers_digest(helpers)
    return hashlib.sha256(code).hexdigest() + (f"+{beside}" if beside else "")


def load_competition(source: str, digest: str) -> Competition:
    """`load_definition` of a competition."""
    definition = load_definition(source, digest)
    assert isinstance(definition, Competition), f"{source} is a competition"
    return definition


def load_problem(source: str, digest: str) -> Problem:
    """`load_definition` of a problem."""
    definition = load_definition(source, digest)
    assert isinstance(definition, Problem), f"{source} is a problem"
    return definition


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
        raise ConfigError(f"The task's file {path} failed while loading:\n{trace}") from error
    return module
