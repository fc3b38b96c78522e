"""An imitation of a container of Kubernetes: own mount and process namespaces, masked paths in /proc, containerd's capabilities.

Run as a program, it checks the sandbox: python tests/launch/pod.py FOLDER. Prints how programs are isolated; the code is 2 if they are
not.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_CAPABILITIES = tuple(
    "chown dac_override fsetid fowner mknod net_raw setgid setuid setfcap setpcap net_bind_service sys_chroot kill audit_write".split()  # noqa: SIM905
)
"""Those of a container without `capabilities` in its manifest (containerd, oci/spec.go)."""
# As containerd does (oci/spec.go): these are hidden, and those below are read-only.
_MASK = """
for path in acpi asound scsi; do if [ -d /proc/$path ]; then mount -t tmpfs -o ro tmpfs /proc/$path; fi; done
for path in kcore keys latency_stats timer_list timer_stats sched_debug; do
  if [ -e /proc/$path ]; then mount --bind /dev/null /proc/$path; fi
done
for path in bus fs irq sys sysrq-trigger; do
  if [ -e /proc/$path ]; then mount --bind /proc/$path /proc/$path && mount -o remount,bind,ro /proc/$path; fi
done
"""


def possible() -> bool:
    """Whether this process can imitate a container."""
    return os.geteuid() == 0 and all(map(shutil.which, ("unshare", "mount", "setpriv")))


def command(argv: Sequence[str], *, added: Sequence[str] = (), masked: bool = True) -> list[str]:
    """The command that runs `argv` in such a container, for a process of root.

    Args:
      argv: the container's command.
      added: capabilities in addition to the usual ones, as in a manifest, in lower case.
      masked: whether parts of /proc are masked. In privileged containers they are not.
    """
    bounding = ",".join(["-all", *(f"+{name}" for name in (*_CAPABILITIES, *added))])
    inside = f'set -e\nmount -t proc proc /proc\n{_MASK if masked else ""}exec setpriv --bounding-set {bounding} --inh-caps -all "$@"'
    # A new session: the sandbox's cleanup signals process groups.
    return ["setsid", "--wait", "unshare", "-m", "-p", "-f", "--kill-child", "--propagation", "private", "sh", "-c", inside, "sh", *argv]


def _check_sandbox(folder: Path) -> int:
    sys.path.insert(0, str(Path(__file__).parents[1] / "execution"))
    from tiny_competition import LIMITS, make

    from discover_jax.exceptions import SandboxError
    from discover_jax.execution import Executor, sandbox_spec

    sandbox_spec.PRELOAD = ()  # saves seconds
    try:
        with Executor([make(folder)], LIMITS, workers=1, cache_dir=folder / "cache") as executor:
            print(f"isolated: {executor.describe()}")
    except SandboxError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_check_sandbox(Path(sys.argv[1])))
