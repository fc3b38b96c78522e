"""The preflight of two processes on this host: one with faults, and one (slow) where everything is right."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from discover_jax.hosts.exit_codes import LOST, USER_ERROR

ROOT = Path(__file__).parents[2]
# As container runtimes do: files of /proc below other mounts, and /proc/sys read-only.
_MASKED = """
mount --bind /dev/null /proc/timer_list && mount -t tmpfs -o ro tmpfs /proc/irq && mount --bind /proc/sys /proc/sys &&
mount -o remount,bind,ro /proc/sys && exec "$@"
"""


def masked() -> list[str]:
    """The start of a command whose /proc is masked as in a container. Skips the test if this machine forbids that."""
    start = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else []), "sh", "-c", _MASKED, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*start, "true"], check=False, capture_output=True).returncode:
        pytest.skip("cannot make a mount namespace here")
    return start


class Doctors:
    """The doctor in several processes, each with its own faults."""

    def __init__(
        self, workdir: Path, count: int, *options: str, faults: str = "", prefix: tuple[str, ...] = (), options_of=None, absent=None
    ):
        """Starts all processes but `absent`.

        Args:
          workdir, count, options: the run directory, the number of processes, and the options of all.
          faults, prefix: of the last process; see faulty_doctor.py.
          options_of: further options, by process.
          absent: a process that is not started.
        """
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        script = str(Path(__file__).with_name("faulty_doctor.py"))
        self._started = []
        for index in range(count):
            if index == absent:
                continue
            last = index == count - 1
            command = [
                sys.executable,
                script,
                "--config=configs/quickstart.py",
                f"--workdir={workdir}",
                *options,
                *(options_of or {}).get(index, []),
            ]
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"]
            self._started.append(
                subprocess.Popen(
                    [*prefix, *command] if last else command,
                    env={**os.environ, "JAX_PLATFORMS": "cpu", "DISCOVER_TEST_FAULTS": faults if last else ""},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=ROOT,
                )
            )

    def end(self) -> tuple[list[int], list[str]]:
        """The exit codes and the output of each."""
        said = [process.communicate(timeout=280)[0] for process in self._started]
        return [process.returncode for process in self._started], said


@pytest.mark.sandbox
def test_faults_of_one_host_are_found_and_named(tmp_path):
    """All faults at once: each has its own line, which names the host, and both processes end with the same code."""
    doctors = Doctors(
        tmp_path / "run", 2, "--config.mesh.data=4", "--config.train.rows=4", faults="packages,port,lock", prefix=tuple(masked())
    )
    codes, said = doctors.end()
    assert codes == [USER_ERROR, USER_ERROR], said
    name = socket.gethostname()
    fixes = dict(re.findall(r"^FIX\s+(\S+)\s+(.*)$", said[0], re.MULTILINE))
    assert fixes.keys() == {"packages", "lock", "sandbox", "ports", "mesh"}, said[0]
    for check, host in {"packages": 1, "lock": 1, "sandbox": 1, "ports": 0}.items():
        assert fixes[check].startswith(f"{name} (process {host}): "), fixes[check]
    assert re.search(r"here numpy==0\.1; there none", fixes["packages"])
    assert re.search(r"no file locks \(flock: Function not implemented\).*Lustre.*`flock`.*NFS", fixes["lock"])
    assert re.search(r"masks parts of /proc.*docker.*systempaths=unconfined.*Kubernetes.*SYS_ADMIN", fixes["sandbox"])
    assert re.search(rf"does not reach {name} \(process 1\) \(.* port \d+: .*refused.*firewall", fixes["ports"])
    assert re.search(r"4 x 1 x 1 = 4 devices.*2 processes have 2 x 1 = 2\. Set config\.mesh .* 2, or start 4 process", fixes["mesh"])
    (row,) = re.findall(rf"^{name} \(process 1\)  .*", said[0], re.MULTILINE)
    assert re.search(r"FIX differ\b.*FIX none\b.*FIX\b", row)
    assert "Fix the items marked FIX" in said[0].splitlines()[-1]
    assert "FIX" not in said[1]  # one table
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.sandbox
def test_host_that_dies_meanwhile_and_host_that_never_appears_are_temporary(tmp_path, monkeypatch):
    codes, said = Doctors(tmp_path / "run", 2, faults="dies").end()
    assert codes == [LOST, 9], said
    assert re.search(r"^WAIT +hosts +\S+ \(process 1\) was lost during the check of ports: it closed the connection", said[0], re.MULTILINE)
    assert "Run the same command again" in said[0].splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("DISCOVER_TEST_MEET_SECONDS", "1")
    codes, said = Doctors(tmp_path / "run", 2, absent=1).end()
    assert codes == [LOST], said
    assert "error: process 1 did not appear within 1 s" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("invalid", [0, 1])
def test_invalid_config_of_one_host_is_told_to_all(tmp_path, invalid):
    codes, said = Doctors(tmp_path / "run", 2, options_of={invalid: ["--config.train.steps=0"]}).end()
    assert codes == [USER_ERROR, USER_ERROR], said
    assert re.search(
        rf"^FIX +config +\S+ \(process {invalid}\): ConfigError: [^!]*config\.train\.steps must be at least 1", said[0], re.MULTILINE
    )


@pytest.mark.slow
@pytest.mark.sandbox
@pytest.mark.parametrize("count", [1, 2])
def test_everything_is_right(tmp_path, count):
    codes, said = Doctors(tmp_path / "run", count, f"--config.mesh.data={count}", f"--config.train.rows={count}").end()
    assert codes == [0] * count, said
    assert re.search(r"^ok +dry_run +it fits: at most \d", said[0], re.MULTILINE) or "not finished" in said[0], said[0]
    assert re.search(rf"^ok +mesh .*= {count} devices", said[0], re.MULTILINE)
    assert re.search(r"^ok +all-reduce +\d+\.\d+ GB/s" if count > 1 else r"^-- +all-reduce", said[0], re.MULTILINE), said[0]
    assert said[0].splitlines()[-1].startswith(("Everything is ready", "Ready, with warnings"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.sandbox
def test_sandbox_of_a_container_with_a_fresh_proc(tmp_path):
    """The remedy of the message: with SYS_ADMIN, a fresh /proc over the masked one."""
    fresh = [*masked(), "unshare", "--pid", "--fork", "--mount-proc"]
    _, said = Doctors(tmp_path / "run", 1, faults="", prefix=tuple(fresh)).end()
    assert re.search(r"^ok +sandbox ", said[0], re.MULTILINE), said[0]
