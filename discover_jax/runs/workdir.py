"""The run directory: created, resumed or refused."""

import contextlib
import dataclasses
import json
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from discover_jax.exceptions import HostError, RunError
from discover_jax.files import storage_remedy, write_atomic
from discover_jax.hosts.processes import Processes
from discover_jax.records import parse_json
from discover_jax.runs import lock

_CONFIG, _TOKEN = "config.json", ".hosts"
_ABSENT = object()
_OF_A_START = ("task", "retests", "outputs", "best", "tensorboard", "journal.jsonl", "seed_programs.json", "report.html")
"""What a start writes before its first step. All of it depends on settings and data. The rest stays: the cache of verdicts, whose keys name
what they depend on, and disclosure.json, because programs of the cache may have run with weaker isolation."""
_RUNTIME_SETTINGS = (
    *("mesh.data", "mesh.expert", "mesh.tensor", "train.rows"),
    *("execution.backend", "execution.ray_address", "execution.workers"),
    *("tracking.wandb", "tracking.project", "tracking.entity"),
)
"""Settings of machines, parallelism and tracking. They do not affect what a run computes, so they may change when it is resumed. A backend
with weaker isolation needs `execution.allow_weaker`, which is not one of them."""
_LATER_SETTINGS = {
    "task.seed_program": "",
    "task.reuse_output": "problem",
    "task.selection_fraction": 0.0,
    "lora.mlp_rank": 32,
    "prompt.inspirations": 0,
    "prompt.answer": "program",
    "reuse.score": "raw",
    "finalists.count": 0,
    "finalists.retests": 4,
    "finalists.every": 0,
    "train.max_at_k": 4,
    "train.max_at_k_last": 0,
    "train.max_at_k_steps": 0,
    "train.frontier_base": "best",
    "train.frontier_start": 0,
    "train.frontier_steps": 0,
    "train.waves": 1,
    "train.failures": "reward",
    "train.failure_spread": 1.0,
    "diversity.copies": "keep",
    "diversity.copy_tolerance": 0.0,
    "execution.result_mib": 0,
    "sampling.draft_tokens": 0,
}
"""Settings that earlier versions lack, with the values that their runs had in effect."""
_SETTINGS_OF_NEW_RUNS = ("task.stratified",)
"""Settings that earlier versions lack, and whose default differs from what their runs did. The prepared task keeps their rows."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths in the run directory. The folders exist unless noted.

    Attributes:
      path: the run directory.
      journal_path: journal.jsonl, see `archive.journal`.
      metrics_path: metrics.jsonl, see `metrics`.
      rollouts_dir: one file per step, see `rollouts`.
      tensorboard_dir: created by `tracking`.
      checkpoints_dir: see `checkpoints`.
      best_dir: created by `best` when there is a best program.
      outputs_dir: created by `outputs` when there is a value that children read.
      task_dir: the prepared task.
      retests_dir: retests of the tasks, if config.finalists needs them; created by `tasks.retests`.
      cache_dir: verdicts of programs.
      resumed: whether the directory already held steps of this run.
    """

    path: Path
    journal_path: Path
    metrics_path: Path
    rollouts_dir: Path
    tensorboard_dir: Path
    checkpoints_dir: Path
    best_dir: Path
    outputs_dir: Path
    task_dir: Path
    retests_dir: Path
    cache_dir: Path
    resumed: bool


@contextlib.contextmanager
def open_workdir(path: Path, config: dict[str, Any], kind: str, tell: Callable[[str], None] = print) -> Iterator[Workdir]:
    """Opens a run directory and locks it against other processes until the context ends.

    As long as no step was recorded, each start begins anew with its own config and data: an earlier one ended because of an error that
    the user now corrects, or was interrupted.

    Args:
      path: created if it does not exist.
      config: every setting by its dotted name, as `config.flatten` returns it; JSON values.
      kind: "train" or "search".
      tell: called with a line of text if the config of a start without steps is replaced, and while another process holds the lock, which
        may belong to a dead host: see `lock.hold_lock`.

    Raises:
      RunError: the directory belongs to another run (each difference is listed), is not a run directory, is in use, or cannot be written.
    """
    path = Path(path).absolute()
    given = json.loads(json.dumps({"kind": kind, "config": config}))  # as it is read back: tuples become lists
    with contextlib.ExitStack() as stack:
        try:
            if path.is_dir() and not (path / _CONFIG).exists():
                _refuse_strangers(path)
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.hold_lock(path, tell))
            workdir = _prepare(path, given, tell)
        except OSError as error:
            raise RunError(
                f"Cannot use the run directory {path} ({error}). {storage_remedy(error)} Or give another directory by --workdir."
            ) from error
        yield workdir


@contextlib.contextmanager
def open_shared_workdir(
    path: Path, config: dict[str, Any], kind: str, processes: Processes, tell: Callable[[str], None] = print
) -> Iterator[Workdir]:
    """`open_workdir` for several processes. All must call it: the first opens the directory, and the others must see the same one.

    Raises:
      HostError: a process does not see the same directory.
      RunError: see `open_workdir`.
    """
    path = Path(path).absolute()
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(open_workdir(path, config, kind, tell)) if processes.leads else None
        if processes.count > 1:
            _check_shared(path, processes)
        resumed = processes.from_first(lambda: mine is not None and mine.resumed)
        yield mine if mine is not None else _places(path, resumed)


def _check_shared(path: Path, processes: Processes) -> None:
    """Checks that all processes read the token that the first process writes."""
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
            f"The run directory {path} is missing or a different one for {', '.join(blind)}. All hosts write their parts of a checkpoint"
            " there. Put it on a shared file system (NFS, Lustre, a mounted volume), and give its absolute path by --workdir."
        )


def _prepare(path: Path, given: dict[str, Any], tell: Callable[[str], None]) -> Workdir:
    """Compares or writes the config and creates the folders. The caller holds the lock."""
    found = _read_config(path) if (path / _CONFIG).exists() else None
    resumed = found is not None and _has_steps(path, found)
    if found is not None and resumed:
        _compare(path, found, given)
    else:
        if found is not None:
            _begin_anew(path, _differences(found, given), tell)
        write_atomic(path / _CONFIG, (json.dumps(given, indent=2) + "\n").encode())
    workdir = _places(path, resumed)
    for folder in (workdir.rollouts_dir, workdir.checkpoints_dir, workdir.task_dir, workdir.cache_dir):
        folder.mkdir(exist_ok=True)
    return workdir


def _has_steps(path: Path, found: dict[str, Any]) -> bool:
    """Whether anything of a step is there: a checkpoint, rollouts, metrics, attempts or a best program."""
    names = ["checkpoints", "checkpoints.damaged", "rollouts", "metrics.jsonl", "journal.discarded.jsonl"]
    source = found.get("train.resume_from")
    if not (source and _is_copied(path / "journal.jsonl", Path(source).expanduser() / "journal.jsonl")):
        names += ["journal.jsonl", "best"]
    return any(map(_is_filled, (path / name for name in names)))


def _is_filled(entry: Path) -> bool:
    """Whether a folder or file has content, or may have some: a link may lead to a disk that is not mounted."""
    if entry.is_dir():
        return any(entry.iterdir())
    return entry.is_symlink() or (entry.exists() and entry.stat().st_size > 0)


def _is_copied(journal: Path, source: Path) -> bool:
    """Whether a journal exists and has only attempts that the start of a continued run copies. With others, a step was recorded."""
    try:
        with journal.open("rb") as mine, source.open("rb") as theirs:
            while block := mine.read(1 << 20):
                if block != theirs.read(len(block)):
                    return False
    except FileNotFoundError:  # if the other run was moved, this cannot be known
        return False
    return True


def _begin_anew(path: Path, differences: str, tell: Callable[[str], None]) -> None:
    """Removes what a start without steps has written, so that nothing of other settings or data stays."""
    for name in (*_OF_A_START, *(("wandb_id",) if differences else ())):
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    if differences:
        tell(f"The earlier start in {path} recorded no step, so this run replaces its config:\n{differences}")


def _places(path: Path, resumed: bool) -> Workdir:
    return Workdir(
        path=path,
        journal_path=path / "journal.jsonl",
        metrics_path=path / "metrics.jsonl",
        rollouts_dir=path / "rollouts",
        tensorboard_dir=path / "tensorboard",
        checkpoints_dir=path / "checkpoints",
        best_dir=path / "best",
        outputs_dir=path / "outputs",
        task_dir=path / "task",
        retests_dir=path / "retests",
        cache_dir=path / "cache",
        resumed=resumed,
    )


def _refuse_strangers(path: Path) -> None:
    """Refuses a directory with files that is not a run directory. Ignores what a kill right after its creation leaves behind."""
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in (lock.NAME, f".{_CONFIG}.tmp"))
    if strangers:
        listed = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
        raise RunError(
            f"{path} is not empty and not a run directory (it has no {_CONFIG}): {listed}. Give an empty or new directory by --workdir."
        )


def _read_config(path: Path) -> dict[str, Any]:
    """`kind` and every setting of the run in this directory."""
    try:
        found = parse_json((path / _CONFIG).read_bytes())
        return {"kind": found["kind"], **found["config"]}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path / _CONFIG} is not a valid run config ({error!r}), so the run cannot be resumed. Restore the original file, or give"
            " another directory by --workdir."
        ) from error


def _compare(path: Path, found: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuses a directory whose run has another config."""
    if differences := _differences(found, given):
        raise RunError(
            f"The directory {path} holds a run with another config:\n{differences}\nUse the directory's values to resume that run. To"
            f" continue from its last step with other settings, such as more steps, give another --workdir and set config.train.resume_from"
            f" = {str(path)!r}. To start a new run, give another --workdir only."
        )


def _differences(found: dict[str, Any], given: dict[str, Any]) -> str:
    """A line for each setting that affects what a run computes and differs; empty if there is none."""
    given_all = {"kind": given["kind"], **given["config"]}
    later = _LATER_SETTINGS | {name: given_all[name] for name in _SETTINGS_OF_NEW_RUNS if name in given_all}
    found_all = found | {name: value for name, value in later.items() if name in given_all and name not in found}
    # Compare the JSON texts, so that True differs from 1 and 1 from 1.0: the type of a setting matters.
    names = [
        name for name in {**found_all, **given_all} if name not in _RUNTIME_SETTINGS and _shown(found_all, name) != _shown(given_all, name)
    ]
    return "\n".join(f"  - {name}: directory has {_shown(found_all, name)}, given {_shown(given_all, name)}" for name in names)


def _shown(values: dict[str, Any], name: str) -> str:
    value = values.get(name, _ABSENT)
    return "no such setting" if value is _ABSENT else json.dumps(value)
