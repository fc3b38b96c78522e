"""Several processes on this machine, joined by jax. Results match one process; when one is lost, all end and the run can resume."""

import contextlib
import importlib.util
import json
import math
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from tiny_run import STEPS, command, environment, results, unbroken

from discover_jax.hosts.exit_codes import LOST, USER_ERROR

_MESHES = {2: (2, 1, 1), 4: (2, 2, 1), 1: (1, 1, 1)}


class Hosts:
    """One start of a run by several processes, each with its own log."""

    def __init__(self, root: Path, workdir: Path, count: int, *extra: str, mesh: tuple[int, int, int] | None = None, **variables: str):
        data, expert, tensor = mesh or _MESHES[count]
        options = [f"--config.mesh.data={data}", f"--config.mesh.expert={expert}", f"--config.mesh.tensor={tensor}"]
        options += [f"--config.train.rows={data}", *extra]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._logs = [workdir.with_name(f"{workdir.name}-{time.monotonic_ns()}-{index}.txt") for index in range(count)]
        self.processes = []
        for index, log in enumerate(self._logs):
            joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"] if count > 1 else []
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*command(root, workdir), *options, *joined],
                        env={**environment(root, DISCOVER_TEST_SLOW_DISK="0.3"), "JAX_PLATFORMS": "cpu", **variables},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self, index: int) -> str:
        return self._logs[index].read_text()

    def await_phase(self, name: str, times: int) -> None:
        """Waits until the run enters the phase `name` for the `times`-th time."""
        deadline = time.monotonic() + 300
        while self.said(0).count(f"phase {name}\n") < times:
            assert self.processes[0].poll() is None, self.said(0)
            assert time.monotonic() < deadline, self.said(0)
            time.sleep(0.02)

    def end(self, seconds: float = 300) -> list[int]:
        """Waits for all processes, kills those that do not end, and returns the exit codes."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        for process in self.processes:
            process.kill()
        raise AssertionError("\n\n".join(self.said(index)[-3000:] for index in range(len(self.processes))))


def check_results(found_in: Path, expected_in: Path) -> None:
    """Journal and best/ must be equal to the byte, and sums over devices up to rounding."""
    found, expected = results(found_in), results(expected_in)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "last checkpoint":
            assert found[name]["host"] == value["host"]
        elif isinstance(value, bytes):
            assert found[name] == value, name
        else:
            for row, wanted in zip(found[name], value, strict=True):
                assert row.keys() == wanted.keys()
                for key, number in wanted.items():
                    same = math.isclose(row[key], number, rel_tol=1e-3, abs_tol=1e-5) if isinstance(number, float) else row[key] == number
                    # Gaps are nothing but rounding. The others depend on shapes and devices: each device has its own pages of a prompt.
                    free = ("logprob_gap/", "sample/compilations", "sample/cache_tokens", "update/filled_frac")
                    assert same or key.startswith(free), (name, key)


def strike(hosts: Hosts, victim: int) -> None:
    """Kills one process. All others must end within a minute and say which one was lost and how to resume."""
    hosts.processes[victim].send_signal(signal.SIGKILL)
    codes = hosts.end(60)
    assert codes[victim] == -signal.SIGKILL
    for index, code in enumerate(codes):
        if index != victim:
            # If process 0 is lost, jax may abort before the watcher ends the process.
            assert code == LOST or (victim == 0 and code == -signal.SIGABRT), (index, code, hosts.said(index)[-3000:])
            pid = hosts.processes[victim].pid
            lost = rf"error: process {victim} of {len(codes)} \(host {re.escape(socket.gethostname())}, id {pid}\) was lost"
            restart = r"same command again on all hosts.*resumes at the checkpoint"
            assert re.search(rf"(?s){lost}.*{restart}", hosts.said(index)), hosts.said(index)[-3000:]


@pytest.mark.slow  # tests/hosts has the parts
def test_two_processes_match_one_until_one_is_lost(root, tmp_path):
    """Other tests check that the run then resumes with any number of processes, and run the programs again."""
    expected = (unbroken(root) / "journal.jsonl").read_bytes()
    verdicts = shutil.copytree(unbroken(root) / "cache", tmp_path / "cache")
    hosts = Hosts(root, tmp_path / "run", 2, f"--config.execution.cache={verdicts}")
    hosts.await_phase("learning", 2)  # so the checkpoint of the first step is complete
    strike(hosts, victim=1)
    journal = (tmp_path / "run" / "journal.jsonl").read_bytes()
    assert journal.count(b"\n") >= 6
    assert expected.startswith(journal)
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "victim", "phase"),
    [(2, 0, "sampling"), (2, 1, "saving"), (4, 2, "learning"), (4, 0, "running programs"), (2, 1, "writing"), (2, 0, "committing")],
)
def test_loss_of_any_process_is_reported_and_the_run_resumes(root, tmp_path, count, victim, phase):
    expected = unbroken(root)
    hosts = Hosts(root, tmp_path / "run", count)
    hosts.await_phase(phase, 2)
    strike(hosts, victim)
    assert set(Hosts(root, tmp_path / "run", count).end()) == {0}
    check_results(tmp_path / "run", expected)


@pytest.mark.slow
def test_run_resumes_with_other_process_counts_and_meshes(root, tmp_path):
    expected, workdir = unbroken(root), tmp_path / "run"
    for number, (count, mesh) in enumerate([(2, (1, 2, 1)), (4, (4, 1, 1)), (1, (1, 1, 1)), (2, (2, 1, 1))], start=1):
        last = number == STEPS
        hosts = Hosts(root, workdir, count, mesh=mesh)
        if last:
            assert hosts.end() == [0] * count
        else:
            hosts.await_phase("learning", 2)  # so one step was finished and saved
            for process in hosts.processes:
                process.kill()
            hosts.end()
    check_results(workdir, expected)


@pytest.mark.slow
def test_error_of_one_process_ends_all_and_is_reported_by_all(root, tmp_path):
    unbroken(root)
    hosts = Hosts(root, tmp_path / "run", 2, DISCOVER_TEST_FAIL_IN="learning")
    assert hosts.end(120) == [USER_ERROR, USER_ERROR]
    assert "error: no more" in hosts.said(0)
    assert re.search(r"error: process 0 of 2 .*failed: RunError: no more", hosts.said(1))


@pytest.mark.slow
def test_damaged_checkpoint_is_set_aside_by_all(root, tmp_path):
    expected, workdir = unbroken(root), tmp_path / "run"
    hosts = Hosts(root, workdir, 2)
    hosts.await_phase("learning", 3)
    for process in hosts.processes:
        process.kill()
    hosts.end()
    (host,) = (workdir / "checkpoints" / "1").glob("host/metadata")
    content = json.loads(host.read_bytes())
    content["arrays"] = dict.fromkeys(content["arrays"], "0")
    host.write_text(json.dumps(content))
    hosts = Hosts(root, workdir, 2)
    assert hosts.end() == [0, 0]
    assert re.search(r"(?s)Checkpoint 1 is damaged.*\bfrom checkpoint 0\b", hosts.said(0))
    check_results(workdir, expected)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_two_processes_whose_programs_run_on_a_ray_cluster(root, tmp_path):
    """The first process submits all programs. Only the line on isolation shows where they ran."""
    expected = results(unbroken(root))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # so that ray writes none to the user's home
    flags = ["--config.execution.backend=ray", "--config.execution.ray_address=local"]
    hosts = Hosts(root, tmp_path / "run", 2, *flags, **token)
    assert hosts.end() == [0, 0]
    found = results(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name in found.keys() - {"best/disclosure.json"}:
        assert not isinstance(found[name], bytes) or found[name] == expected[name], name
    isolation = json.loads((tmp_path / "run" / "disclosure.json").read_text())["isolation"]
    assert isolation["isolated"]
    assert [line.split(";")[0] for line in isolation["lines"]] == ["ray, 2 slots"]
