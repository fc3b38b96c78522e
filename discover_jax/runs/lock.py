"""The lock of a run directory: one run at a time. It waits for a dead holder's lock to go, and names a live holder.

The kernel releases a lock when its holder ends, however it ends, but a file server learns of a dead host late: NFS version 4 after its
lease (90 s by default), version 3 once the host has restarted.
"""

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.files import NoLocksError, try_flock

NAME = ".lock"
PATIENCE_SECONDS = 300.0
"""Time to wait for a lock that no live process of this host holds."""
_LOOK_SECONDS = 2.0
_TELL_SECONDS = 30.0
NO_LOCKS_REMEDY = (
    "Mount it with locks. Lustre: with the option `flock` (all hosts see a lock), or `localflock` (only processes of the same host see it,"
    " so nothing keeps runs on two hosts apart). NFS: version 4 (`mount -t nfs -o vers=4.1`), which has locks of its own; version 3 needs"
    " rpc.statd and lockd on client and server."
)


@contextlib.contextmanager
def hold_lock(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a run directory until the context ends.

    Args:
      folder: exists.
      tell: called with a line of text while this waits.

    Raises:
      RunError: a live process of this host holds the lock, or another one still does after `PATIENCE_SECONDS`; or there are no locks.
      OSError: the file of the lock cannot be opened or written.
    """
    descriptor = _locked(folder, tell)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_identity(os.getpid())).encode() + b"\n", 0)
        yield
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Opens a file, creates it if needed, and locks it. Returns its descriptor, or None if another holds the lock.

    Raises:
      RunError: the file system has no locks.
      OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        held = try_flock(descriptor, path.parent)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, NoLocksError):
            raise RunError(f"{error.strerror} {NO_LOCKS_REMEDY}") from error
        raise
    if not held:
        os.close(descriptor)
    return descriptor if held else None


def _locked(folder: Path, tell: Callable[[str], None]) -> int:
    """The descriptor of the locked file."""
    path, began, told = folder / NAME, time.monotonic(), None
    while True:
        if (descriptor := try_lock(path)) is not None:
            if _is_current(descriptor, path):
                return descriptor
            os.close(descriptor)  # someone deleted the file of a dead holder meanwhile
            continue
        holder, now = _holder(path), time.monotonic()
        if _lives_here(holder):
            raise RunError(
                f"The run directory {folder} is in use by {_described(holder)}. Wait for it to end, or give another directory by --workdir."
            )
        if now - began > PATIENCE_SECONDS:
            raise RunError(
                f"The run directory {folder} is in use by {_described(holder)}: its lock was still held after {now - began:.0f} s. Wait for"
                " it to end, or give another directory by --workdir. If that process is dead, its file server still keeps the lock (NFS"
                f" version 3 does until the host restarts): once you are sure, delete {path} and start the same command again."
            )
        if told is None or now - told > _TELL_SECONDS:
            told = now
            tell(
                f"Waiting for the run directory {folder}, which is in use by {_described(holder)}: {now - began:.0f} of at most"
                f" {PATIENCE_SECONDS:.0f} s. A file server may keep the lock of a dead host for a while."
            )
        time.sleep(_LOOK_SECONDS)


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _identity(pid: int) -> dict[str, Any]:
    """What the holder writes into the file."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": pid, "since": since, "born": _born(pid)}


def _born(pid: int) -> str:
    """The boot and the time since it at which a live process began, so that no other process has the same; empty without /proc.

    Raises:
      OSError: there is no such process.
    """
    if not Path("/proc/self/stat").exists():
        os.kill(pid, 0)
        return ""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {ticks}"


def _holder(path: Path) -> dict[str, Any]:
    """What the holder wrote into its file; empty if it has not yet, or if an earlier version wrote only its id."""
    try:
        found = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError):  # the message then says that the holder is unknown
        return {}
    return found if isinstance(found, dict) else {"pid": found}


def _lives_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is a live process of this host. A container may have the same host name and ids as a dead one."""
    if holder.get("host") != socket.gethostname() or not isinstance(pid := holder.get("pid"), int):
        return False
    try:
        return _born(pid) == holder.get("born")
    except OSError:
        return False


def _described(holder: dict[str, Any]) -> str:
    if "host" not in holder:
        return f"another process (id {holder['pid']})" if "pid" in holder else "another process"
    return f"another process: host {holder['host']}, id {holder.get('pid')}, since {holder.get('since')}"
