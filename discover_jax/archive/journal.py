"""The journal of a run: one JSON line for every attempt, only ever appended to.

Rows hold no clock and their fields keep one order, so that a run which was broken off and resumed leaves the same bytes as an unbroken one.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from discover_jax.exceptions import RunError
from discover_jax.files import append_synced
from discover_jax.records import from_row, parse_json
from discover_jax.types import Attempt

_FIELDS = tuple(field.name for field in dataclasses.fields(Attempt))
_ENUMS = ("outcome", "stop")


def to_json(attempt: Attempt) -> str:
    """One row, without the line's end: the fields of `Attempt` in their order, enums by value.

    Raises:
      RunError: a number is not finite, which no reader of the journal could be expected to take.
    """
    row = {name: getattr(attempt, name) for name in _FIELDS}
    for name in _ENUMS:
        row[name] = row[name].value
    try:
        # ASCII only: text from a program may hold lone surrogates, which UTF-8 cannot carry.
        return json.dumps(row, ensure_ascii=True, allow_nan=False)
    except ValueError as error:
        raise RunError(
            f"Attempt {attempt.id} cannot be journalled ({error}): score {attempt.score}, private_score {attempt.private_score}, reward"
            f" {attempt.reward}. Each must be finite or, for a score, None; the task's metric or reward is at fault."
        ) from error


def from_json(line: str) -> Attempt:
    """The attempt of one row.

    Raises:
      RunError: the text is no JSON, lacks a field, has one too many, or holds something else than a field may be.
    """
    try:
        return from_row(Attempt, parse_json(line))
    except ValueError as error:
        raise RunError(f"A row of the journal cannot be read: {error}.") from error


class Journal:
    """The file itself. One process writes it at a time (see `workdir`)."""

    def __init__(self, path: Path):
        """Opens the journal at `path`, or an empty one if there is none yet. Nothing is written before the first `append`."""
        self._path = Path(path)
        self._sha256 = None  # of the whole file, kept up to date from the first time that it is asked for

    @property
    def position(self) -> int:
        """Length of the file, bytes: what a checkpoint remembers and `truncate` goes back to."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def digest(self) -> str:
        """SHA-256 of the rows, in hexadecimal: what a checkpoint remembers, so that `resume` sees every change that was made since.

        Raises:
          RunError: the file cannot be read.
        """
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(self._bytes())
        return self._sha256.hexdigest()

    def append(self, attempts: Sequence[Attempt]) -> None:
        """Adds rows, by one write, and returns once they are on the disk.

        Raises:
          RunError: the disk is full or fails. What the journal held before is then still there, and part rows are taken back if possible.
        """
        data = "".join(to_json(attempt) + "\n" for attempt in attempts).encode()
        before = self.position
        try:
            append_synced(self._path, data)
        except OSError as error:
            raise RunError(
                f"{len(attempts)} rows ({len(data)} bytes) could not be written to the journal {self._path} ({error}). The {before} bytes"
                " from before are safe. Free some space, then start the same command again: it resumes at the last checkpoint."
            ) from error
        if self._sha256 is not None:
            self._sha256.update(data)

    def check(self, position: int, sha256: str) -> tuple[bytes, list[Attempt]]:
        """The first `position` bytes and their rows, once they have proved to be those of which a checkpoint remembers the SHA-256.

        Raises:
          RunError: rows were deleted, a row is broken (the message gives its line, from 1), or something was altered.
        """
        data = self._bytes()
        size, head = len(data), data[:position]
        if not 0 <= position <= size:
            raise RunError(self._too_short(position, size))
        attempts = self._parse(head)
        if hashlib.sha256(head).hexdigest() != sha256:
            raise RunError(
                f"The journal {self._path} was altered since the checkpoint was made: its first {position} bytes ({len(attempts)} whole"
                " rows) are not those that the run wrote. Put the original back, or start a new run in another folder."
            )
        return head, attempts

    def resume(self, position: int, sha256: str) -> list[Attempt]:
        """Goes back to a checkpoint: `check`, then `truncate`. The rows that stay.

        Raises:
          RunError: see there; the journal is then as it was.
        """
        _, attempts = self.check(position, sha256)
        self.truncate(position)
        return attempts

    def truncate(self, position: int) -> None:
        """Goes back to `position`, bytes. What lay behind it is appended to journal.discarded.jsonl first, so that nothing is lost.

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
                            " checkpoint. Put the original back, or start a new run in another folder."
                        )
                file.seek(position)
                dropped = file.read()
                # A torn row gets its line's end, so that the next rows put there stay readable.
                append_synced(self._path.with_name("journal.discarded.jsonl"), dropped if dropped.endswith(b"\n") else dropped + b"\n")
                file.truncate(position)
                self._sha256 = None
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"The journal {self._path} could not be cut back to {position} bytes ({error}). It still has its rows."
            ) from error

    def read(self) -> list[Attempt]:
        """All rows, oldest first. A last line without its end was torn by a kill and is left out.

        Raises:
          RunError: another line is broken; the message gives its number, from 1.
        """
        return self._parse(self._bytes())

    def _bytes(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise RunError(f"The journal {self._path} cannot be read ({error}).") from error

    def _parse(self, data: bytes) -> list[Attempt]:
        """The rows of complete lines."""
        return _parse(self._path, data)

    def _too_short(self, position: int, size: int) -> str:
        return (
            f"The journal {self._path} has {size} bytes, but the checkpoint was made when it had {position}: rows were deleted."
            " Put the whole journal back, or start a new run in another folder."
        )


class JournalReader:
    """Reads a journal that grows: each `read` parses only the rows appended since the one before."""

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
            raise RunError(f"The journal {self._path} cannot be read ({error}).") from error
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
