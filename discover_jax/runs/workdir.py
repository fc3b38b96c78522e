"""The run directory: created, resumed or refused."""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from discover_jax.exceptions import HostError, RunError
from discover_jax.files import write_atomic
from discover_jax.hosts.processes import Processes

_CONFIG, _LOCK, _TOKEN = "config.json", ".lock", ".hosts"
_ABSENT = object()
_RUNTIME_SETTINGS = (
    *("mesh.data", "mesh.expert", "mesh.tensor", "train.rows"),
    *("execution.backend", "execution.ray_address"),
    *("tracking.wandb", "tracking.project", "tracking.entity"),
)
"""Settings that say on which machines a run is computed, in which parts, and who is told, not what: they may change when it is resumed.
A backend that isolates less needs `execution.allow_weaker`, which is not among them."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where everything of a run lies. The folders exist.

    Attributes:
      path: the folder itself.
      journal_path: journal.jsonl, see `archive.journal`.
      metrics_path: metrics.jsonl, see `metrics`.
      rollouts_dir: one file a step, see `rollouts`.
      tensorboard_dir: made by `tracking`.
      checkpoints_dir: see `checkpoints`.
      best_dir: made by `best` as soon as there is a best program.
      task_dir: the prepared task.
      cache_dir: verdicts of programs.
      resumed: whether the folder already held this run.
    """

    path: Path
    journal_path: Path
    metrics_path: Path
    rollouts_dir: Path
    tensorboard_dir: Path
    checkpoints_dir: Path
    best_dir: Path
    task_dir: Path
    cache_dir: Path
    resumed: bool


@contextlib.contextmanager
def open_workdir(path: Path, config: dict[str, Any], kind: str) -> Iterator[Workdir]:
    """Opens the folder of a run, for one process at a time; leaving the context lets the next one in.

    Args:
      path: made if it does not exist.
      config: every setting by its dotted name, as `config.flatten` gives it; values that JSON can hold.
      kind: "train" or "search".

    Raises:
      RunError: the folder belongs to another run (each difference is listed), is no run's, is in use, or cannot be written.
    """
    path = Path(path).absolute()
    given = json.loads(json.dumps({"kind": kind, "config": config}))  # as it would come back: tuples as lists
    with contextlib.ExitStack() as stack:
        try:
            if path.is_dir() and not (path / _CONFIG).exists():
                _refuse_strangers(path)
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(path))
            workdir = _prepare(path, given)
        except OSError as error:
            raise RunError(
                f"The run folder {path} cannot be used ({error}). Free some space, or name another folder by --workdir."
            ) from error
        yield workdir


@contextlib.contextmanager
def open_shared_workdir(path: Path, config: dict[str, Any], kind: str, processes: Processes) -> Iterator[Workdir]:
    """`open_workdir` for several processes, which all must call it: the first opens the folder, the others see the same one.

    Raises:
      HostError: they do not.
      RunError: see there.
    """
    path = Path(path).absolute()
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(open_workdir(path, config, kind)) if processes.leads else None
        if processes.count > 1:
            _check_shared(path, processes)
        resumed = processes.from_first(lambda: mine is not None and mine.resumed)
        yield mine if mine is not None else _places(path, resumed)


def _check_shared(path: Path, processes: Processes) -> None:
    """A token that the first process writes must be what all read."""
    token = processes.from_first(lambda: secrets.token_hex(16))
    if processes.leads:
        write_atomic(path / _TOKEN, token.encode())
    processes.wait()
    try:
        found = (path / _TOKEN).read_text()
    except OSError as error:
        found = str(error)
    seen = processes.gather([socket.gethostname(), found == token])
    if blind := [f"process {index} on {host}" for index, (host, sees) in enumerate(seen) if not sees]:
        raise HostError(
            f"The run folder {path} is another one, or none, for {', '.join(blind)}. All hosts write their parts of a checkpoint there: put"
            " it on a file system that they share (NFS, Lustre, a mounted volume), and name it by its whole path in --workdir."
        )


def _prepare(path: Path, given: dict[str, Any]) -> Workdir:
    """Compares or writes the config and makes the folders, with the lock held."""
    resumed = (path / _CONFIG).exists()
    if resumed:
        _compare(path, given)
    else:
        write_atomic(path / _CONFIG, (json.dumps(given, indent=2) + "\n").encode())
    workdir = _places(path, resumed)
    for folder in (workdir.rollouts_dir, workdir.checkpoints_dir, workdir.task_dir, workdir.cache_dir):
        folder.mkdir(exist_ok=True)
    return workdir


def _places(path: Path, resumed: bool) -> Workdir:
    return Workdir(
        path=path,
        journal_path=path / "journal.jsonl",
        metrics_path=path / "metrics.jsonl",
        rollouts_dir=path / "rollouts",
        tensorboard_dir=path / "tensorboard",
        checkpoints_dir=path / "checkpoints",
        best_dir=path / "best",
        task_dir=path / "task",
        cache_dir=path / "cache",
        resumed=resumed,
    )


def _refuse_strangers(path: Path) -> None:
    """Refuses a folder that holds something and is no run's. What a kill during the folder's first second leaves is fine."""
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in (_LOCK, f".{_CONFIG}.tmp"))
    if strangers:
        listed = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
        raise RunError(
            f"The folder {path} is not empty and holds no run (there is no {_CONFIG}): {listed}. Name an empty or new folder by --workdir."
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the folder; the kernel lets go of it when the process ends, however it ends."""
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise RunError(
                f"The run folder {path} is in use by another process{f' (id {holder})' if holder else ''}. Wait for it to end, or name"
                " another folder by --workdir."
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _compare(path: Path, given: dict[str, Any]) -> None:
    """Refuses a folder that was made by another command."""
    try:
        found = json.loads((path / _CONFIG).read_bytes())
        found_all = {"kind": found["kind"], **found["config"]}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path / _CONFIG} cannot be read as a run's config ({error!r}), so the run cannot be resumed. Put the original back, or name"
            " another folder by --workdir."
        ) from error
    given_all = {"kind": given["kind"], **given["config"]}
    # By what JSON makes of them, so that True is not 1 and 1 is not 1.0: the type of a setting matters.
    names = [
        name for name in {**found_all, **given_all} if name not in _RUNTIME_SETTINGS and _shown(found_all, name) != _shown(given_all, name)
    ]
    if names:
        differences = "\n".join(f"  - {name}: folder has {_shown(found_all, name)}, given {_shown(given_all, name)}" for name in names)
        raise RunError(
            f"The folder {path} holds a run with another config:\n{differences}\nGive the folder's values to resume that run, or name"
            " another folder by --workdir to start a new one."
        )


def _shown(values: dict[str, Any], name: str) -> str:
    value = values.get(name, _ABSENT)
    return "no such setting" if value is _ABSENT else json.dumps(value)
