"""Checks the isolation before the first program: a probe runs through the real launch path and tries to break out."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from discover_jax.exceptions import SandboxError
from discover_jax.execution.bubblewrap import SCRATCH, WRITABLE, Host, environment
from discover_jax.execution.sandbox import Sandbox
from discover_jax.execution.sandbox_spec import SandboxSpec
from discover_jax.types import Outcome


def _violations(found: dict[str, Any], spec: SandboxSpec, host_uids: set[int]) -> Iterator[str]:
    """One message for each thing that the probe could see or do but must not."""
    if found["seen"]:
        yield f"programs can see {', '.join(found['seen'])}: move the run's folder out of /usr and out of Python's own folders"
    for name in ("write_data", "write_root", "write_python"):
        if found[name] not in ("EROFS", "EACCES", "EPERM"):
            yield f"{name} ended with {found[name]} instead of being refused"
    if found["write_core_pattern"] == "done":
        yield "programs can open /proc/sys/kernel/core_pattern for writing"
    if found["open_init"] not in ("EACCES", "EPERM"):
        yield f"opening the memory of pid 1 ended with {found['open_init']} instead of being refused"
    if not found["read_data"]:
        yield f"the data folder {spec.public} is empty inside"
    if found["socket"] not in ("EPERM", "EACCES"):
        yield f"a network socket ended with {found['socket']} instead of being refused"
    if set(found["interfaces"]) - {"lo"}:
        yield f"network interfaces are visible: {found['interfaces']}"
    if found["capabilities"] != ["0000000000000000"]:
        yield f"programs keep capabilities: {found['capabilities']}"
    if found["no_new_privs"] != "1" or found["seccomp"] != "2":
        yield f"no_new_privs is {found['no_new_privs']} (must be 1), seccomp is {found['seccomp']} (must be 2)"
    if found["uid"] == 0 or 0 in host_uids:
        yield f"programs run as root (uid inside {found['uid']}, on the host {sorted(host_uids)})"
    wanted, names = set(environment(len(spec.cores), SCRATCH)), set(found["environment"]) - {"PWD"}  # which bubblewrap sets itself
    if names - wanted:
        yield f"environment variables are visible: {sorted(names - wanted)}"
    if wanted - names:
        yield f"environment variables are missing: {sorted(wanted - names)}"
    if max(found["pids"]) > 64:
        yield f"other processes are visible: {found['pids']}"
    if found["descriptors"]:
        yield f"file descriptors of the host are open inside: {found['descriptors']}"
    if found["accelerators"]:
        yield f"accelerators are visible: {found['accelerators']}"
    if found["cpus"] != sorted(spec.cores):
        yield f"programs run on CPUs {found['cpus']} instead of the leased {sorted(spec.cores)}"
    if len(found["packages"]) < 2:
        yield "numpy or pandas is missing inside: install both into the environment of this process"


def hidden_paths(host: Host, public: Path, further: Iterable[Path]) -> list[Path]:
    """Paths that programs must not see: the siblings of the public folder (answers, folders of other runs) and `further` (the cache).

    Siblings that contain a folder that is visible on purpose, such as this environment's Python, are left out.
    """
    visible = [Path(path) for path in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/proc", "/dev", *WRITABLE, *host.roots)]
    beside = [path for path in public.parent.iterdir() if path != public]
    return [path for path in (*beside, *further) if not any(path == folder or path in folder.parents for folder in visible)]


def check(spec: SandboxSpec, hidden: Iterable[Path]) -> None:
    """Launches the probe and checks its findings. Takes about 0.1 s.

    Args:
      spec: of any slot.
      hidden: existing paths that programs must not see, such as the answers.

    Raises:
      SandboxError: the sandbox cannot start here or does not isolate; the message says what to do.
    """
    sandbox = None
    try:
        sandbox = Sandbox(spec, Path(__file__).with_name("probe.py"), {"hidden": [str(path) for path in hidden if path.exists()]})
        sandbox.wait_ready()
        with open(f"/proc/{sandbox.pid}/status") as file:
            uids = {int(uid) for line in file if line.startswith("Uid:") for uid in line.split()[1:]}
        with open(f"/proc/{sandbox.pid}/ns/pid") as held:  # while it is open, the kernel does not reuse the inode for another namespace
            inside = os.fstat(held.fileno()).st_ino
            execution = sandbox.run("")
            survivors = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _namespace(pid) == inside]
    except SandboxError as error:
        raise SandboxError(f"bubblewrap cannot isolate programs on this machine. {error} {_remedy(str(error))}") from error
    except OSError as error:
        raise SandboxError(
            f"The sandbox check could not inspect its processes: {error}. It needs a /proc that shows this user's processes, and, as root"
            " of a container, the capability SYS_PTRACE (docker: --cap-add SYS_PTRACE; Kubernetes: securityContext.capabilities)."
        ) from error
    finally:
        if sandbox is not None:
            sandbox.close()
    if execution.outcome is not Outcome.OK or execution.result is None:
        raise SandboxError(f"The sandbox check ended with {execution.outcome.value}: {execution.detail} {execution.stdout[-1500:]}")
    violations = list(_violations(json.loads(execution.result), spec, uids))
    if survivors:
        violations.append(f"a daemon outlived the sandbox (pids {survivors} on the host)")
    if violations:
        raise SandboxError("The sandbox does not isolate, so no program was run:\n" + "\n".join(f"  - {line}" for line in violations))


def _namespace(pid: int) -> int | None:
    """The pid namespace of a host process; None if the process has ended (reaped or not) or may not be inspected."""
    try:
        if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X"):  # the name may be no text
            return None
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return None


def _remedy(said: str) -> str:
    """What to do about a failed launch, given the output of the tools."""
    weaker = (
        "for programs that you trust, execution.backend='unsafe-subprocess' with execution.allow_weaker=True runs them without isolation."
    )
    if "mount proc" in said:
        return (
            "This container masks parts of /proc. In docker or podman, start it with `--security-opt systempaths=unconfined`. In"
            " Kubernetes, run programs on pods without weights and answers (config.execution.backend='ray', launch/gke-programs.yaml), or"
            " set FRESH_PROC=1 for launch/entrypoint.sh, which needs SYS_ADMIN and SYS_PTRACE (docs/security.md, Sandbox in a pod)."
            f" Or, {weaker}"
        )
    if "unshare the mount namespace" in said:
        return (
            "Python or the data are below a folder that only root may enter, and this container may not bind them elsewhere. Install"
            " Python under /opt or /usr/local and keep the run folder outside root's home, or start the container with"
            f" `--cap-add SYS_ADMIN`. Or, {weaker}"
        )
    if any(sign in said for sign in ("namespace", "uid map", "Operation not permitted", "No permissions", "RTM_NEWADDR")):
        return (
            "The kernel or the container forbids user namespaces. In docker or podman: `--security-opt seccomp=unconfined`. On Ubuntu:"
            " `sysctl kernel.apparmor_restrict_unprivileged_userns=0`. On Debian: `sysctl kernel.unprivileged_userns_clone=1`. Everywhere:"
            f" user.max_user_namespaces must not be 0. Or, {weaker}"
        )
    if os.geteuid() == 0 and "Permission denied" in said:
        return "An unprivileged uid cannot read a file that the sandbox needs. Run chmod -R o+rX on the folder named above."
    return f"Or, {weaker}"
