"""The command line that main and search share: `--config=FILE[:ARG]`, overrides `--config.x.y=v`, and `--workdir=DIR`.

Errors that the user can mend end the program with one message on standard error and exit code 2, without a traceback.
"""

import difflib
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from discover_jax import config as settings
from discover_jax.exceptions import ConfigError, DiscoverError
from discover_jax.machines import NAMES, take_gpu_memory

DOES_NOT_FIT = 1
"""Exit code of a dry run whose verdict is that memory does not suffice."""
USER_ERROR = 2
"""Exit code of an error that the message tells how to mend."""


def _check_arguments(argv: list[str]) -> None:
    """Refuses a missing config file and misspelt overrides before the parser meets them: it would answer with a traceback."""
    given = [a for a in argv if a.split("=")[0] in ("--config", "-config")]
    if not given or "=" not in given[-1]:
        raise ConfigError("No config was given. Use --config=configs/quickstart.py, or another file of configs/.")
    path, *argument = given[-1].split("=", 1)[1].split(":", 1)
    if not Path(path).is_file():
        here = sorted(str(p) for p in Path("configs").glob("*.py"))
        raise ConfigError(f"The config file {path!r} does not exist (looked in {os.getcwd()}). Known here: {', '.join(here) or 'none'}.")
    # The parser would bury an error raised in the file under its own; called once before, the file speaks for itself.
    runpy.run_path(path)["get_config"](*argument)
    known = settings.settings()
    for override in argv:
        if override.startswith("--config."):
            name = override.removeprefix("--config.").split("=")[0]
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"Did you mean --config.{close[0]}?" if close else f"Known settings: {', '.join(known)}."
                raise ConfigError(f"--config.{name} is not a setting. {hint}")


def launch(run: Callable[[Any, Path], None], dry_run: Callable[[Any, str], bool] | None = None) -> None:
    """Parses the command line, validates the config and calls `run(config, workdir)`.

    Args:
      run: what the command does.
      dry_run: for commands that know `--dry_run`: called in its place with the config and the name given by `--machine`; says whether
        everything fits, else the exit code is 1.

    Raises:
      SystemExit: with code 2 after an error that the user can mend, 130 after Ctrl-C.
    """
    config_flag = config_flags.DEFINE_config_file("config", help_string="FILE[:ARG] of configs/; override with --config.NAME=VALUE")
    workdir_flag = flags.DEFINE_string(
        "workdir", None, "the run's folder; an existing one with the same config resumes (runs/<config.name>)"
    )
    dry_flag = machine_flag = None
    if dry_run is not None:
        dry_flag = flags.DEFINE_bool(
            "dry_run", False, "load nothing; print the config and the memory that a device will need, and whether it fits"
        )
        machine_flag = flags.DEFINE_string("machine", "", f"of the dry run: {NAMES}; empty: the one that this runs on")

    def parse(argv: list[str]) -> list[str]:
        if any(a.startswith(("--help", "-help", "-h")) for a in argv):
            return app.parse_flags_with_usage(argv)
        _check_arguments(argv)
        rest = flags.FLAGS(argv)
        if not flags.FLAGS["verbosity"].present:  # libraries talk a lot at absl's default, INFO
            logging.set_verbosity(logging.WARNING)
        return rest

    def main(argv: list[str]) -> None:
        take_gpu_memory()
        if len(argv) > 1:
            raise ConfigError(f"Unexpected arguments: {' '.join(argv[1:])}. Settings are given as --config.NAME=VALUE.")
        machine = machine_flag.value if machine_flag is not None else ""
        if dry_run is not None and dry_flag is not None and dry_flag.value:
            if not dry_run(settings.validate(config_flag.value, for_run=False), machine):
                sys.exit(DOES_NOT_FIT)
            return
        if machine:
            raise ConfigError(f"--machine={machine!r} only goes with --dry_run: a run takes the devices that are here.")
        config = settings.validate(config_flag.value)
        run(config, Path(workdir_flag.value or f"runs/{config.name}"))

    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command resumes from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except (DiscoverError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
