"""A small version of the load benchmark: all outcomes as expected, and nothing left behind. Also, that it detects leaks."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sandbox.py"


@pytest.mark.slow  # test_pool and test_outcomes test each kind by itself
def test_programs_of_every_kind_leave_nothing_behind():
    command = [sys.executable, str(SCRIPT), "--programs=18", "--preload=none"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    result = json.loads(done.stdout)
    assert (result["wrong"], result["grown"], result["left"]) == ({}, {}, {})
    assert done.returncode == 0, done.stderr
    assert result["programs"] == 18
    assert {"main", "execution-0"} <= result["held"].keys()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_of_the_sandbox", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_detects_leaks_of_a_worker(script):
    """A child of this process stands in for the worker. It leaks a descriptor, a thread, a zombie and memory."""
    leak = (
        "import os, sys, threading, time\ninput()\nopened = os.open('/dev/null', 0)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "if os.fork() == 0:\n    os._exit(0)\ndata = bytearray(b'x') * 40_000_000\nprint('leaked', flush=True)\ntime.sleep(60)\n"
    )
    worker = subprocess.Popen([sys.executable, "-S", "-c", leak], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdin is not None
        assert worker.stdout is not None
        time.sleep(0.5)  # until the interpreter has started
        early = script._held({"worker": worker.pid}, None)
        assert script._growth(early, early, 0) == {}
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "leaked\n"
        late = script._held({"worker": worker.pid}, None)
    finally:
        worker.kill()
        worker.communicate()
    found = script._growth(early, late, 16 << 20)
    assert 30_000_000 < found.pop("worker bytes") < 60_000_000
    assert found == {"worker descriptors": 1, "worker threads": 1, "worker processes": 1}


def test_benchmark_detects_what_is_left_at_the_end(script, tmp_path):
    """An orphaned sandbox is found by its command line. Its zombie child, a file and a thread of this process are found, too."""
    mark = f'"result_bytes": {os.getpid()}99'
    before = script._after_close(tmp_path, mark)
    waiting = "import sys; sys.stdin.read()"
    orphan = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-S', '-c', {waiting!r}, sys.argv[1]])\nprint(flush=True)\n"
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    with subprocess.Popen([sys.executable, "-c", orphan, mark], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)  # it has ended but was not collected: a zombie
        (tmp_path / "left").touch()
        thread.start()
        after = script._after_close(tmp_path, mark)
        ended.set()
    found = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert found == {"sandboxes": 1, "processes": 1, "descriptors": 2, "temporary_files": 1, "threads": 1}
