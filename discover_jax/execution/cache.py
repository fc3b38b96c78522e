"""Verdicts on disk by (program, data, settings): what a collapsed group wrote eight times runs once, and a resumed run repeats none."""

import base64
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.types import Execution, Grade, Outcome, Verdict

_FORMAT = 1  # raise it when the harness's contract with programs changes


def packages() -> list[str]:
    """Name and version of everything that a program can import, sorted: the same program may score otherwise with others."""
    found = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    return [platform.python_version(), platform.machine(), *sorted(found)]


class VerdictCache:
    """A folder of verdicts, one JSON file each, written whole or not at all; several processes may share it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Opens the folder, made if missing.

        Args:
          folder: where the files lie.
          settings: everything but the program that decides a verdict; JSON.

        Raises:
          RunError: the folder cannot be made.
        """
        self._folder = folder
        text = json.dumps({"format": _FORMAT, **settings}, sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
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
        """The verdict, marked as cached, or None. A file that cannot be understood counts as missing: running again is always right."""
        try:
            row = json.loads(self._path(key).read_bytes())
            execution = row["execution"]
            return Verdict(
                Outcome(row["outcome"]),
                Grade(**row["grade"]),
                Execution(
                    Outcome(execution["outcome"]),
                    None if execution["csv"] is None else base64.b64decode(execution["csv"], validate=True),
                    execution["stdout"],
                    execution["detail"],
                    execution["seconds"],
                    cached=True,
                ),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, verdict: Verdict) -> None:
        """Keeps a verdict.

        Raises:
          RunError: it cannot be written, as on a full disk.
        """
        execution = verdict.execution
        row = {
            "outcome": verdict.outcome.value,
            "grade": dataclasses.asdict(verdict.grade),
            "execution": {
                "outcome": execution.outcome.value,
                "csv": None if execution.csv is None else base64.b64encode(execution.csv).decode(),
                "stdout": execution.stdout,
                "detail": execution.detail,
                "seconds": execution.seconds,
            },
        }
        path = self._path(key)
        temporary = None
        try:
            path.parent.mkdir(exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with open(descriptor, "w") as file:
                json.dump(row, file)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):  # the error that counts is being reported
                    os.unlink(temporary)
            raise RunError(
                f"The verdict on a program cannot be kept in {path.parent}: {error}. Make room there, then resume the run."
            ) from error
