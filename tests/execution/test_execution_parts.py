"""Small parts of the execution: leases, limits, kept output, control groups, links to the interpreter."""

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError
from discover_jax.execution import Limits, bubblewrap, lease_cores, memory
from discover_jax.execution.output import HeadAndTail, normalised


@given(cpus=st.sets(st.integers(0, 300), min_size=1, max_size=40), cores=st.integers(1, 8))
def test_leases_are_exclusive(cpus, cores):
    leases = lease_cores(sorted(cpus), cores, None)
    taken = [cpu for lease in leases for cpu in lease]
    assert len(leases) == max(1, len(cpus) // cores)
    assert len(taken) == len(set(taken))
    assert set(taken) <= cpus
    assert {len(lease) for lease in leases} == {min(cores, len(cpus))}


def test_more_workers_than_cores_share():
    assert lease_cores([4, 5], 2, 3) == [(4, 5), (4, 5), (4, 5)]
    assert lease_cores([0, 1, 2], 1, 2) == [(0,), (1,)]
    assert lease_cores([0, 1, 2], 2, 2) == [(0, 1), (0, 2)]


@given(chunks=st.lists(st.binary(max_size=30), max_size=40), limit=st.integers(2, 50))
def test_head_and_tail_of_any_stream(chunks, limit):
    kept, whole = HeadAndTail(limit), b"".join(chunks)
    for chunk in chunks:
        kept.add(chunk)
    half = limit // 2
    assert kept.total == len(whole)
    if len(whole) <= 2 * half:
        assert kept.text() == whole.decode("utf-8", "replace")
    else:
        head, tail = whole[:half].decode("utf-8", "replace"), whole[len(whole) - half :].decode("utf-8", "replace")
        assert kept.text() == f"{head}\n... {len(whole) - 2 * half} bytes left out ...\n{tail}"


def test_normalised_text():
    text = "/a/b/lib/x.py:3: <f at 0x7f00deadbeef> /sandbox/solution.py 0xff"
    assert normalised(text, ["/a", None, "/a/b", "/sandbox"]) == "lib/x.py:3: <f at 0x...> solution.py 0xff"
    # What would move a terminal's cursor or change its colours is made visible and harmless.
    assert normalised("a\r\nb\rc\t\x1b[2J\x00\x9b", []) == "a\nb\nc\t\ufffd[2J\ufffd\ufffd"


@pytest.mark.parametrize("values", [{"seconds": 0}, {"seconds": math.nan}, {"seconds": math.inf}, {"cores": -1}, {"memory_bytes": 1.5}])
def test_limits_are_checked(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Limits(**values)


def test_control_group_of_version_2(tmp_path):
    """Against files laid out as the kernel's documentation says, since a machine has writable groups of one version at most."""
    folder = tmp_path / f"discover_jax-{os.getpid()}-0-0"
    real_mkdir = type(tmp_path).mkdir

    def mkdir_like_kernel(self, *args, **kwargs):
        real_mkdir(self, *args, **kwargs)
        for name in ("memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "cgroup.procs"):
            (self / name).touch()
        (self / "memory.events").write_text("low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tmp_path), "mkdir", mkdir_like_kernel)
        group = memory.Group(memory.Cgroups(2, tmp_path, tmp_path), "0-0", 1 << 30, 256)
    assert [(folder / name).read_text() for name in ("memory.max", "memory.swap.max", "memory.oom.group", "pids.max")] == [
        str(1 << 30),
        "0",
        "1",
        str(256 + 16),
    ]
    assert group.procs_files == [str(folder / "cgroup.procs")]
    assert not group.exceeded()
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 3\noom_group_kill 1\n")
    assert group.exceeded()


def test_memory_of_a_process_tree_counts_children():
    child = "data = bytearray(b'x') * 80_000_000; print(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-S", "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert 80_000_000 <= memory.tree_bytes(process.pid) < 200_000_000
    finally:
        process.communicate(b"\n", timeout=10)
    assert memory.tree_bytes(process.pid) == 0


def test_links_on_the_way_to_the_interpreter(tmp_path):
    """A chain venv/python -> outside/python3 -> real/python: only the link outside of what is bound has to be made again."""
    for name in ("venv", "outside", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "real" / "python").touch()
    (tmp_path / "outside" / "python3").symlink_to("../real/python")
    (tmp_path / "venv" / "python").symlink_to(tmp_path / "outside" / "python3")
    links = bubblewrap._links(str(tmp_path / "venv" / "python"), [str(tmp_path / "venv"), str(tmp_path / "real")])
    assert links == ((str(tmp_path / "outside" / "python3"), "../real/python"),)
