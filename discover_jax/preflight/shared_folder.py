"""Whether all hosts see the same run directory, and whether a lock of one host is seen by the others."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from discover_jax.exceptions import RunError
from discover_jax.files import storage_remedy
from discover_jax.hosts.meeting import Meeting
from discover_jax.preflight.findings import Finding, Level
from discover_jax.runs import lock

_SECONDS = 60.0
_TOKEN, _LOCK = "token", "lock"


@contextlib.contextmanager
def probe_folder(meeting: Meeting, workdir: Path) -> Iterator[Path | None]:
    """A folder that process 0 makes on the file system of the run directory until the context ends; None where it is not seen."""
    made, token = None, secrets.token_hex(16)
    if meeting.index == 0:
        # Next to the run directory if there is none: the run makes it.
        place = Path(os.path.abspath(workdir))
        while not place.is_dir():
            place = place.parent
        made = place / f".discover_jax-preflight-{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):  # the check of the disk reports it
            made.mkdir(mode=0o755)
            (made / _TOKEN).write_text(token)
    try:
        path, token = meeting.from_first("the run directory", [str(made), token], _SECONDS)
        yield Path(path) if _reads(Path(path) / _TOKEN, token) else None
        meeting.gather("the run directory", None, _SECONDS)  # before process 0 deletes it
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _reads(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def check_shared(folder: Path | None, workdir: Path) -> Finding:
    """Whether this host sees the folder that process 0 made."""
    if folder is not None:
        return Finding("shared", Level.OK, f"all hosts see the same folder for {workdir}")
    text = (
        f"The folder of {workdir} is another one here than in process 0, or cannot be written there. All hosts write their parts of a"
        " checkpoint into the run directory. Put it on a shared file system (NFS, Lustre, a mounted volume), and give its absolute path by"
        " --workdir."
    )
    return Finding("shared", Level.FIX, text)


def check_locks(folder: Path | None, meeting: Meeting) -> Finding:
    """Each process in turn holds a lock, and all others must see that. All processes must call this.

    Args:
      folder: of `probe_folder`.
      meeting: of all processes.
    """
    blind, problems = [], []
    for holder in range(meeting.count):
        mine = holder == meeting.index
        held = _attempt(folder, problems) if mine else None
        exists = meeting.gather("file locks", held is not None, _SECONDS)[holder]
        if exists and not mine and (taken := _attempt(folder, problems)) is not None:
            os.close(taken)
            blind.append(meeting.names[holder])
        meeting.gather("file locks", None, _SECONDS)
        if held is not None:
            os.close(held)
    if folder is None:
        return Finding("lock", Level.SKIPPED, "skipped: the folder is not shared")
    if problems:
        return Finding("lock", Level.FIX, problems[0], "none")
    if blind:
        text = (
            f"This host does not see a lock that is held by {', '.join(blind)}: locks are local to each host, so nothing keeps runs on two"
            f" hosts out of the same run directory. {lock.NO_LOCKS_REMEDY} Until then, take care that only one run uses it."
        )
        return Finding("lock", Level.WARNING, text, "local")
    return Finding("lock", Level.OK, "a lock of each host is seen by all others" if meeting.count > 1 else "the file system has locks")


def _attempt(folder: Path | None, problems: list[str]) -> int | None:
    """The descriptor of the locked file; None if another holds the lock, or if there is a problem, which is added to `problems`."""
    try:
        return lock.try_lock(folder / _LOCK) if folder is not None else None
    except RunError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"flock in {folder}: {error}. {storage_remedy(error)}")
    return None
