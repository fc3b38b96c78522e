"""Durable files: written whole or not at all, and on the disk when the call returns."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from discover_jax.exceptions import RunError

_REMEDIES = {
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Your quota is used up: delete files, or ask for more.",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Check the owner and the permissions of the directory."),
    errno.EROFS: "The file system is mounted read-only: mount it writable.",
    **dict.fromkeys(
        (errno.ENOSYS, errno.EOPNOTSUPP),
        "This file system does not support what a run needs: use another (ext4, xfs, NFS, Lustre).",
    ),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO, errno.ESHUTDOWN),
        "The disk or the file server fails: check the mount (`df`, `dmesg`).",
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Too many files are open: raise the limit (`ulimit -n`)."),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT), "Check the path."),
}

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What `flock` fails with where a file system has no locks: Lustre mounted `noflock`, NFS without a lock service, some FUSE mounts."""


class NoLocksError(OSError):
    """A file system has no file locks. The text names its folder; the caller says what to use."""


def try_flock(descriptor: int, folder: Path) -> bool:
    """Locks an open file or folder until its descriptor is closed; False if another process holds the lock.

    Args:
      folder: for the error.

    Raises:
      NoLocksError: the file system has no locks.
      OSError: it failed.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise NoLocksError(error.errno, f"The file system of {folder} has no file locks (flock: {error.strerror}).") from error
    return True


def storage_remedy(error: BaseException) -> str:
    """What to do about an error of a file system: one or more sentences. Libraries that hide the errno are recognised by its text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        number = next((each for each in _REMEDIES if os.strerror(each).lower() in str(error).lower()), None)
    return _REMEDIES.get(number or 0, "Check the disk, its free space and the permissions of the directory.")


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`. Write a file there: it replaces `path` when the context ends without an error.

    After a kill or a power cut `path` holds either its old bytes or all the new ones.

    Raises:
      OSError: the disk is full or fails; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary, os.O_RDONLY)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # report the first error
            temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the context ends, see `replacement`.

    Raises:
      RunError: the disk is full or fails; the old file is unchanged.
    """
    try:
        with replacement(path) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        raise RunError(
            f"Cannot write {path} ({error}). The old file is unchanged. {storage_remedy(error)} Then start the same command"
            " again: it resumes at the last checkpoint."
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a whole file, see `atomic_file`.

    Raises:
      RunError: the disk is full or fails; the old file is unchanged.
    """
    with atomic_file(path) as file:
        file.write(data)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and syncs it. Not atomic: for files of a directory that is renamed once it is complete.

    Raises:
      OSError: the disk is full or fails.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def append_synced(path: Path, data: bytes) -> None:
    """Appends to a file and syncs it; makes the file if needed.

    Raises:
      OSError: the disk is full or fails. The file is then cut back to its old length if possible.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            view = memoryview(data)
            while view:  # usually one write; the kernel may take less when the disk is nearly full
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            if before == 0:  # the file may be new, and its name must survive a power cut
                sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # report the first error; the next start drops a torn row
                os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Makes renames and deletions in a directory survive a power cut."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
