"""The command line that main and search share: `--config=FILE[:ARG]`, overrides `--config.x.y=v`, and `--workdir=DIR`.

Errors that the user can mend end the program with one message on standard error and exit code 2, without a traceback.
"""

import difflib
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from discover_jax import config as settings
from discover_jax.exceptions import ConfigError, DiscoverError
from discover_jax.hosts.processes import Processes, start
from discover_jax.hosts.watch import Watch
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


_ADVICE = (
    "The run ends on all its hosts; at most the steps since the last checkpoint are lost. Start the same command again on all hosts, or on"
    " another number of them with a config.mesh for their devices: it resumes there."
)


def launch(run: Callable[..., None], dry_run: Callable[[Any, str, str], bool] | None = None) -> None:
    """Parses the command line, validates the config and calls `run(config, workdir)`.

    Args:
      run: what the command does. Where this is one of several processes, it is also told which.
      dry_run: for commands that make runs, which know `--dry_run` and several processes: called in its place with the config and what
        `--machine` and `--lengths` say; says whether everything fits, else the exit code is 1.

    Raises:
      SystemExit: with code 2 after an error that the user can mend, 130 after Ctrl-C; `hosts.watch.LOST` where another process was lost.
    """
    config_flag = config_flags.DEFINE_config_file("config", help_string="FILE[:ARG] of configs/; override with --config.NAME=VALUE")
    workdir_flag = flags.DEFINE_string(
        "workdir", None, "the run's folder; an existing one with the same config resumes (runs/<config.name>)"
    )
    dry_flag = machine_flag = lengths_flag = None
    if dry_run is not None:
        flags.DEFINE_bool("distributed", False, "one of several processes, which jax finds by itself (SLURM, Open MPI, Cloud TPU, GKE)")
        flags.DEFINE_string("coordinator", "", "one of several processes: HOST:PORT of process 0, where the port must be free")
        flags.DEFINE_integer("num_processes", 0, "with --coordinator: how many processes there are, one a host")
        flags.DEFINE_integer("process_id", -1, "with --coordinator: which of them this is, from 0")
        dry_flag = flags.DEFINE_bool(
            "dry_run",
            False,
            "load nothing; print the config, the predicted speed on each mesh, the memory that a device will need, if it fits",
        )
        machine_flag = flags.DEFINE_string("machine", "", f"of the dry run: {NAMES}; empty: the one that this runs on")
        lengths_flag = flags.DEFINE_string(
            "lengths", "", "of the dry run: PROMPT,ROLLOUT, mean tokens for the predicted speed; empty: the largest that the config allows"
        )

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
        machine, lengths = (flag.value if flag is not None else "" for flag in (machine_flag, lengths_flag))
        if dry_run is not None and dry_flag is not None and dry_flag.value:
            if not dry_run(settings.validate(config_flag.value, for_run=False), machine, lengths):
                sys.exit(DOES_NOT_FIT)
            return
        if machine:
            raise ConfigError(f"--machine={machine!r} only goes with --dry_run: a run takes the devices that are here.")
        if lengths:
            raise ConfigError(f"--lengths={lengths!r} only goes with --dry_run: a run's rollouts are as long as they turn out.")
        config = settings.validate(config_flag.value)
        folder = Path(workdir_flag.value or f"runs/{config.name}")
        processes = _join() if dry_run is not None else None
        if processes is None:
            run(config, folder)
        else:
            _run_among_others(run, config, folder, processes)

    try:
        app.run(main, flags_parser=parse)
    except (KeyboardInterrupt, DiscoverError, flags.Error) as error:
        sys.exit(_tell(error))


def _tell(error: BaseException) -> int:
    """Says on standard error what ended the program; its exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("\nInterrupted. The same command resumes from the last checkpoint.", file=sys.stderr)
        return 130
    if isinstance(error, DiscoverError | flags.Error):
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    traceback.print_exception(error)
    return 1


def _join() -> Processes | None:
    """This process among those that the command line tells of; None if it tells of none."""
    given = flags.FLAGS
    if given.distributed or given.coordinator:
        return start(given.coordinator, given.num_processes, given.process_id)
    if given["num_processes"].present or given["process_id"].present:
        raise ConfigError("--num_processes and --process_id go with --coordinator=HOST:PORT, the address of process 0.")
    return None


def _run_among_others(run: Callable[..., None], config: Any, folder: Path, processes: Processes) -> None:
    """Runs as one of several processes: they end together."""
    watch = None
    try:
        watch = Watch(processes, _ADVICE)
        run(config, folder, processes)
        processes.wait()
        watch.finished()
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:2000]
        if watch is not None:
            watch.failed(reason)  # does not return if another process is what this one failed by
        code = _tell(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an orderly end would wait for the others, who wait for this one
