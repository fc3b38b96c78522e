"""Processes that meet before jax starts, as threads with real sockets: who is missing, who contradicts, and who is lost is named."""

import concurrent.futures
import socket
import threading
import time

import pytest

from discover_jax.exceptions import ConfigError, HostError, TemporaryError
from discover_jax.hosts import meeting, waiting
from discover_jax.hosts.meeting import expand_nodes, expected_names, meet
from discover_jax.hosts.processes import place_of

NAME = socket.gethostname()


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(meeting, "_HELLO_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "_LOOK_SECONDS", 0.05)


def _meet(port, count, index, seconds=20.0, then=lambda those: those.gather("ranks", those.index, 20)):
    """What `then` returns in this process, or the error."""
    try:
        with meet(f"127.0.0.1:{port}", count, index, seconds) as those:
            return then(those)
    except (HostError, ConfigError) as error:
        return error


def _all(port, *calls):
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(_meet, port, *call) for call in calls]]


def test_values_are_gathered_and_the_port_is_free_for_jax(port):
    def then(those):
        gathered = those.gather("ranks", {"index": those.index}, 20)
        if those.index == 0:
            socket.create_server(("", port)).close()
        return gathered, those.names, those.from_first("a name", f"mine {those.index}", 20)

    found = _all(port, *((3, index, 20.0, then) for index in range(3)))
    names = [f"{NAME} (process {index})" for index in range(3)]
    assert found == [([{"index": index} for index in range(3)], names, "mine 0")] * 3


def test_process_that_never_appears_is_named_by_all(port, monkeypatch):
    first, second = _all(port, (4, 0, 1.0), (4, 1, 1.0))
    for error in (first, second):
        assert isinstance(error, TemporaryError)
        assert f"process 2, process 3 did not appear within 1 s. Present: {NAME} (process 0), {NAME} (process 1)" in str(error)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-08]")
    assert "gpu08 (process 1) did not appear" in str(_meet(port, 2, 0, 0.2))


def test_first_process_that_never_appears(port, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.1)
    error = _meet(port, 2, 1, 0.5)
    assert isinstance(error, TemporaryError)
    assert f"Process 0 did not answer at 127.0.0.1:{port} within 0 s" in str(error)
    assert "refused" in str(error)
    assert f"note: waiting for process 0 at 127.0.0.1:{port}" in capsys.readouterr().err


def test_contradictions_are_told_to_all(port):
    found = _all(port, (3, 0), (3, 1), (2, 1))
    assert all(isinstance(error, ConfigError) for error in found), found
    found = _all(port, (3, 0), (3, 1), (3, 1))
    assert all(isinstance(error, ConfigError) and "--process_id=1" in str(error) for error in found), found


def test_who_comes_after_a_contradiction_hears_of_it(port):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first, contradicting = (pool.submit(_meet, port, count, index) for count, index in ((3, 0), (2, 1)))
        assert isinstance(contradicting.result(), ConfigError)
        late = _meet(port, 3, 2)
        assert str(late) == str(first.result()) == str(contradicting.result())


def test_port_in_use(port):
    with socket.create_server(("", port)):
        error = _meet(port, 2, 0)
    assert isinstance(error, ConfigError)
    assert f"port {port}" in str(error)


def test_strangers_do_not_disturb(port):
    """Something else connects and says nothing, or something else."""

    def knock(text):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port)) as held:
                    held.sendall(text)
                    held.recv(1)
                return
            except OSError:
                time.sleep(0.02)

    threads = [threading.Thread(target=knock, args=(text,)) for text in (b"", b"GET / HTTP/1.1\r\n", b'{"index": 1}\n', b"[1]\n")]
    for thread in threads:
        thread.start()
    found = []
    first = threading.Thread(target=lambda: found.append(_meet(port, 2, 0)))
    first.start()
    for thread in threads:
        thread.join()
    assert _meet(port, 2, 1) == [0, 1]
    first.join()
    assert found == [[0, 1]]


def test_process_that_is_lost_or_silent_is_named_with_the_check(port):
    def then(those):
        if those.index == 2:
            return None  # leaves: the context closes its connection
        if those.index == 3:
            time.sleep(1.5)
        return those.gather("the sandbox", those.index, 0.5)

    found = _all(port, *((4, index, 20.0, then) for index in range(4)))
    for error in found[:2]:
        assert isinstance(error, TemporaryError)
        assert f"{NAME} (process 2) was lost during the check of the sandbox: it closed" in str(error)
        assert f"{NAME} (process 3) was lost during the check of the sandbox: it did not answer in time" in str(error)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("a1,b2", ["a1", "b2"]),
        ("rack[1-2]-ib", ["rack1-ib", "rack2-ib"]),
        ("", []),
    ],
)
def test_node_lists_of_slurm(nodes, names):
    assert expand_nodes(nodes) == names


def test_names_of_the_scheduler_count_only_if_there_is_one_for_each_process(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert expected_names(2) == ["n1", "n2"]
    assert expected_names(16) == []  # several tasks a node
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t-0,t-1")
    assert expected_names(2) == ["t-0", "t-1"]


def test_place_is_what_jax_detects(monkeypatch):
    """Uses a private function of jax: this fails if a new version changes it."""
    assert place_of("a:1", 2, 1) == ("a:1", 2, 1)
    for name, value in {"JOB_ID": "70001", "STEP_NODELIST": "n[1-2]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, count, index = place_of("", 0, -1)
    assert address.startswith("n1:")
    assert (count, index) == (2, 1)
    for name in ("JOB_ID", "STEP_NODELIST"):
        monkeypatch.delenv(f"SLURM_{name}")
    with pytest.raises(ConfigError, match="--coordinator"):
        place_of("", 0, -1)
