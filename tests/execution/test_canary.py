"""The canary reports each violation separately, and no program starts after it has found one."""

import copy
import io
import json
import multiprocessing
import os
import re
import runpy
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_competition import LIMITS

from discover_jax.exceptions import SandboxError
from discover_jax.execution import Executor, canary
from discover_jax.execution.sandbox import Sandbox
from discover_jax.execution.sandbox_spec import SandboxSpec

pytestmark = pytest.mark.sandbox


@pytest.fixture(scope="module")
def found(spec: SandboxSpec) -> dict[str, Any]:
    """The facts that the probe reports from a real sandbox."""
    probe = Path(canary.__file__).with_name("probe.py")
    box = Sandbox(spec, probe, {"hidden": []})
    try:
        box.wait_ready()
        execution = box.run("")
    finally:
        box.close()
    return json.loads(execution.result or b"")


def test_real_sandbox_has_no_violation_and_every_fact_is_checked(found, spec):
    read: set[str] = set()

    class Facts(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    assert list(canary._violations(Facts(found), spec, {60600})) == []
    assert read == set(found)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seen", ["/run/private"], "/run/private"),
        ("write_data", "done", "write_data.*done"),
        ("write_root", "done", "write_root.*done"),
        ("write_python", "ENOSPC", "write_python.*ENOSPC"),
        ("write_core_pattern", "done", "core_pattern"),
        ("open_init", "done", "pid 1.*done"),
        ("read_data", 0, "empty"),
        ("socket", "ECONNREFUSED", "socket.*ECONNREFUSED"),
        ("interfaces", ["lo", "eth0"], "interfaces.*eth0"),
        ("capabilities", ["0000000000000000", "0000000000200000"], "capabilities.*200000"),
        ("no_new_privs", "0", r"no_new_privs.*\b0\b"),
        ("seccomp", "0", r"seccomp.*\b0\b"),
        ("uid", 0, r"root.*\b0\b"),
        ("pids", [1, 2, 4711], "processes.*4711"),
        ("environment+", "AWS_SECRET_ACCESS_KEY", "variables.*'AWS_SECRET_ACCESS_KEY'"),
        ("environment-", "OMP_WAIT_POLICY", "variables.*'OMP_WAIT_POLICY'"),
        ("descriptors", ["/srv/weights"], "descriptors.*/srv/weights"),
        ("accelerators", ["/dev/nvidia0"], "accelerators.*nvidia0"),
        ("cpus", [0, 1, 2, 3], r"CPUs.*\[0, 1, 2, 3\]"),
        ("packages", ["numpy"], "pandas"),
    ],
)
def test_each_fact_by_itself_is_a_violation(found, spec, name, value, said):
    facts = copy.deepcopy(found)
    if name == "environment+":
        facts["environment"].append(value)
    elif name == "environment-":
        facts["environment"].remove(value)
    else:
        assert facts[name] != value
        facts[name] = value
    (violation,) = canary._violations(facts, spec, {60600})
    assert re.search(said, violation)


def test_root_on_the_host_is_a_violation(found, spec):
    (violation,) = canary._violations(found, spec, {60600, 0})
    assert "[0, 60600]" in violation


def test_a_daemon_that_stays_is_a_violation(spec, monkeypatch):
    """Simulates that this process, which survives, is in the sandbox's pid namespace."""
    real, namespaces = os.fstat, []

    def fstat(descriptor):
        found = real(descriptor)
        namespaces.append(found.st_ino)
        return found

    monkeypatch.setattr(canary.os, "fstat", fstat)
    monkeypatch.setattr(canary, "_namespace", lambda pid: namespaces[-1] if pid == os.getpid() else None)
    with pytest.raises(SandboxError, match=r"(?s)daemon.*\[\d+\]"):
        canary.check(spec, [])


@pytest.fixture
def leak(monkeypatch):
    """A machine on which the canary can escape."""

    def check(*_):
        raise SandboxError("The sandbox does not hold, so no program was run:\n  - programs can see /answers")

    monkeypatch.setattr(canary, "check", check)


def _running() -> tuple[set[str], set[str]]:
    return {child.name for child in multiprocessing.active_children()}, {thread.name for thread in threading.enumerate()}


def test_executor_does_not_start_if_the_canary_escapes(task, tmp_path, leak):
    before = _running()
    with pytest.raises(SandboxError, match="/answers"):
        Executor([task], LIMITS, workers=1, cache_dir=tmp_path)
    assert _running() == before


def test_run_does_not_start_if_the_canary_escapes(tmp_path, leak, monkeypatch):
    """It is refused before anything is written and before the policy is loaded."""
    from discover_jax import main
    from discover_jax.config import validate

    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "quickstart.py"))["get_config"]()
    before = _running()
    with pytest.raises(SandboxError, match="/answers"):
        main.run(validate(config), tmp_path / "run")
    assert _running() == before
    assert not (tmp_path / "run" / "journal.jsonl").exists()
    assert not (tmp_path / "run" / "disclosure.json").exists()
