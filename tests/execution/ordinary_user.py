"""Starts a command as an ordinary user. Requires root: `python tests/execution/ordinary_user.py -- python -m pytest tests/execution`.

Some folders may be closed to other users, such as a Python in root's home. The command gets its own mount namespace in which they are open.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

UID = 60599
_REPOSITORY = Path(__file__).resolve().parents[2]


def possible() -> bool:
    """Whether this process can do that."""
    return os.geteuid() == 0 and all(map(shutil.which, ("unshare", "mount", "setpriv")))


def command(argv: list[str]) -> list[str]:
    """The command that runs `argv` as the ordinary user, for a process of root."""
    needed = sorted(
        {
            sys.prefix,
            sys.base_prefix,
            *(str(_REPOSITORY / name) for name in ("discover_jax", "configs", "tests", "benchmarks", "pyproject.toml")),
        }
    )
    closed = sorted({str(p) for path in needed for p in Path(path).parents if not p.stat().st_mode & 0o001})
    outermost = [path for path in closed if not any(path.startswith(other + "/") for other in closed)]
    lines = ["set -e"]
    for index, path in enumerate(needed, start=3):
        lines.append(f"exec {index}< '{path}'")
    lines += [f"mount -t tmpfs -o mode=755 tmpfs '{path}'" for path in outermost]
    for index, path in enumerate(needed, start=3):
        if any(path.startswith(other + "/") for other in outermost):
            make = f"mkdir -p '{path}'" if os.path.isdir(path) else f"mkdir -p '{os.path.dirname(path)}'; touch '{path}'"
            lines.append(f"{make}; mount --no-canonicalize --rbind /proc/self/fd/{index} '{path}'")
    shut = " ".join(f"{index}<&-" for index in range(3, 3 + len(needed)))
    lines.append(f'exec setpriv --reuid {UID} --regid {UID} --clear-groups "$@" {shut}')
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", "\n".join(lines), "sh", *argv]


def environment(home: str) -> dict[str, str]:
    """The environment for such a command, without root's variables."""
    return {"PATH": os.environ["PATH"], "HOME": home, "PYTHONPATH": str(_REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}


def main() -> int:
    if not possible():
        print("needs root, unshare, mount and setpriv", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        os.chown(home, UID, UID)
        return subprocess.run(command(sys.argv[sys.argv.index("--") + 1 :]), env=environment(home), cwd=_REPOSITORY, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
