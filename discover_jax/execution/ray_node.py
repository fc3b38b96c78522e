"""The actor on a node of a ray cluster. It runs programs with the same workers and sandbox as the run's own machine.

It gets only the public folders, which programs may see. Answers stay with the grading processes (grading.py).
"""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import DiscoverError, SandboxError
from discover_jax.execution.backend import Request, ShownTask
from discover_jax.execution.cache import packages
from discover_jax.execution.limits import ResourceLimits
from discover_jax.execution.local import LocalBackend
from discover_jax.files import storage_remedy, try_flock

_PREFIX, _NEW_PREFIX = "discover_jax-public-", "discover_jax-new-"


def pack(shown: Sequence[ShownTask]) -> bytes:
    """Packs the public folders of each run of each task into one archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as archive:
        for number, task in enumerate(shown):
            for run, folder in enumerate(task.folders):
                archive.add(folder.resolve(), arcname=f"{number}/{run}")
    return buffer.getvalue()


class Node:
    """The actor. Its methods return errors instead of raising them, so that ray does not wrap them."""

    def __init__(self) -> None:
        self._backend: LocalBackend | None = None
        self._folder: _Folder | None = None

    def open(
        self,
        archive: bytes,
        tasks: Sequence[tuple[int, bool]],
        wanted: Sequence[str],
        limits: ResourceLimits,
        *,
        slots: int,
        preload: Sequence[str],
        grace_seconds: float,
        hidden: Sequence[str],
    ) -> str | DiscoverError:
        """Checks this node and starts its workers.

        Args:
          archive: see `pack`.
          tasks: for each task, the number of a program's runs, and whether its functions are called (`ShownTask.calls`).
          wanted: the packages of the run's own machine; scores depend on them.
          limits: of each program.
          slots: number of programs at once.
          preload, grace_seconds: see `local.LocalBackend`.
          hidden: paths that programs must not see, such as ray's sockets.

        Returns:
          One line about how programs are isolated here, or the error.
        """
        try:
            here = packages(_own_path())
            if differing := sorted(set(here) ^ set(wanted)):
                return SandboxError(
                    f"Python or packages differ from those of the run's own machine; scores depend on them ({', '.join(differing[:6])}"
                    + (f" and {len(differing) - 6} more" if len(differing) > 6 else "")
                    + "). Install the same on all nodes, with the same file of constraints/."
                )
            self._folder = _Folder()
            publics = self._folder.unpack(archive, [runs for runs, _ in tasks])
            self._backend = LocalBackend(
                [ShownTask(folders, calls) for folders, (_, calls) in zip(publics, tasks, strict=True)],
                limits,
                workers=slots,
                isolation="bubblewrap",
                hidden=[Path(path) for path in hidden],
                preload=preload,
                grace_seconds=grace_seconds,
            )
            return self._backend.describe()
        except DiscoverError as error:
            return error
        except OSError as error:
            return SandboxError(f"Cannot store the public files there: {error}. {storage_remedy(error)} They are in the temporary folder.")

    def ask(self, slot: int, request: Request) -> Any:
        """See `backend.Slot`."""
        assert self._backend is not None
        try:
            return self._backend.all_slots[slot].ask(request)
        except SandboxError as error:
            return error

    def close(self) -> None:
        """Ends all programs and removes the files."""
        if self._backend is not None:
            self._backend.close()
            self._backend.release()
        if self._folder is not None:
            self._folder.remove()


def _own_path() -> list[str]:
    """This process's sys.path without the folders that ray adds in its workers. They are inside ray, and programs do not see them."""
    spec = importlib.util.find_spec("ray")
    ray = Path(spec.origin).parent if spec is not None and spec.origin else None
    return [folder for folder in sys.path if ray is None or ray not in Path(folder).parents]


class _Folder:
    """A temporary folder that is locked while its process lives. Creating one removes the folders of killed processes."""

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                if left.lstat().st_uid == os.geteuid() and (lock := _lock(left)) is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)
        new = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX))
        new.chmod(0o711)  # for programs, which run under other uids if root started this
        self._held = _lock(new)
        # Rename it to the name that others look for only after it is locked.
        self._path = new.rename(new.with_name(_PREFIX + new.name.removeprefix(_NEW_PREFIX)))

    def unpack(self, archive: bytes, runs: Sequence[int]) -> list[list[Path]]:
        """Unpacks the folders of `pack`, readable by all users."""
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(self._path, filter="data")
        for parent, folders, files in os.walk(self._path):
            for name in folders:
                os.chmod(os.path.join(parent, name), 0o755)
            for name in files:
                os.chmod(os.path.join(parent, name), 0o644)
        return [[self._path / str(task) / str(run) for run in range(count)] for task, count in enumerate(runs)]

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _lock(folder: Path) -> int | None:
    """Locks the folder and returns the descriptor that holds the lock; None if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        held = try_flock(descriptor, folder)
    except OSError as error:
        os.close(descriptor)
        raise SandboxError(
            f"Cannot lock {folder} on this node of the ray cluster: {error.strerror or error}. Set TMPDIR to a folder of a file system with"
            " locks, such as tmpfs, ext4 or xfs."
        ) from error
    if not held:
        os.close(descriptor)
    return descriptor if held else None
