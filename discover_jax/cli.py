"""The command line that main and search share: `--config=FILE[:ARG]`, overrides `--config.x.y=v`, and `--workdir=DIR`.

Errors that the user can fix end the command with one message on standard error and exit code 2, without a traceback.
"""

import contextlib
import dataclasses
import functools
import logging as stdlib_logging
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from discover_jax import config as settings
from discover_jax.config.arguments import check_arguments
from discover_jax.config.page import settings_help
from discover_jax.exceptions import ConfigError, DiscoverError, HostError, TemporaryError
from discover_jax.hosts.exit_codes import FAILED, INTERRUPTED, LOST, USER_ERROR
from discover_jax.hosts.processes import JOIN_SECONDS, Processes, start
from discover_jax.hosts.watch import Watch
from discover_jax.machines import NAMES, take_gpu_memory
from discover_jax.runs import background
from discover_jax.untrusted_text import printable

DOES_NOT_FIT = 1
"""Exit code of a dry run that finds too little memory."""


_TELLING_SECONDS = JOIN_SECONDS - 10
"""Time limit for telling other processes about an error, before jax aborts this process for not joining."""
_OUT_OF_MEMORY = (
    "Memory ran out, see the message above. The same command would fail again. --dry_run predicts the memory of each device and names the"
    " settings that lower it: config.mesh, config.train.rows, config.sampling.slots, config.sampling.max_new_tokens, config.model.remat."
)
_DEVICE_FAULT = (
    "The GPU reported a fault, see the message above. The cause is the hardware, the driver, or a bug in a kernel. The same command resumes"
    " the run from the last checkpoint. If it happens again, look for Xid in the kernel's log (dmesg), and report it with the versions that"
    " the doctor shows."
)
_ADVICE = (
    "The run ends on all hosts. At most the steps since the last checkpoint are lost. Start the same command again on all hosts, or on"
    " another number of hosts with config.mesh set for their devices: the run resumes at the checkpoint."
)


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Checks of all hosts of a run. The last arguments are the values of `--coordinator`, `--num_processes` and `--process_id`.

    Attributes:
      run: called with the config and the run directory; returns the exit code.
      tell_failure: called with the reason if this host has no valid config; tells the others.
    """

    run: Callable[[Any, Path, str, int, int], int]
    tell_failure: Callable[[str, str, int, int], None]


def launch(
    run: Callable[..., None],
    dry_run: Callable[[Any, str, str], bool] | None = None,
    preflight: Preflight | None = None,
) -> None:
    """Parses the command line, validates the config and calls `run(config, workdir)`.

    Args:
      run: what the command does. One of several processes passes its `Processes` as a third argument.
      dry_run: only for commands that start runs; adds `--dry_run` and the flags of several processes. Called instead of `run`, with the
        config and the values of `--machine` and `--lengths`; returns whether everything fits. If not, the exit code is 1.
      preflight: only for a command that checks hosts; adds the flags of several processes. Called instead of `run` if they are given.

    Raises:
      SystemExit: with a code of `hosts.exit_codes`.
    """
    config_flags.DEFINE_config_file(
        "config", help_string="config file, and the argument of its get_config: FILE[:ARG], such as configs/spaceship.py:run1"
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "run directory; main and search resume a run that it contains, if the config is the same (default: runs/NAME, with NAME from"
        " config.name)",
    )
    if dry_run is not None:
        _define_run_flags()
    if preflight is not None:
        _define_process_flags()
    try:
        app.run(lambda argv: _main(argv, run, dry_run, preflight), flags_parser=_parse)
    except (KeyboardInterrupt, Exception) as error:
        code = _report(error)
        if isinstance(error, _TerminatedError):
            _die_of(signal.SIGTERM)
        if dry_run is not None:
            reason = _reason(error)
            _tell_others(error, code, lambda *place: Watch(start(*place), _ADVICE).failed(reason, code))
        if preflight is not None:
            _tell_others(error, code, functools.partial(preflight.tell_failure, _reason(error)))
        if background.is_running():  # a checkpoint is left unfinished. An orderly end would wait for orbax's threads
            _leave(code)
        sys.exit(code)


def _define_process_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags that name the processes of a run."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "start this process as one of several; jax detects the others (SLURM, Open MPI, Cloud TPU, GKE)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator", "", "start this process as one of several; HOST:PORT of process 0, with a free port", flag_values=values
    )
    flags.DEFINE_integer("num_processes", 0, "with --coordinator: number of processes, one per host", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "with --coordinator: index of this process, from 0", flag_values=values)


def _define_run_flags() -> None:
    """The flags of commands that start runs."""
    _define_process_flags()
    flags.DEFINE_bool(
        "dry_run",
        False,
        "print the config, the predicted speed on each mesh, the memory that each device needs, and whether it fits; load no weights or"
        " data",
    )
    flags.DEFINE_string("machine", "", f"with --dry_run: the machine to predict for: {NAMES}; empty: this machine")
    flags.DEFINE_string(
        "lengths",
        "",
        "with --dry_run: mean tokens of prompts and rollouts for the predicted speed, as PROMPT,ROLLOUT; empty: the maximum that the"
        " config allows",
    )


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags, or prints the help and exits. Returns the other arguments."""
    asked = {a.lstrip("-") for a in argv[1:] if a.startswith("-")} & {"help", "h", "?", "helpshort", "helpfull"}
    if asked:
        print(_help(full="helpfull" in asked))
        sys.exit()
    check_arguments(argv)
    rest = flags.FLAGS(argv)
    if not flags.FLAGS["verbosity"].present:  # libraries log a lot at absl's default, INFO
        logging.set_verbosity(logging.WARNING)
    return rest


def _main(
    argv: list[str],
    run: Callable[..., None],
    dry_run: Callable[[Any, str, str], bool] | None,
    preflight: Preflight | None,
) -> None:
    """Runs the command after its flags were parsed; see `launch`."""
    _clean_logs()
    take_gpu_memory()
    given = flags.FLAGS
    if len(argv) > 1:
        raise ConfigError(f"Unexpected arguments: {' '.join(argv[1:])}. Give settings as --config.NAME=VALUE.")
    if dry_run is not None and given.dry_run:
        if not dry_run(settings.validate(given.config, for_run=False), given.machine, given.lengths):
            sys.exit(DOES_NOT_FIT)
        return
    if dry_run is not None and given.machine:
        raise ConfigError(
            f"--machine={given.machine!r} requires --dry_run: a run uses the devices of this machine. Remove one or add the other."
        )
    if dry_run is not None and given.lengths:
        raise ConfigError(
            f"--lengths={given.lengths!r} requires --dry_run: a run measures the lengths of its rollouts. Remove one or add the other."
        )
    config = settings.validate(given.config)
    folder = Path(given.workdir or f"runs/{config.name}")
    if preflight is not None and _names_processes():
        try:
            code = preflight.run(config, folder, given.coordinator, given.num_processes, given.process_id)
        except DiscoverError as error:  # the other processes know it
            code = _report(error)
        sys.exit(code)
    processes = _join() if dry_run is not None else None
    if processes is None:
        with _sigterm_as_interrupt():
            run(config, folder)
    else:  # jax takes SIGTERM: the run continues until it is killed: the scheduler may only be announcing the end
        _run_as_one_of_several(run, config, folder, processes)


def _help(*, full: bool) -> str:
    """What `--help` prints: the command, its flags and the main settings; `full` adds the advanced settings and the flags of libraries."""
    main = sys.modules["__main__"]
    modules = flags.FLAGS.flags_by_module_dict()
    parts = [(main.__doc__ or "").strip(), "\nFlags:", *(_flag_help(flag) for flag in modules.pop(__name__))]
    if full:
        parts += ["\nSettings and their defaults:", settings_help(tiers=2), "\nFlags of libraries:"]
        return "\n".join([*parts, *(flags.FLAGS.module_help(module) for module in modules)])
    parts += ["\nMain settings and their defaults:", settings_help(tiers=1)]
    return "\n".join([*parts, "\nAll settings: docs/settings.md, or --helpfull."])


def _flag_help(flag: flags.Flag) -> str:
    value = "" if isinstance(flag.default, bool) else f"={flag.name.upper()}"
    text = textwrap.fill(flag.help or "", 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  --{flag.name}{value}\n{text}"


class _TerminatedError(KeyboardInterrupt):
    """This process got SIGTERM, as before the end of a job. It ends as after Ctrl-C: the checkpoint that is being written is finished."""


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raises _TerminatedError at SIGTERM until the context ends."""

    def interrupt(*_: Any) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _die_of(number: signal.Signals) -> None:
    """Ends this process by the signal that it got, so that its parent sees the same as without a handler."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _code(error: BaseException) -> int:
    """The exit code of a command that this error ends."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, TemporaryError) or _is_device_fault(error):
        return LOST
    return USER_ERROR if isinstance(error, DiscoverError | flags.Error) or _is_out_of_memory(error) else FAILED


def _is_out_of_memory(error: BaseException) -> bool:
    of_device = isinstance(error, jax.errors.JaxRuntimeError) and re.search("RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY", str(error))
    return isinstance(error, MemoryError) or bool(of_device)


def _is_device_fault(error: BaseException) -> bool:
    """Whether a GPU failed while it ran a kernel. After such an error, its process cannot use the GPU any more, but a new one can."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "CUDA_ERROR_" in str(error) and not _is_out_of_memory(error)


def _report(error: BaseException) -> int:
    """Prints on standard error what ended the command; returns its exit code."""
    if isinstance(error, KeyboardInterrupt):
        what = "Terminated" if isinstance(error, _TerminatedError) else "Interrupted"
        print(f"\n{what}. The same command resumes from the last checkpoint.", file=sys.stderr)
    elif isinstance(error, DiscoverError | flags.Error):
        print(printable(f"error: {error}"), file=sys.stderr)
    else:
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
        if _is_out_of_memory(error):
            print(f"error: {_OUT_OF_MEMORY}", file=sys.stderr)
        elif _is_device_fault(error):
            print(f"error: {_DEVICE_FAULT}", file=sys.stderr)
    return _code(error)


def _clean_logs() -> None:
    """Lets all handlers of the log write only printable text: messages quote names from weights folders, tables and programs."""

    def clean(record: stdlib_logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True

    for handler in stdlib_logging.getLogger().handlers:
        handler.addFilter(clean)


def _join() -> Processes | None:
    """This process among those that the command line names; None if it names no others."""
    given = flags.FLAGS
    return start(given.coordinator, given.num_processes, given.process_id) if _names_processes() else None


def _names_processes() -> bool:
    """Whether the command line starts this process as one of several."""
    given = flags.FLAGS
    if given.distributed or given.coordinator:
        return True
    if given["num_processes"].present or given["process_id"].present:
        raise ConfigError("--num_processes and --process_id require --coordinator=HOST:PORT, the address of process 0.")
    return False


def _tell_others(error: BaseException, code: int, tell: Callable[[str, int, int], None]) -> None:
    """Joins the other processes, by `tell`, only to tell them about an error from before this one joined.

    Such an error is a config file that this host lacks. Otherwise they would wait for this process until jax aborts them, and a scheduler
    would start the run again.
    """
    given = flags.FlagValues()
    _define_process_flags(given)
    try:
        given(sys.argv, known_only=True)
    except flags.Error:  # the error is in one of these flags
        return
    if isinstance(error, HostError | KeyboardInterrupt) or not (given.distributed or given.coordinator):
        return
    print(f"note: telling the other processes of this run, for at most {_TELLING_SECONDS} s. Ctrl-C ends the wait.", file=sys.stderr)
    timer = threading.Timer(_TELLING_SECONDS, lambda: os._exit(code))
    timer.daemon = True
    timer.start()
    try:
        tell(given.coordinator, given.num_processes, given.process_id)
    except DiscoverError as second:
        print(f"note: could not tell the other processes: {second}", file=sys.stderr)
    _leave(code)


def _reason(error: BaseException) -> str:
    """What the other processes print about an error of this one."""
    return printable(f"{type(error).__name__}: {error}")[:2000]


def _leave(code: int) -> None:
    """Ends this process without an orderly end, which would wait for other processes or for threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_as_one_of_several(run: Callable[..., None], config: Any, folder: Path, processes: Processes) -> None:
    """Runs as one of several processes, which end together."""
    watch = None
    try:
        watch = Watch(processes, _ADVICE)
        run(config, folder, processes)
        processes.wait()
        watch.finished()
    except BaseException as error:
        if watch is not None:
            watch.failed(_reason(error), _code(error))  # does not return if another process made this one fail
        _leave(_report(error))
