"""Bounds the memory of a sandbox: a control group (v1 or v2) where one can be made, else the processes' own limits and a look now and then.

Only a control group bounds everything together: anonymous and shared memory, the files of the scratch folder, all processes. A group is
made below the one that this process is in, so that limits set on us from outside keep holding.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import re
import signal
import time
from pathlib import Path

from discover_jax.exceptions import SandboxError

_PREFIX = "discover_jax"
_HOST = f"{_PREFIX}-host"
_FILE_BYTES = 1500
"""Of the kernel's memory for a file in memory, on top of its content: measured 960 on Linux 6.18, and 1480 with a name of 245 letters."""
_CLOSE_BYTES = 1 << 20
"""A group counts as full when so much or less is left: the kernel kills for the first piece that does not fit, of 32 KiB at most."""
_REMOVE_TRIES = 100  # 10 ms apart
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cgroups:
    """Where groups can be made: `version` 1 or 2, and the parent folders (in v2 both are the same; `pids` may be missing)."""

    version: int
    memory: Path
    pids: Path | None

    def describe(self) -> str:
        moved = self.version == 2 and (self.memory / _HOST).is_dir()
        return f"control group v{self.version}" + (f" (below {self.memory}, whose processes moved to {_HOST} in it)" if moved else "")


def own_folder(controller: str) -> Path | None:
    """The folder of this process's group in a v1 hierarchy ("memory", "pids") or in v2 ("")."""
    own = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = path
    if own is None:
        return None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if (controller and kind == "cgroup" and controller in options.split(",")) or (not controller and kind == "cgroup2"):
            relative = os.path.relpath(own, root)
            return None if relative.startswith("..") else Path(mount_point, relative)
    return None


def _can_make_groups(folder: Path, needed: str) -> bool:
    """Tries it: makes a group, looks for the file that bounds, and takes it away again."""
    probe = folder / f"{_PREFIX}-{os.getpid()}-probe"
    try:
        probe.mkdir()
    except OSError:  # no permission, read-only, or not a hierarchy that we may divide: the caller falls back and says so
        return False
    try:
        return os.access(probe / needed, os.W_OK)
    finally:
        probe.rmdir()


def find_cgroups() -> Cgroups | None:
    """Where this process can make groups that bound memory; None if nowhere."""
    memory, pids = own_folder("memory"), own_folder("pids")
    if memory and _can_make_groups(memory, "memory.limit_in_bytes"):
        return Cgroups(1, memory, pids if pids and _can_make_groups(pids, "pids.max") else None)
    own = own_folder("")
    if own is None:
        return None
    if own.name == _HOST:  # an earlier run made it, see _divide
        own = own.parent
    folder = _nearest_with_memory(own)
    if folder is None:
        return None
    wanted = [name for name in ("memory", "pids") if name in _controllers(folder)]
    _divide(folder, wanted, move=folder == own)
    if _can_make_groups(folder, "memory.max"):
        return Cgroups(2, folder, folder if "pids" in wanted else None)
    return None


def _controllers(folder: Path) -> list[str]:
    """Controllers that a v2 group may hand to those below it; empty above the hierarchy's root, or where it is hidden from us."""
    try:
        return (folder / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _nearest_with_memory(own: Path) -> Path | None:
    """The group, ours or above it, that has the memory controller; limits that hold for us are set there or further up."""
    return next((folder for folder in (own, *own.parents) if "memory" in _controllers(folder)), None)


def _divide(folder: Path, controllers: list[str], *, move: bool) -> None:
    """Hands a v2 group's controllers to those below it, if that is allowed; `_can_make_groups` sees whether it was.

    Only a group without processes of its own may be divided (the kernel's "no internal processes" rule). With `move`, for the group that
    we are in, all who are in it move to a group below, which sets no limits; those of their old group, now above, keep holding.
    """
    control = folder / "cgroup.subtree_control"
    for _ in range(10):  # processes may start while others move
        try:
            control.write_text(" ".join(f"+{name}" for name in controllers))
            return
        except OSError as error:
            if error.errno != errno.EBUSY or not move:
                return
        host = folder / _HOST
        try:
            host.mkdir(exist_ok=True)
            for pid in (folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (host / "cgroup.procs").write_text(pid)
        except OSError:  # some process there is not ours to move
            return


def _kill_at_once(folder: Path) -> bool:
    """Kills all processes of a group in one step, so that none can fork ahead of it; False where the kernel cannot (v1, or before 5.14)."""
    if not (folder / "cgroup.kill").exists():
        return False
    (folder / "cgroup.kill").write_text("1")
    return True


def _end_processes(folder: Path) -> None:
    """Kills what is left in a group."""
    if _kill_at_once(folder):
        return
    for pid in (folder / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def remove_stale(cgroups: Cgroups) -> None:
    """Removes groups whose maker is gone, such as one that was killed, with what is left in them."""
    for parent in {cgroups.memory, cgroups.pids} - {None}:
        for folder in parent.glob(f"{_PREFIX}-*"):
            match = re.fullmatch(rf"{_PREFIX}-(\d+)-.*", folder.name)
            if match and not os.path.exists(f"/proc/{match[1]}"):
                with contextlib.suppress(OSError):  # another run does the same at this moment, or a process is still ending
                    _end_processes(folder)
                    folder.rmdir()


class Group:
    """One control group for one sandbox; made at once, removed by `remove`."""

    def __init__(self, cgroups: Cgroups, name: str, memory_bytes: int, processes: int) -> None:
        """Makes the group. Raises OSError if it cannot be made."""
        self._version, self._memory_bytes = cgroups.version, memory_bytes
        folder_name = f"{_PREFIX}-{os.getpid()}-{name}"
        self._memory = cgroups.memory / folder_name
        parents = {cgroups.memory, cgroups.pids} - {None}
        self._folders = [parent / folder_name for parent in parents]
        for folder in self._folders:
            folder.mkdir()
        if cgroups.version == 1:
            self._write("memory.limit_in_bytes", memory_bytes)
            self._write("memory.memsw.limit_in_bytes", memory_bytes, optional=True)  # absent without accounting of swap
        else:
            self._write("memory.max", memory_bytes)
            self._write("memory.swap.max", 0, optional=True)
            self._write("memory.oom.group", 1)
        if cgroups.pids:
            (cgroups.pids / folder_name / "pids.max").write_text(str(processes + 16))  # bubblewrap's own, and what waits to be reaped

    def _write(self, name: str, value: int, optional: bool = False) -> None:
        path = self._memory / name
        if not optional or path.exists():
            path.write_text(str(value))

    @property
    def procs_files(self) -> list[str]:
        """Files into which a process writes "0" to join."""
        return [str(folder / "cgroup.procs") for folder in self._folders]

    def exceeded(self) -> bool:
        """Whether the kernel has ended a process of this group because the group had reached its limit.

        Raises:
          SandboxError: it has ended one though the limit was never reached. `oom_kill` counts the victims in this group of all who kill for
            want of memory, those for the container's limit and the whole machine's included; these are no program's fault.
        """
        if not self._count("memory.oom_control" if self._version == 1 else "memory.events", "oom_kill"):
            return False
        if self._version == 1:
            # Not `failcnt`: with both limits equal it is the one with swap that fails, whose count stays 0 on Linux 6.18.
            most = max(self._count(name) for name in ("memory.max_usage_in_bytes", "memory.memsw.max_usage_in_bytes"))
            reached = most >= self._memory_bytes - _CLOSE_BYTES
        else:  # not `max`, which also counts when pages could be given back instead
            reached = self._count("memory.events", "oom") > 0
        if not reached:
            raise SandboxError(
                "The kernel ended a process of a program for want of memory, though the program's own limit was not reached: the container"
                " or the machine ran out. Lower execution.workers or execution.memory_gib, or give the run more memory."
            )
        return True

    def _count(self, file: str, name: str = "") -> int:
        """A number that the kernel keeps: a file's only one, or that behind `name`; 0 if there is none."""
        path = self._memory / file
        match = re.search(rf"^{name + ' ' if name else ''}(\d+)$", path.read_text() if path.exists() else "", re.MULTILINE)
        return int(match[1]) if match else 0

    def kill(self) -> None:
        """Ends all that is in the group, in whatever process namespace, where the kernel can do so in one step; else nothing."""
        _kill_at_once(self._memory)

    def remove(self) -> None:
        """Removes the group, for which its processes must have ended. Waits a moment for the kernel to notice.

        One that stays busy is left to `remove_stale`, and the log tells.
        """
        for folder in self._folders:
            for _ in range(_REMOVE_TRIES):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    time.sleep(0.01)
                else:
                    break
            else:
                left = (folder / "cgroup.procs").read_text().split()
                _log.warning(
                    "The control group %s could not be removed: it is still busy (processes %s).", folder, ", ".join(left) or "none"
                )


def _children(pid: int) -> list[int]:
    children = []
    with contextlib.suppress(OSError):  # ended meanwhile
        for task in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return children


def tree_bytes(pid: int) -> int:
    """Memory that a process and its descendants hold now, in bytes, pages that they share counted once (PSS)."""
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        waiting += _children(process)
        with contextlib.suppress(OSError):  # ended meanwhile
            match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(match[1]) * 1024 if match else 0
    return total


def folder_bytes(pid: int, folders: tuple[str, ...]) -> int:
    """Memory that files in a sandbox's folders in memory hold, empty ones included, as seen through one of its processes."""
    total = 0
    for folder in folders:
        with contextlib.suppress(OSError):  # the process ended meanwhile, or its root is not ours to see
            usage = os.statvfs(f"/proc/{pid}/root{folder}")
            total += (usage.f_blocks - usage.f_bfree) * usage.f_frsize + (usage.f_files - usage.f_ffree) * _FILE_BYTES
    return total
