"""Verdicts on disk by (program, data, settings): what a collapsed group wrote eight times runs once, and a resumed run repeats none.

A verdict becomes a reward, so what is read back is not believed. The folder must be one that nobody else can write, a file must be this
user's own, and its content must fit its checksum, its key and the types of a verdict. Nothing is unpickled.
"""

import base64
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.records import from_row, parse_json
from discover_jax.types import Execution, Grade, Outcome, Verdict

_FORMAT = 2  # raise it when the harness's contract with programs, or the form of the files, changes
_LARGEST_FILE = 1 << 30
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def packages(path: Sequence[str] | None = None) -> list[str]:
    """Name and version of everything that a program can import, sorted: the same program may score otherwise with others.

    Args:
      path: folders to look into; None: this process's sys.path.
    """
    found = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions(path=sys.path if path is None else list(path))}
    return [platform.python_version(), platform.machine(), *sorted(found)]


@dataclasses.dataclass(frozen=True)
class _Ran:
    """An execution as a file holds it: the submission's bytes in base64."""

    outcome: Outcome
    csv: str | None
    stdout: str
    detail: str
    seconds: float


class VerdictCache:
    """A folder of verdicts, one JSON file each, written whole or not at all; several processes of one user may share it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Opens the folder, made if missing.

        Args:
          folder: where the files lie.
          settings: everything but the program that decides a verdict; JSON.

        Raises:
          RunError: the folder cannot be made, or others can write there.
        """
        self._folder = folder
        text = json.dumps({"format": _FORMAT, **settings}, sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if not any(folder.iterdir()) and os.stat(folder).st_uid == os.geteuid():
                folder.chmod(0o700)  # made by a process whose umask let others in, and still empty
            # Who a new file here belongs to: a file server may have it that root's files are somebody else's.
            with tempfile.TemporaryFile(dir=folder) as probe:
                self._owners = {os.geteuid(), os.fstat(probe.fileno()).st_uid}
            self._check_folder(folder)
        except OSError as error:
            raise RunError(
                f"The cache of executed programs cannot be kept in {folder}: {error}. Choose a folder that can be written."
            ) from error

    def key(self, program: str) -> str:
        """The name under which a program's verdict is kept."""
        return hashlib.sha256(f"{self._settings}\n{program}".encode("utf-8", "surrogatepass")).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Verdict | None:
        """The verdict, marked as cached, or None. Of a damaged file the log tells; it counts as missing: running again is always right.

        Raises:
          RunError: the file, or its folder, is not one that this user alone could have written; or it cannot be read.
        """
        path = self._path(key)
        try:
            data = self._read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"The verdict on a program cannot be read from {path} ({error}). {self._remedy()}") from error
        try:
            return _decode(key, data)
        except ValueError as error:
            logging.getLogger(__name__).warning("The verdict in %s is damaged (%s); the program runs again.", path, error)
            return None

    def put(self, key: str, verdict: Verdict) -> None:
        """Keeps a verdict.

        Raises:
          RunError: it cannot be written, as on a full disk.
        """
        path = self._path(key)
        temporary = None
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with open(descriptor, "wb") as file:
                file.write(_encode(key, verdict))
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):  # the error that counts is being reported
                    os.unlink(temporary)
            raise RunError(
                f"The verdict on a program cannot be kept in {path.parent}: {error}. Make room there, then resume the run."
            ) from error

    def _read(self, path: Path) -> bytes:
        """The bytes of a file that only this user can have put there; links are not followed."""
        self._check_folder(path.parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RunError(f"{path} is no ordinary file, so it was not written by this project. {self._remedy()}")
            self._check_owner(path, status)
            if status.st_size > _LARGEST_FILE:
                raise RunError(f"{path} has {status.st_size:,} bytes, more than any verdict. {self._remedy()}")
            return file.read()

    def _check_folder(self, folder: Path) -> None:
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode):
            raise RunError(f"{folder} is no folder (a link, or a file), so it was not made by this project. {self._remedy()}")
        self._check_owner(folder, status)

    def _check_owner(self, path: Path, status: os.stat_result) -> None:
        if status.st_uid not in self._owners:
            raise RunError(
                f"{path} belongs to another user (id {status.st_uid}), who could put verdicts there that become rewards. {self._remedy()}"
            )
        if status.st_mode & _OTHERS_WRITE:
            raise RunError(
                f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o}), who could put verdicts there that become"
                f" rewards. {self._remedy()} If you trust what is in it: chmod -R go-w {self._folder}"
            )

    def _remedy(self) -> str:
        return f"Delete the folder {self._folder}, which loses nothing but time: programs run again."


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON can hold it, but for whether it was cached."""
    execution = verdict.execution
    csv = None if execution.csv is None else base64.b64encode(execution.csv).decode()
    ran = _Ran(execution.outcome, csv, execution.stdout, execution.detail, execution.seconds)
    return {
        "outcome": verdict.outcome.value,
        "grade": dataclasses.asdict(verdict.grade),
        "execution": dataclasses.asdict(ran) | {"outcome": ran.outcome.value},
    }


def verdict_of(row: Any, *, cached: bool) -> Verdict:
    """The verdict of a `verdict_row`.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(row, dict) or row.keys() != {"outcome", "grade", "execution"}:
        raise ValueError("its verdict is no object of outcome, grade and execution")
    ran = from_row(_Ran, row["execution"])
    csv = None if ran.csv is None else base64.b64decode(ran.csv, validate=True)
    execution = Execution(ran.outcome, csv, ran.stdout, ran.detail, ran.seconds, cached=cached)
    return Verdict(Outcome(row["outcome"]), from_row(Grade, row["grade"]), execution)


def _encode(key: str, verdict: Verdict) -> bytes:
    row = verdict_row(verdict)
    return json.dumps({"sha256": _checksum(key, row), "verdict": row}).encode()


def _decode(key: str, data: bytes) -> Verdict:
    """The verdict of `_encode`.

    Raises:
      ValueError: it is not one, or another key's, or it contradicts itself.
    """
    file = parse_json(data)
    if not isinstance(file, dict) or file.keys() != {"sha256", "verdict"}:
        raise ValueError("it is no object of sha256 and verdict")
    row = file["verdict"]
    verdict = verdict_of(row, cached=True)
    if file["sha256"] != _checksum(key, row):  # only now, when it is known that the row holds nothing that cannot be written again
        raise ValueError("its checksum is another")
    execution = verdict.execution
    scored = verdict.grade.valid and verdict.grade.score is not None and execution.csv is not None and execution.outcome is Outcome.OK
    if (verdict.outcome is Outcome.OK) != scored:
        raise ValueError(f"its outcome {verdict.outcome.value!r} contradicts its grade or its execution")
    return verdict


def _checksum(key: str, row: Any) -> str:
    """Of a verdict and the key under which it is kept, so that a file under another name is no verdict on that other program."""
    return hashlib.sha256(f"{key}\n{json.dumps(row, sort_keys=True)}".encode()).hexdigest()
