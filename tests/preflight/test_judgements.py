"""What the preflight concludes from numbers: cores, mesh, bandwidth, memory, locks, and the exit code."""

import concurrent.futures
import fcntl
import socket

import pytest

from discover_jax.hosts.exit_codes import LOST, USER_ERROR
from discover_jax.hosts.meeting import meet
from discover_jax.preflight.findings import Finding, Level, conclusion, exit_code, from_row, lines_of
from discover_jax.preflight.judge_devices import findings_of, judge_bandwidth, judge_mesh
from discover_jax.preflight.one_host import compare, judge_cores
from discover_jax.preflight.shared_folder import check_locks, check_shared, probe_folder
from discover_jax.runs import lock

NAMES = ["a (process 0)", "b (process 1)"]


def _devices(count, kind="NVIDIA H200", platform="gpu", **more):
    return {"devices": {"count": count, "kind": kind, "platform": platform}, "mode": "TOGETHER", "ended": 0} | more


@pytest.mark.parametrize(
    ("cores", "of_host", "of_program", "level"),
    [
        (1, 64, 1, Level.FIX),  # bound to one core
        (1, 1, 1, Level.OK),
        (1, 1, 2, Level.WARNING),
        (2, 64, 4, Level.WARNING),
        (16, 64, 2, Level.WARNING),
        (64, 64, 2, Level.OK),
    ],
)
def test_cores(cores, of_host, of_program, level):
    found = judge_cores(cores, of_host, of_program, runs_programs=True)
    assert found.level is level
    assert found.cell == f"{cores} of {of_host}"
    if level is Level.FIX:
        assert f"{cores} of {of_host}" in found.text
        assert "--cpus-per-task" in found.text
    if level is Level.WARNING:
        assert f" {cores} " in found.text


def test_cores_do_not_matter_for_programs_that_run_elsewhere():
    assert judge_cores(2, 2, 4, runs_programs=False).level is Level.OK


@pytest.mark.parametrize(
    ("shape", "counts", "says"),
    [
        ((2, 8, 1), (8, 8), None),
        ((1, 8, 1), (8, 8), r"= 8 devices .* 2 x 8 = 16\. Set config.mesh so that the product is 16, or start 1 process"),
        ((4, 8, 1), (8, 8), r"= 32 devices .* 16\. .*or start 4 processes with 8 devices each"),
        ((2, 8, 1), (1, 1), r"= 16 devices .* 2 x 1 = 2\. .*one GPU a process"),
        ((3, 4, 1), (8, 4), r"different devices: 8 \+ 4"),
        ((1, 4, 1), (8,), None),
        ((1, 9, 1), (8,), r"= 9 devices .* this host has 8"),
    ],
)
def test_mesh(shape, counts, says):
    import re

    found = judge_mesh(shape, [_devices(count) for count in counts], NAMES[: len(counts)])
    assert found.level is (Level.FIX if says else Level.OK), found
    assert re.search(says or "devices", found.text), found.text


def test_mesh_of_unlike_hosts():
    found = judge_mesh((2, 8, 1), [_devices(8), _devices(8, "NVIDIA H100 80GB HBM3")], NAMES)
    assert found.level is Level.FIX
    assert "H100" in found.text
    assert judge_mesh((2, 8, 1), [_devices(8), {"ended": 1, "mode": "TOGETHER"}], NAMES).level is Level.SKIPPED


@pytest.mark.parametrize(
    ("results", "level", "says"),
    [
        ([_devices(8, all_reduce=340.0), _devices(8, all_reduce=335.0)], Level.OK, "335.00 GB/s"),
        ([_devices(8, all_reduce=4.2), _devices(8, all_reduce=4.1)], Level.WARNING, "4.10 GB/s over all devices (bus bandwidth"),
        ([_devices(8, all_reduce=4.2)], Level.OK, "4.20"),  # one host: PCIe
        ([_devices(1, "cpu", "cpu", all_reduce=0.4)] * 2, Level.OK, "0.40 GB/s"),
        ([_devices(8, all_reduce=1.0), _devices(8)], Level.TEMPORARY, "hangs"),
        ([_devices(8, all_reduce=1.0), _devices(8, ended=-6)], Level.TEMPORARY, "code -6"),
        ([_devices(8, all_reduce=1.0), _devices(8, error="NCCL: no route")], Level.FIX, "NCCL: no route"),
        ([_devices(8, mode="APART"), _devices(8, mode="APART")], Level.SKIPPED, "reach"),
        ([_devices(1, all_reduce=None)], Level.SKIPPED, "one device"),
    ],
)
def test_bandwidth(results, level, says):
    results = [result if result["ended"] != 0 or "all_reduce" in result else result | {"ended": None} for result in results]
    found = judge_bandwidth(results, 100)
    assert found.level is level
    assert says in found.text
    if level is Level.WARNING:
        assert "less than 10" in found.text
        assert "TCP" in found.text


@pytest.mark.parametrize(
    ("more", "level", "says"),
    [
        ({"all_reduce": 1.0, "dry_run": {"fits": True, "total": 6e10, "memory": 14e10}}, Level.OK, "60.0 of 140.0 GB"),
        ({"all_reduce": 1.0, "dry_run": {"fits": False, "total": 15e10, "memory": 14e10}}, Level.FIX, "150.0 of 140.0 GB"),
        ({"all_reduce": 1.0, "compiling": "update: gradient"}, Level.WARNING, "update: gradient"),
        ({"all_reduce": 1.0, "compiling": "update: gradient", "error": "axis 'kv_heads' of size 8"}, Level.FIX, "kv_heads"),
        ({}, Level.SKIPPED, "skipped"),
    ],
)
def test_dry_run(more, level, says):
    if "dry_run" in more:
        more["dry_run"] |= {"phase": "update", "function": "gradient", "complaint": ""}
    _, found = findings_of(_devices(8) | more, 100)
    assert found.level is level
    assert says in found.text


def test_facts_that_differ():
    first = {"packages": ["3.11.7", "numpy==2.1"], "config": {"seed": 0, "groups": 8}, "driver": "580.65.06"}
    other = {"packages": ["3.11.7", "numpy==2.0"], "config": {"seed": 1, "groups": 8}, "driver": "570.1"}
    of_first, of_other = compare([first, other])
    assert {finding.level for finding in of_first} == {Level.OK}
    levels = {finding.check: finding.level for finding in of_other}
    assert levels == {"packages": Level.FIX, "config": Level.FIX, "driver": Level.WARNING}
    texts = {finding.check: finding.text for finding in of_other}
    assert "here numpy==2.0; there numpy==2.1" in texts["packages"]
    assert "config.seed is 1 here, 0 in process 0" in texts["config"]
    assert "groups" not in texts["config"]
    assert compare([first, other | {"driver": ""}])[1][2].level is Level.FIX


def test_exit_codes_and_last_line():
    found = {level: Finding("x", level, "y") for level in Level}
    assert exit_code([]) == exit_code([found[Level.OK], found[Level.WARNING], found[Level.SKIPPED]]) == 0
    assert exit_code([found[Level.OK], found[Level.TEMPORARY]]) == LOST
    assert exit_code([found[Level.FIX], found[Level.TEMPORARY]]) == USER_ERROR
    assert "warnings" in conclusion([found[Level.WARNING]])
    assert "again" in conclusion([found[Level.TEMPORARY]])
    assert "FIX" in conclusion([found[Level.FIX]])
    assert all(from_row(each.row()) == each for each in found.values())


def test_table_shares_lines_and_puts_what_to_fix_first():
    same, mine = Finding("ports", Level.OK, "all reach"), Finding("lock", Level.FIX, "no locks", "none")
    lines = lines_of(NAMES, [[same], [same, mine]], [Finding("mesh", Level.OK, "fine")])
    assert lines[0].split() == ["host", "ports", "lock"]
    assert lines[1].split() == ["a", "(process", "0)", "ok"]
    assert lines[2].split() == ["b", "(process", "1)", "ok", "FIX", "none"]
    assert [line.split()[:2] for line in lines[4:]] == [["FIX", "lock"], ["ok", "ports"], ["ok", "mesh"]]
    assert "b (process 1): no locks" in lines[4]


def _in_threads(workdirs):
    """The findings `shared` and `lock` of processes with these run directories."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    def of(index):
        with meet(address, len(workdirs), index, 20) as those, probe_folder(those, workdirs[index]) as folder:
            return check_shared(folder, workdirs[index]), check_locks(folder, those)

    with concurrent.futures.ThreadPoolExecutor(len(workdirs)) as pool:
        return list(pool.map(of, range(len(workdirs))))


def test_locks_of_all_hosts_are_seen(tmp_path):
    found = _in_threads([tmp_path / "not" / "yet"] * 3)
    assert {finding.level for pair in found for finding in pair} == {Level.OK}
    assert list(tmp_path.iterdir()) == []


def test_locks_that_are_local_to_each_host(tmp_path, monkeypatch):
    """Lustre mounted `localflock`: each host gets the lock."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    (_, first), (_, second) = _in_threads([tmp_path] * 2)
    assert first.level is second.level is Level.WARNING
    assert "(process 1)" in first.text
    assert "(process 0)" in second.text
    assert lock.NO_LOCKS_REMEDY in first.text


def test_run_directory_that_one_host_does_not_see(tmp_path, monkeypatch):
    from discover_jax.preflight import shared_folder

    def reads(path, token):  # called once in each process
        seen.append(path)
        return len(seen) < 2

    seen = []
    monkeypatch.setattr(shared_folder, "_reads", reads)
    found = _in_threads([tmp_path] * 2)
    levels = sorted((shared.level.name, of_lock.level.name) for shared, of_lock in found)
    assert levels == [("FIX", "SKIPPED"), ("OK", "OK")]
