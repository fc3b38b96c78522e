"""Leases of slots: cores within one executor, and uids across all executors of root."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_competition import GOOD, GOOD_SCORE, LIMITS

from discover_jax.exceptions import SandboxError
from discover_jax.execution import Executor, lease_cores, leases, ray_node


@given(cpus=st.sets(st.integers(0, 300), min_size=1, max_size=40), cores=st.integers(1, 8))
def test_leases_are_exclusive(cpus, cores):
    leases = lease_cores(sorted(cpus), cores, None)
    taken = [cpu for lease in leases for cpu in lease]
    assert len(leases) == max(1, len(cpus) // cores)
    assert len(taken) == len(set(taken))
    assert set(taken) <= cpus
    assert {len(lease) for lease in leases} == {min(cores, len(cpus))}


def test_workers_share_cores_if_there_are_too_few():
    assert lease_cores([4, 5], 2, 3) == [(4, 5), (4, 5), (4, 5)]
    assert lease_cores([0, 1, 2], 1, 2) == [(0,), (1,)]
    assert lease_cores([0, 1, 2], 2, 2) == [(0, 1), (0, 2)]


@pytest.fixture
def places(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Folders for locks. They replace those of the machine, which other runs use."""
    found = (tmp_path / "run", tmp_path / "tmp")
    for place in found:
        place.mkdir()
    monkeypatch.setattr(leases, "_PLACES", found)
    return found


def test_uids_are_exclusive_until_released(places):
    with leases.lease_uids(3) as first:
        assert first == [60600, 60601, 60602]
        with leases.lease_uids(2) as second:
            assert second == [60603, 60604]
    with leases.lease_uids(4) as again:
        assert again == [60600, 60601, 60602, 60603]
    assert (places[0] / "discover_jax-uids").stat().st_mode & 0o777 == 0o700


def test_uids_of_a_killed_process_are_free_again(places):
    program = (
        f"import time\nfrom pathlib import Path\nfrom discover_jax.execution import leases\nleases._PLACES = (Path({str(places[0])!r}),)\n"
        "with leases.lease_uids(2) as uids:\n    print(*uids, flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "60600 60601\n"
        with leases.lease_uids(1) as meanwhile:
            assert meanwhile == [60602]
    finally:
        process.kill()
        process.communicate()
    with leases.lease_uids(1) as after:
        assert after == [60600]


def test_too_few_uids_is_an_error_that_releases_all(places, monkeypatch):
    monkeypatch.setattr(leases, "UIDS", range(60600, 60604))
    with (
        leases.lease_uids(1),
        pytest.raises(SandboxError, match=r"\b4\b[\s\S]*\bworkers\b[\s\S]*\b3\b"),
        leases.lease_uids(4),
    ):
        pass
    with leases.lease_uids(4) as all_of_them:
        assert len(all_of_them) == 4


def test_lock_folder_that_others_can_enter_is_refused(places):
    (places[0] / "discover_jax-uids").mkdir(mode=0o755)
    with pytest.raises(SandboxError, match=r"discover_jax-uids[\s\S]*\b755\b"), leases.lease_uids(1):
        pass
    (places[0] / "discover_jax-uids").rmdir()
    (places[0] / "discover_jax-uids").symlink_to(places[1])
    with pytest.raises(SandboxError, match="discover_jax-uids"), leases.lease_uids(1):
        pass


def test_locks_are_in_tmp_if_run_is_not_writable(places, monkeypatch):
    monkeypatch.setattr(leases, "_PLACES", (places[0] / "missing", places[1]))
    with leases.lease_uids(1):
        assert (places[1] / "discover_jax-uids" / "60600").exists()
    monkeypatch.setattr(leases, "_PLACES", (places[0] / "missing",))
    with pytest.raises(SandboxError, match="missing"), leases.lease_uids(1):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give each slot a uid")
def test_two_runs_never_share_a_uid_on_the_host(task, tmp_path):
    """Two concurrent executors have different uids on the host. A third does not get the uid of the one that still runs."""

    def uid(pool: Executor) -> int:
        """The uid of a running program in the pool's only slot."""
        future = pool.submit("import time\ntime.sleep(1)\n" + GOOD)
        (spec,) = pool._backend.specs
        while not future.done():
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    found = int(status.read_text().split("\nUid:\t")[1].split()[1])
                    command = (status.parent / "cmdline").read_bytes()
                except OSError:  # it has ended
                    continue
                if found == spec.uid and b"/harness.py" in command:
                    assert future.result(60).grade.score == GOOD_SCORE
                    return found
        raise AssertionError("no process of the leased uid was seen")

    first = Executor([task], LIMITS, workers=1, cache_dir=tmp_path / "a")
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path / "b") as second:
        uids = [uid(first), uid(second)]
        assert uids[0] != uids[1]
        first.close()
        with Executor([task], LIMITS, workers=1, cache_dir=tmp_path / "c") as third:
            assert third._backend.specs[0].uid != uids[1]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_folders_without_locks_are_named(tmp_path, monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(leases, "_folder", lambda: tmp_path)
    with pytest.raises(SandboxError, match=rf"{tmp_path} has no file locks.*\btmpfs, ext4 or xfs") as caught, leases.lease_uids(1):
        pass
    assert "space" not in str(caught.value)
    with pytest.raises(SandboxError, match=rf"{tmp_path} has no file locks.*TMPDIR"):
        ray_node._lock(tmp_path)
