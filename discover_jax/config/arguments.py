"""Checks the arguments of a command before absl parses them: absl answers many mistakes with a traceback, or with the name of a parser."""

import inspect
import os
import re
import runpy
import traceback
from pathlib import Path
from typing import Any

import ml_collections

from discover_jax.config import nearest, settings
from discover_jax.exceptions import ConfigError, DiscoverError

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(=.*)?", re.DOTALL)
_TRUTH = ("true", "false", "t", "f", "1", "0")  # what absl accepts
_SHOWN = 300


def check_arguments(argv: list[str]) -> None:
    """Refuses a missing or failing config file, and overrides with a wrong name or type.

    Args:
      argv: the command and its arguments.

    Raises:
      ConfigError: what is wrong, and what is allowed.
      DiscoverError: raised by the config file itself.
    """
    place, value = _config_argument(argv)
    path, *argument = value.split(":", 1)
    _check_file(path, argument)
    for index, text in enumerate(argv[1:], 1):
        if (override := _OVERRIDE.fullmatch(text)) is None:
            continue
        if index < place:
            raise ConfigError(f"{text} comes before --config={value}, which would overwrite it. Give --config first.")
        negated, name, rest = override.groups()
        _check_override(name, None if rest is None else rest[1:], _following(argv, index), negated=bool(negated))


def _config_argument(argv: list[str]) -> tuple[int, str]:
    """Where `--config=VALUE` or `--config VALUE` is in `argv`, and its value. The last one counts."""
    places = [index for index, text in enumerate(argv) if re.fullmatch(r"--?config(=.*)?", text, re.DOTALL)]
    found = places[-1] if places else 0
    value = argv[found].partition("=")[2] if "=" in argv[found] else _following(argv, found)
    if not places or not value:
        raise ConfigError("No config was given. Use --config=configs/quickstart.py, or another file in configs/.")
    return found, value


def _following(argv: list[str], index: int) -> str | None:
    """The next argument, unless it is a flag."""
    following = argv[index + 1] if index + 1 < len(argv) else None
    return None if following is None or re.match(r"--?[a-zA-Z]", following) else following


def _check_file(path: str, argument: list[str]) -> None:
    """Calls `get_config` of a config file.

    absl calls it again, but hides an error of the file behind one of its own.
    """
    if not Path(path).is_file():
        here = sorted(str(p) for p in Path("configs").glob("*.py"))
        raise ConfigError(
            f"The config file {path!r} does not exist (current directory: {os.getcwd()}). Files in configs/: {', '.join(here) or 'none'}."
        )
    try:
        get_config = runpy.run_path(path).get("get_config")
    except Exception as error:
        raise _of_file(path, error) from error
    if not callable(get_config):
        raise ConfigError(f"The config file {path} does not define get_config(), which returns the config. See configs/quickstart.py.")
    try:
        inspect.signature(get_config).bind(*argument)
    except TypeError as error:
        given = f"got :{argument[0]}" if argument else "none was given"
        raise ConfigError(
            f"The argument after the config file does not fit get_config{inspect.signature(get_config)} of {path}: {given}. Give"
            f" {f'--config={path}, without an argument' if argument else f'--config={path}:ARGUMENT'}."
        ) from error
    try:
        config = get_config(*argument)
    except Exception as error:
        raise _of_file(path, error) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"get_config() of {path} must return the config that discover_jax.config.default_config() made, with its changes; it returned"
            f" {type(config).__name__}. See configs/quickstart.py."
        )


def _of_file(path: str, error: Exception) -> DiscoverError:
    """The error that a config file raised, with its place in the file. Errors of this project stay as they are."""
    if isinstance(error, DiscoverError):
        return error
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else lines[-1] if lines else None
    where = f"The config file {path} failed" + (f" in line {line}" if line else "")
    if isinstance(error, AttributeError) and (unknown := re.search(r'Key "(\w+)" does not exist and cannot be added', str(error))):
        close = nearest(unknown[1])
        return ConfigError(
            f"{where}: {unknown[1]} is not a setting."
            + (f" Did you mean config.{close}?" if close else " docs/settings.md lists all settings.")
        )
    said = " ".join(str(error).split())
    return ConfigError(f"{where}: {type(error).__name__}: {said[:_SHOWN]}{'...' if len(said) > _SHOWN else ''}")


def _check_override(name: str, value: str | None, following: str | None, *, negated: bool) -> None:
    """Refuses an override of an unknown setting, or a value that is not of the setting's type.

    Args:
      value: after `=`; None without one, and then the value is `following`, except for a truth value.
    """
    known = settings()
    if name not in known:
        close = nearest(name)
        hint = f"Did you mean --config.{close}?" if close else "docs/settings.md lists all settings, and so does --helpfull."
        raise ConfigError(f"--config.{name} is not a setting. {hint}")
    kind = type(known[name].default)
    if negated and kind is not bool:
        raise ConfigError(f"--noconfig.{name}: only settings that are true or false can be negated. Give --config.{name}=VALUE.")
    if negated and value is not None:
        raise ConfigError(f"--noconfig.{name} takes no value; got {value!r}. Give --noconfig.{name}, or --config.{name}=VALUE.")
    if kind is bool and value is not None and value.lower() not in _TRUTH:
        raise ConfigError(f"config.{name} must be True or False; got {value!r} ({known[name].meaning}).")
    value = following if value is None else value
    if kind is not bool and value is None:  # absl would take the next flag for the value
        raise ConfigError(f"--config.{name} has no value. Give --config.{name}=VALUE ({known[name].meaning}).")
    if kind in (int, float) and not _is_number(str(value), kind):
        what = "a whole number, such as 4" if kind is int else "a number, such as 0.5"
        raise ConfigError(f"config.{name} must be {what}; got {value!r} ({known[name].meaning}).")


def _is_number(text: str, kind: Any) -> bool:
    try:
        kind(text)
    except ValueError:
        return kind is int and re.fullmatch(r"0[xo][0-9a-fA-F]+", text) is not None  # absl reads these, too
    return True
