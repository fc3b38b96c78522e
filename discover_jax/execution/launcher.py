"""Runs between the worker and bubblewrap: drops all privileges, then executes the given command.

It is a separate process (`python -I -S launcher.py PLAN`, PLAN in JSON) instead of code between fork and exec, so it shares no memory,
threads or file descriptors with the worker. It uses only the standard library. In this order, it:

  1. joins the sandbox's control groups (cgroup_procs) and restricts itself to its cores (cpus);
  2. as root, if a needed path is below a folder that others cannot enter (a Python in root's home): creates a mount namespace and binds
     these paths into a new tmpfs over /tmp (stage), which no other process sees;
  3. sets limits, empties the capability bounding set, switches to an unprivileged uid (uid), and forbids itself new privileges;
  4. asks the kernel to kill it with the worker, and exits if the worker is already gone;
  5. executes argv with an empty environment and only the file descriptors in `keep`.

bubblewrap must not be started by real root: its program could write /proc/sys/kernel/core_pattern, and process limits would not apply.
"""

import ctypes
import json
import os
import resource
import signal
import sys

STAGE = "/tmp"
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 0x1000, 0x4000, 1 << 18, 2, 4
_CLONE_NEWNS = 0x00020000
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_EINVAL = 22

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, doing: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{doing}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(result, f"mount {source} on {target}")


def _stage(sources: dict[str, str]) -> None:
    """Binds each path of `sources` (name -> path) to /tmp/name in this process's own mount namespace."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare the mount namespace (needs CAP_SYS_ADMIN)")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    # Open them before /tmp is covered: they may be below it.
    opened = {name: os.open(path, os.O_PATH) for name, path in sources.items()}
    _mount("stage", STAGE, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    for name, (path, descriptor) in {name: (sources[name], descriptor) for name, descriptor in opened.items()}.items():
        target = f"{STAGE}/{name}"
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.mkdir(target, 0o755)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        try:
            _mount(f"/proc/self/fd/{descriptor}", target, "", _MS_BIND | _MS_REC)
        except OSError as error:
            raise OSError(error.errno, f"bind {path}: {error.strerror}") from error
        os.close(descriptor)


def _drop_privileges(uid: int) -> None:
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            if ctypes.get_errno() == _EINVAL:  # after the kernel's last capability
                break
            _check(-1, f"drop capability {capability} from the bounding set")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def launch(plan: dict) -> None:
    """Carries out the plan. Does not return; raises OSError on failure."""
    for path in plan["cgroup_procs"]:
        with open(path, "w") as file:
            file.write("0")
    os.sched_setaffinity(0, plan["cpus"])
    if plan["stage"]:
        _stage(plan["stage"])
    for name, value in plan["rlimits"].items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    if plan["uid"] is not None:
        _drop_privileges(plan["uid"])
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "forbid new privileges")
    # Set after the change of uid, which clears it; it survives exec.
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "die with the worker")
    if os.getppid() != plan["parent"]:
        sys.exit(1)
    last = 2
    for descriptor in sorted(plan["keep"]):
        os.closerange(last + 1, descriptor)
        os.set_inheritable(descriptor, True)
        last = descriptor
    os.closerange(last + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.execve(plan["argv"][0], plan["argv"], {})


if __name__ == "__main__":
    try:
        launch(json.loads(sys.argv[1]))
    except OSError as error:
        print(f"launcher: {error}", file=sys.stderr)
        sys.exit(1)
