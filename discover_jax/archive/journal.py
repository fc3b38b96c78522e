"""The journal of a run: an append-only file with one JSON line per attempt.

Rows have no timestamps and a fixed order of fields, so an interrupted and resumed run writes the same bytes as an uninterrupted one.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from discover_jax.exceptions import RunError
from discover_jax.files import append_synced, storage_remedy
from discover_jax.records import from_row, parse_json
from discover_jax.types import Attempt

_FIELDS = tuple(field.name for field in dataclasses.fields(Attempt))
_ENUMS = ("outcome", "stop")
_OPTIONAL = ("feedback", "metrics", "output", "rows", "selection_score", "selection_rows")
"""Fields that rows have only if they are not empty."""


def to_json(attempt: Attempt) -> str:
    """One row without the newline: the fields of `Attempt` in order, enums by value. Without the optional ones that are empty.

    Raises:
      RunError: a number is not finite, which JSON cannot represent.
    """
    row = {name: getattr(attempt, name) for name in _FIELDS}
    for name in _OPTIONAL:
        if row[name] in ("", None, {}):
            del row[name]
    for name in _ENUMS:
        row[name] = row[name].value
    try:
        # ASCII only: a program's text may contain lone surrogates, which UTF-8 cannot encode.
        return json.dumps(row, ensure_ascii=True, allow_nan=False)
    except ValueError as error:
        raise RunError(
            f"Cannot write attempt {attempt.id} to the journal ({error}): score {attempt.score}, private_score {attempt.private_score},"
            f" reward {attempt.reward}. Each must be finite; scores may be None. Fix the task's metric or reward."
        ) from error


def from_json(line: str) -> Attempt:
    """The attempt of one row.

    Raises:
      RunError: the text is not JSON, a field is missing or unknown, or a value has the wrong type.
    """
    try:
        return from_row(Attempt, parse_json(line))
    except ValueError as error:
        raise RunError(f"Invalid journal row: {error}.") from error


class Journal:
    """The journal file. Only one process writes it at a time (see `workdir`)."""

    def __init__(self, path: Path):
        """Opens the journal at `path`; a missing file counts as empty. Nothing is written before the first `append`."""
        self._path = Path(path)
        self._sha256 = None  # of the whole file; kept up to date after the first call of `digest`

    @property
    def position(self) -> int:
        """Length of the file in bytes. A checkpoint stores it, and `truncate` goes back to it."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def digest(self) -> str:
        """SHA-256 of the rows in hexadecimal. A checkpoint stores it, so that `resume` detects every later change.

        Raises:
          RunError: the file cannot be read.
        """
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(self._bytes())
        return self._sha256.hexdigest()

    def append(self, attempts: Sequence[Attempt]) -> None:
        """Appends rows by one write and returns once they are on disk.

        Raises:
          RunError: the disk is full or fails. Earlier rows are unchanged, and incomplete new rows are removed if possible.
        """
        data = "".join(to_json(attempt) + "\n" for attempt in attempts).encode()
        before = self.position
        try:
            append_synced(self._path, data)
        except OSError as error:
            raise RunError(
                f"Cannot write {len(attempts)} rows ({len(data)} bytes) to the journal {self._path} ({error}). Its first {before} bytes are"
                f" unchanged. {storage_remedy(error)} Then start the same command again: it resumes at the last checkpoint."
            ) from error
        if self._sha256 is not None:
            self._sha256.update(data)

    def check(self, position: int, sha256: str) -> tuple[bytes, list[Attempt]]:
        """The first `position` bytes and their rows, after checking them against the SHA-256 from a checkpoint.

        Raises:
          RunError: rows were deleted, a row is damaged (the message gives its line, counted from 1), or something was altered.
        """
        data = self._bytes()
        size, head = len(data), data[:position]
        if not 0 <= position <= size:
            raise RunError(self._too_short(position, size))
        attempts = self._parse(head)
        if hashlib.sha256(head).hexdigest() != sha256:
            raise RunError(
                f"The journal {self._path} was altered since the checkpoint: checksum mismatch in its first {position} bytes"
                f" ({len(attempts)} rows). Restore the original, or start a new run in another directory."
            )
        return head, attempts

    def resume(self, position: int, sha256: str) -> list[Attempt]:
        """Goes back to a checkpoint: `check`, then `truncate`. Returns the remaining rows.

        Raises:
          RunError: see `check` and `truncate`; the journal is then unchanged.
        """
        _, attempts = self.check(position, sha256)
        self.truncate(position)
        return attempts

    def truncate(self, position: int) -> None:
        """Truncates the file to `position` bytes. First appends the rest to journal.discarded.jsonl, so that nothing is lost.

        Raises:
          RunError: the journal is shorter than `position`, `position` is not at the start of a row, or the disk fails.
        """
        size = self.position
        if not 0 <= position <= size:
            raise RunError(self._too_short(position, size))
        if position == size:
            return
        try:
            with self._path.open("r+b") as file:
                if position:
                    file.seek(position - 1)
                    if file.read(1) != b"\n":
                        raise RunError(
                            f"Byte {position} of the journal {self._path} is not the start of a row, so the journal was edited since the"
                            " checkpoint. Restore the original, or start a new run in another directory."
                        )
                file.seek(position)
                dropped = file.read()
                # Terminate an incomplete row, so that rows appended later stay readable.
                append_synced(self._path.with_name("journal.discarded.jsonl"), dropped if dropped.endswith(b"\n") else dropped + b"\n")
                file.truncate(position)
                self._sha256 = None
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"Cannot truncate the journal {self._path} to {position} bytes ({error}). It still has all its rows."
                f" {storage_remedy(error)} Then start the same command again: it resumes at the last checkpoint."
            ) from error

    def read(self) -> list[Attempt]:
        """All rows, oldest first. Skips an incomplete last line, which a kill left behind.

        Raises:
          RunError: another line is damaged; the message gives its number, counted from 1.
        """
        return self._parse(self._bytes())

    def _bytes(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise RunError(f"Cannot read the journal {self._path} ({error}).") from error

    def _parse(self, data: bytes) -> list[Attempt]:
        """The rows of complete lines."""
        return _parse(self._path, data)

    def _too_short(self, position: int, size: int) -> str:
        return (
            f"The journal {self._path} has {size} bytes, but it had {position} at the checkpoint: rows were deleted."
            " Restore the whole journal, or start a new run in another directory."
        )


class JournalReader:
    """Reads a growing journal: each `read` parses only the rows appended since the last one."""

    def __init__(self, path: Path):
        self._path = Path(path)
        self._forget()

    def _forget(self) -> None:
        self._file_id: tuple[int, int] | None = None  # device and inode
        self._offset = 0
        self._last_line = b""  # ends at `_offset`
        self._attempts: list[Attempt] = []

    def read(self) -> list[Attempt]:
        """All rows, oldest first: what `Journal.read` returns. Starts over if the file was replaced or cut back.

        Raises:
          RunError: a complete line is damaged, or the file cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                file.seek(self._offset - len(self._last_line))
                if self._file_id != (status.st_dev, status.st_ino) or file.read(len(self._last_line)) != self._last_line:
                    self._forget()
                    self._file_id = (status.st_dev, status.st_ino)
                    file.seek(0)
                data = file.read()
        except FileNotFoundError:
            self._forget()
            return []
        except OSError as error:
            raise RunError(f"Cannot read the journal {self._path} ({error}).") from error
        complete = data[: data.rfind(b"\n") + 1]
        self._attempts += _parse(self._path, complete, first_line=len(self._attempts) + 1)
        if complete:
            self._offset += len(complete)
            self._last_line = complete[complete.rfind(b"\n", 0, -1) + 1 :]
        return list(self._attempts)


def _parse(path: Path, data: bytes, first_line: int = 1) -> list[Attempt]:
    """The rows of complete lines; `first_line` is the number of the first one in the file."""
    attempts = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=first_line):
        try:
            attempts.append(from_json(line.decode()))
        except (RunError, UnicodeDecodeError) as error:
            raise RunError(
                f"Line {number} of the journal {path} is damaged: {error} Restore the original, or start a new run in another directory."
            ) from error
    return attempts
