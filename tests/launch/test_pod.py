"""The sandbox in an imitation of a pod: it needs an unmasked /proc, and each remedy of docs/security.md works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import pod

_LAUNCH = Path(__file__).parents[2] / "launch"
_RIGHTS = ["sys_admin", "sys_ptrace"]
_CHECK = str(Path(__file__).with_name("pod.py"))

pytestmark = [pytest.mark.sandbox, pytest.mark.skipif(not pod.possible(), reason="needs root, unshare, mount and setpriv")]


def _run(folder: Path, *, added=(), masked=True, fresh=False):
    """Checks the sandbox in a pod, with the entrypoint's fresh /proc if asked for."""
    # The entrypoint starts `$PYTHON -m $MODULE FLAGS`; this one checks the sandbox instead.
    python = folder / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {_CHECK} {folder}\n")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "PREFLIGHT": "0", "FRESH_PROC": "1" if fresh else "0"}
    argv = pod.command([str(_LAUNCH / "entrypoint.sh")], added=added, masked=masked)
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_masked_proc_stops_the_sandbox_and_the_message_says_what_to_change(tmp_path):
    done = _run(tmp_path, added=_RIGHTS)
    assert done.returncode == 2, done.stdout
    assert "mount proc" in done.stderr
    for named in ("Kubernetes", "FRESH_PROC=1", "config.execution.backend='ray'", "docs/security.md", "systempaths=unconfined"):
        assert named in done.stderr, named


def test_a_pod_without_rights_cannot_start_a_sandbox(tmp_path):
    done = _run(tmp_path)
    assert done.returncode == 2, done.stdout
    assert "bubblewrap cannot isolate programs" in done.stderr


def test_a_fresh_proc_at_the_entrypoint_lets_the_sandbox_start(tmp_path):
    done = _run(tmp_path, added=_RIGHTS, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "isolated: " in done.stdout


def test_a_fresh_proc_needs_a_capability(tmp_path):
    done = _run(tmp_path, fresh=True)
    assert done.returncode == 2
    assert "CAP_SYS_ADMIN" in done.stderr


def test_as_root_the_check_of_the_sandbox_needs_to_inspect_other_users_processes(tmp_path):
    done = _run(tmp_path, added=["sys_admin"], fresh=True)
    assert done.returncode == 2
    assert "SYS_PTRACE" in done.stderr


def test_a_privileged_pod_needs_nothing_else(tmp_path):
    done = _run(tmp_path, added=_RIGHTS, masked=False)
    assert done.returncode == 0, done.stderr
