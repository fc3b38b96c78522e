"""Verdicts on disk by (program, value that it reads, data, settings): equal programs run once, and a resumed run repeats none.

A verdict becomes a reward, so cached files are not trusted. Only this user may be able to write the folder, and each file must belong to
this user. Its content must match its checksum, its key and the types of a verdict. Nothing is unpickled.
"""

import base64
import contextlib
import dataclasses
import email
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import stat
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.files import storage_remedy
from discover_jax.records import from_row, parse_json
from discover_jax.types import Execution, Grade, Outcome, Verdict

_FORMAT = 3  # increase it when the harness's contract with programs or the file format changes
_LARGEST_FILE = 1 << 30
_LEVEL = 3  # of compression
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def packages(path: Sequence[str] | None = None) -> list[str]:
    """Names and versions of all packages that a program can import, sorted. With other versions, the same program may score differently.

    Args:
      path: folders to search; None: this process's sys.path.
    """
    found = map(_name_and_version, importlib.metadata.distributions(path=sys.path if path is None else list(path)))
    return [platform.python_version(), platform.machine(), *sorted(set(found))]


def _name_and_version(package: importlib.metadata.Distribution) -> str:
    """As `package.name` and `package.version` say, which parse the whole description each time."""
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    headers = email.message_from_string(text.partition("\n\n")[0])
    if "Name" in headers and "Version" in headers:
        return f"{headers['Name']}=={headers['Version']}"
    return f"{package.name}=={package.version}"


@dataclasses.dataclass(frozen=True)
class _StoredExecution:
    """An execution as stored in a file.

    Attributes:
      outcome, stdout, detail, seconds: see Execution.
      csv: the result in base64, in files of earlier versions.
      packed: the result, compressed by zlib, in base64; empty if there is none.
    """

    outcome: Outcome
    csv: str | None
    stdout: str
    detail: str
    seconds: float
    packed: str = dataclasses.field(default="", metadata={"later": True})


class VerdictCache:
    """A folder of verdicts, one JSON file each. Writes are atomic; several processes of one user may share the folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Opens the folder and creates it if needed.

        Args:
          folder: of the verdict files.
          settings: everything besides the program that a verdict depends on, as JSON values.

        Raises:
          RunError: the folder cannot be created, or other users can write to it.
        """
        self._folder = folder
        text = json.dumps({"format": _FORMAT, **settings}, sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if not any(folder.iterdir()) and os.stat(folder).st_uid == os.geteuid():
                folder.chmod(0o700)  # still empty, but created with a umask that lets others in
            # The owner of new files here: a file server may map root to another user.
            with tempfile.TemporaryFile(dir=folder) as probe:
                self._owners = {os.geteuid(), os.fstat(probe.fileno()).st_uid}
            self._check_folder(folder)
        except OSError as error:
            raise RunError(f"Cannot use {folder} as the cache of verdicts: {error}. Choose a writable folder.") from error

    def key(self, program: str, parent_output: bytes = b"") -> str:
        """The key of a program's verdict. `parent_output`: the value of its parent that it can read; empty for none."""
        # A blank separates the two digests: the first line cannot be that of a program without a parent's value.
        settings = f"{self._settings} {hashlib.sha256(parent_output).hexdigest()}" if parent_output else self._settings
        return hashlib.sha256(f"{settings}\n{program}".encode("utf-8", "surrogatepass")).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Verdict | None:
        """The verdict, marked as cached, or None. A damaged file is logged and counts as missing, so the program runs again.

        Raises:
          RunError: other users could have written the file or its folder, or the file cannot be read.
        """
        path = self._path(key)
        try:
            data = self._read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"Cannot read the verdict in {path} ({error}). {self._remedy()}") from error
        try:
            return _decode(key, data)
        except ValueError as error:
            logging.getLogger(__name__).warning("The verdict in %s is damaged (%s); the program runs again.", path, error)
            return None

    def put(self, key: str, verdict: Verdict) -> None:
        """Stores a verdict.

        Raises:
          RunError: it cannot be written, for example because the disk is full.
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
                with contextlib.suppress(OSError):  # the original error is raised below
                    os.unlink(temporary)
            raise RunError(f"Cannot write a verdict to {path.parent}: {error}. {storage_remedy(error)} Then resume the run.") from error

    def _read(self, path: Path) -> bytes:
        """The bytes of a file that only this user can have written; links are not followed."""
        self._check_folder(path.parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RunError(f"{path} is not a regular file, so it was not written by this project. {self._remedy()}")
            self._check_owner(path, status)
            if status.st_size > _LARGEST_FILE:
                raise RunError(f"{path} has {status.st_size:,} bytes; a verdict has at most {_LARGEST_FILE:,}. {self._remedy()}")
            return file.read()

    def _check_folder(self, folder: Path) -> None:
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode):
            raise RunError(f"{folder} is a link or a file instead of a folder, so it was not created by this project. {self._remedy()}")
        self._check_owner(folder, status)

    def _check_owner(self, path: Path, status: os.stat_result) -> None:
        if status.st_uid not in self._owners:
            raise RunError(
                f"{path} belongs to another user (id {status.st_uid}), who could forge verdicts and thus rewards. {self._remedy()}"
            )
        if status.st_mode & _OTHERS_WRITE:
            raise RunError(
                f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o}), who could forge verdicts and thus rewards."
                f" {self._remedy()} If you trust its content, run: chmod -R go-w {self._folder}"
            )

    def _remedy(self) -> str:
        return f"Delete the folder {self._folder}; its programs run again when they are needed."


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values, without the flag `cached` and, if it is not OK, without the result, which nothing reads."""
    execution = verdict.execution
    kept = execution.result if verdict.outcome is Outcome.OK else None
    packed = "" if kept is None else base64.b64encode(zlib.compress(kept, _LEVEL)).decode()
    ran = _StoredExecution(execution.outcome, None, execution.stdout, execution.detail, execution.seconds, packed)
    return {
        "outcome": verdict.outcome.value,
        "grade": dataclasses.asdict(verdict.grade),
        "execution": dataclasses.asdict(ran) | {"outcome": ran.outcome.value},
    }


def verdict_of(row: Any, *, cached: bool) -> Verdict:
    """The verdict of a `verdict_row`.

    Raises:
      ValueError: the row is not a verdict.
    """
    if not isinstance(row, dict) or row.keys() != {"outcome", "grade", "execution"}:
        raise ValueError("the verdict is not an object of outcome, grade and execution")
    ran = from_row(_StoredExecution, row["execution"])
    result = None if ran.csv is None else base64.b64decode(ran.csv, validate=True)
    if ran.packed:
        result = _unpacked(base64.b64decode(ran.packed, validate=True))
    execution = Execution(ran.outcome, result, ran.stdout, ran.detail, ran.seconds, cached=cached)
    return Verdict(Outcome(row["outcome"]), from_row(Grade, row["grade"]), execution)


def _unpacked(data: bytes) -> bytes:
    """The bytes of `zlib.compress`.

    Raises:
      ValueError: they are not, or are more than a file may hold.
    """
    unpacking = zlib.decompressobj()
    try:
        found = unpacking.decompress(data, _LARGEST_FILE)
    except zlib.error as error:
        raise ValueError(f"the result cannot be unpacked: {error}") from error
    if not unpacking.eof or unpacking.unused_data:
        raise ValueError("the result cannot be unpacked: it has no end or bytes follow it")
    return found


def _encode(key: str, verdict: Verdict) -> bytes:
    row = verdict_row(verdict)
    return json.dumps({"sha256": _checksum(key, row), "verdict": row}).encode()


def _decode(key: str, data: bytes) -> Verdict:
    """The verdict of `_encode`.

    Raises:
      ValueError: the data are not a verdict, belong to another key, or contradict themselves.
    """
    file = parse_json(data)
    if not isinstance(file, dict) or file.keys() != {"sha256", "verdict"}:
        raise ValueError("the file is not an object of sha256 and verdict")
    row = file["verdict"]
    verdict = verdict_of(row, cached=True)
    if file["sha256"] != _checksum(key, row):  # only after verdict_of: then the row can be serialised again
        raise ValueError("checksum mismatch")
    execution = verdict.execution
    scored = verdict.grade.valid and verdict.grade.score is not None and execution.result is not None and execution.outcome is Outcome.OK
    if (verdict.outcome is Outcome.OK) != scored:
        raise ValueError(f"the outcome {verdict.outcome.value!r} contradicts the grade or the execution")
    return verdict


def _checksum(key: str, row: Any) -> str:
    """Checksum of a verdict and its key, so that a renamed file is not accepted for another program."""
    return hashlib.sha256(f"{key}\n{json.dumps(row, sort_keys=True)}".encode()).hexdigest()
