"""The sandbox in an imitation of a pod: it needs an unmasked /proc, and each remedy of docs/security.md works."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize("added", [[], ["sys_resource"]], ids=["without the capability", "with it"])
def test_locked_memory_of_a_tpu_pod(tmp_path, added):
    status = Path("/proc/self/status").read_text()
    if added and not int(status.split("CapEff:")[1].split()[0], 16) >> 24 & 1:
        pytest.skip("this machine's root has no CAP_SYS_RESOURCE")
    (tmp_path / "python").write_text("#!/bin/bash\nulimit -l\n")
    (tmp_path / "python").chmod(0o755)
    argv = pod.command(["bash", "-c", f"ulimit -l 64; exec {_LAUNCH / 'entrypoint.sh'}"], added=added)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PREFLIGHT": "0", "LOCKED_MEMORY": "68719476736"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=60)
    if added:
        assert (done.returncode, done.stdout) == (0, "68719476736\n"), done.stderr
    else:
        assert done.returncode == 2
        assert "SYS_RESOURCE" in done.stderr


# As KubeRay starts the pods of launch/gke-programs.yaml: the head, then a CPU pod with the manifest's command before `ray start`.
_CLUSTER = """
set -e
ray start --head --port=6399 --num-cpus=0 --include-dashboard=false --disable-usage-stats
{pod} > $RAY_TMPDIR/pod.txt 2>&1 &
for probe in 6399 6398; do
  for _ in $(seq 60); do if (exec 3<> /dev/tcp/127.0.0.1/$probe) 2> /dev/null; then break; fi; sleep 1; done
done
exec {entrypoint} --config=configs/quickstart.py --config.execution.backend=ray --config.execution.cores=1
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_an_unprivileged_process_sends_programs_to_a_cpu_pod():
    manifest = next(yaml.safe_load_all((_LAUNCH / "gke-programs.yaml").read_text()))
    (container,) = manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    added = [name.lower() for name in container["securityContext"]["capabilities"]["add"]]
    start = f"{shlex.join(container['command'])} && ray start --address=127.0.0.1:6399 --num-cpus=1 --node-manager-port=6398 --block"
    script = _CLUSTER.format(pod=shlex.join(pod.command(["bash", "-c", start], added=added)), entrypoint=_LAUNCH / "entrypoint.sh")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "ab" * 24,
        "RAY_HEAD": "127.0.0.1:6399",
        "PREFLIGHT": "0",
        "MODULE": "discover_jax.doctor",
        "JAX_PLATFORMS": "cpu",
    }
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short, since it holds sockets
        # A process namespace of its own: all of ray ends with it.
        argv = ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "bash", "-c", script]
        environment["RAY_TMPDIR"] = folder
        done = subprocess.run(argv, cwd=_LAUNCH.parent, env=environment, capture_output=True, text=True, check=False, timeout=400)
        pod_said = Path(folder, "pod.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + pod_said
    assert re.search(r"^ok +sandbox .*\bray, 1 slots\b.*bubblewrap", done.stdout, re.MULTILINE)
