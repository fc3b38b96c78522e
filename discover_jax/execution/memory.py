"""Limits the memory of a sandbox by a control group (v1 or v2) if possible, otherwise by process limits and regular measurements.

Only a control group limits the total of all processes: anonymous memory, shared memory and the files of the scratch folder. New groups are
created below the group of this process, so that external limits still apply. CPU time is measured by the same means.
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
"""Kernel memory of a file in memory, in addition to its content. Measured on Linux 6.18: 960, or 1480 with a name of 245 letters."""
_CLOSE_BYTES = 1 << 20
"""A group counts as full when at most this much is left: the kernel kills at the first allocation that does not fit, up to 32 KiB."""
_REMOVE_TRIES = 100  # 10 ms apart
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cgroups:
    """Where control groups can be created: `version` 1 or 2, and the parent folders (in v2 `memory` and `pids` are the same; `pids` may be
    None). `cpu` is for v1, where the CPU time of a group is counted in a hierarchy of its own; None: it is not counted."""

    version: int
    memory: Path
    pids: Path | None
    cpu: Path | None = None

    @property
    def folders(self) -> set[Path]:
        return {folder for folder in (self.memory, self.pids, self.cpu) if folder is not None}

    def describe(self) -> str:
        moved = self.version == 2 and (self.memory / _HOST).is_dir()
        return f"control group v{self.version}" + (f" (below {self.memory}, whose processes moved to {_HOST} in it)" if moved else "")


def own_folder(controller: str) -> Path | None:
    """The folder of this process's control group in a v1 hierarchy ("memory", "pids", "cpuacct") or in v2 ("")."""
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
    """Tries to create a group that has the file `needed`, then removes it."""
    probe = folder / f"{_PREFIX}-{os.getpid()}-probe"
    try:
        probe.mkdir()
    except OSError:  # no permission, read-only, or child groups are not allowed: the caller falls back and reports it
        return False
    try:
        return os.access(probe / needed, os.W_OK)
    finally:
        probe.rmdir()


def _usable(controller: str, needed: str) -> Path | None:
    """This process's folder in a v1 hierarchy, if it can create groups there."""
    folder = own_folder(controller)
    return folder if folder and _can_make_groups(folder, needed) else None


def find_cgroups() -> Cgroups | None:
    """Where this process can create groups that limit memory; None if nowhere."""
    memory = own_folder("memory")
    if memory and _can_make_groups(memory, "memory.limit_in_bytes"):
        return Cgroups(1, memory, _usable("pids", "pids.max"), _usable("cpuacct", "cpuacct.usage"))
    own = own_folder("")
    if own is None:
        return None
    if own.name == _HOST:  # created by an earlier run, see _divide
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
    """Controllers that a v2 group can enable for its children; empty above the hierarchy's root or if the file is not readable."""
    try:
        return (folder / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _nearest_with_memory(own: Path) -> Path | None:
    """The nearest group, ours or an ancestor, with the memory controller. Limits on this process are set there or further up."""
    return next((folder for folder in (own, *own.parents) if "memory" in _controllers(folder)), None)


def _divide(folder: Path, controllers: list[str], *, move: bool) -> None:
    """Tries to enable a v2 group's controllers for its children; `_can_make_groups` checks whether it worked.

    The kernel allows this only for a group without processes of its own ("no internal processes" rule). `move` is for the group that this
    process is in: all its processes move to a child group without limits. The limits of the old group, now the parent, still apply.
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
        except OSError:  # no permission to move one of the processes
            return


def _kill_at_once(folder: Path) -> bool:
    """Kills all processes of a group in one step, so that none can escape by forking. False if the kernel cannot (v1, or before 5.14)."""
    if not (folder / "cgroup.kill").exists():
        return False
    (folder / "cgroup.kill").write_text("1")
    return True


def _end_processes(folder: Path) -> None:
    """Kills the remaining processes of a group."""
    if _kill_at_once(folder):
        return
    for pid in (folder / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def remove_stale(cgroups: Cgroups) -> None:
    """Removes groups of processes that ended without cleaning up, and kills their remaining processes."""
    for parent in cgroups.folders:
        for folder in parent.glob(f"{_PREFIX}-*"):
            match = re.fullmatch(rf"{_PREFIX}-(\d+)-.*", folder.name)
            if match and not os.path.exists(f"/proc/{match[1]}"):
                with contextlib.suppress(OSError):  # another run is removing it too, or a process is still ending
                    _end_processes(folder)
                    folder.rmdir()


class Group:
    """The control group of one sandbox. The constructor creates it; `remove` removes it."""

    def __init__(self, cgroups: Cgroups, name: str, memory_bytes: int, processes: int) -> None:
        """Creates the group. Raises OSError if that fails."""
        self._version, self._memory_bytes = cgroups.version, memory_bytes
        folder_name = f"{_PREFIX}-{os.getpid()}-{name}"
        self._memory = cgroups.memory / folder_name
        self._cpu = cgroups.cpu / folder_name if cgroups.cpu else None
        self._folders = [parent / folder_name for parent in cgroups.folders]
        for folder in self._folders:
            folder.mkdir()
        if cgroups.version == 1:
            self._write("memory.limit_in_bytes", memory_bytes)
            self._write("memory.memsw.limit_in_bytes", memory_bytes, optional=True)  # missing without swap accounting
        else:
            self._write("memory.max", memory_bytes)
            self._write("memory.swap.max", 0, optional=True)
            self._write("memory.oom.group", 1)
        if cgroups.pids:
            (cgroups.pids / folder_name / "pids.max").write_text(str(processes + 16))  # plus bubblewrap's own and zombies

    def _write(self, name: str, value: int, optional: bool = False) -> None:
        path = self._memory / name
        if not optional or path.exists():
            path.write_text(str(value))

    @property
    def procs_files(self) -> list[str]:
        """Files into which a process writes "0" to join."""
        return [str(folder / "cgroup.procs") for folder in self._folders]

    def exceeded(self) -> bool:
        """Whether the kernel killed a process of this group because the group reached its memory limit.

        Raises:
          SandboxError: the kernel killed one although the limit was never reached. `oom_kill` also counts kills because the container or
            the machine ran out of memory; these are not the program's fault.
        """
        if not self._count("memory.oom_control" if self._version == 1 else "memory.events", "oom_kill"):
            return False
        if self._version == 1:
            # Not `failcnt`: if both limits are equal, the memory+swap limit fails first, and its count stays 0 on Linux 6.18.
            most = max(self._count(name) for name in ("memory.max_usage_in_bytes", "memory.memsw.max_usage_in_bytes"))
            reached = most >= self._memory_bytes - _CLOSE_BYTES
        else:  # not `max`, which also counts cases where pages could be reclaimed
            reached = self._count("memory.events", "oom") > 0
        if not reached:
            raise SandboxError(
                "The kernel killed a program's process for lack of memory before the program reached its own limit: the container or the"
                " machine ran out of memory. Lower execution.workers or execution.memory_gib, or give the run more memory."
            )
        return True

    def cpu_seconds(self) -> float | None:
        """CPU time of all processes that have been in it; None if the kernel does not count it (v1 without a folder for it)."""
        if self._cpu is not None:
            return int((self._cpu / "cpuacct.usage").read_text()) / 1e9
        return self._count("cpu.stat", "usage_usec") / 1e6 if (self._memory / "cpu.stat").exists() else None

    def _count(self, file: str, name: str = "") -> int:
        """A kernel counter: the only number of a file, or the one after `name`; 0 if it is missing."""
        path = self._memory / file
        match = re.search(rf"^{name + ' ' if name else ''}(\d+)$", path.read_text() if path.exists() else "", re.MULTILINE)
        return int(match[1]) if match else 0

    def kill(self) -> None:
        """Kills all processes of the group in one step, whatever their pid namespace. Does nothing if the kernel cannot."""
        _kill_at_once(self._memory)

    def remove(self) -> None:
        """Removes the group. Its processes must have ended; waits a moment for the kernel to notice.

        A group that stays busy is logged and left to `remove_stale`.
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
                _log.warning("Cannot remove the control group %s: it is still busy (processes: %s).", folder, ", ".join(left) or "none")


def _children(pid: int) -> list[int]:
    children = []
    with contextlib.suppress(OSError):  # ended meanwhile
        for task in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return children


def tree_bytes(pid: int) -> int:
    """Memory of a process and its descendants in bytes; shared pages count once (PSS)."""
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        waiting += _children(process)
        with contextlib.suppress(OSError):  # ended meanwhile
            match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(match[1]) * 1024 if match else 0
    return total


def tree_cpu_seconds(pid: int) -> float:
    """CPU time of a process, its descendants, and those that they have reaped, in seconds; in steps of a clock tick (10 ms)."""
    ticks, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        waiting += _children(process)
        with contextlib.suppress(OSError):  # ended meanwhile
            after_name = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()  # the name may be no text
            ticks += sum(map(int, after_name[11:15]))  # utime, stime, cutime, cstime
    return ticks / os.sysconf("SC_CLK_TCK")


def folder_bytes(pid: int, folders: tuple[str, ...]) -> int:
    """Memory of the files in a sandbox's in-memory folders, including empty files, measured through one of its processes."""
    total = 0
    for folder in folders:
        with contextlib.suppress(OSError):  # the process ended meanwhile, or its root may not be read
            usage = os.statvfs(f"/proc/{pid}/root{folder}")
            total += (usage.f_blocks - usage.f_bfree) * usage.f_frsize + (usage.f_files - usage.f_ffree) * _FILE_BYTES
    return total
