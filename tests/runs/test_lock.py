"""The lock of a run directory: who holds it, how long a run waits for a dead host's lock, and file systems without locks."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys

import pytest

from discover_jax.exceptions import RunError
from discover_jax.files import storage_remedy
from discover_jax.runs import lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.1)


@pytest.fixture
def dead(tmp_path):
    """An open file whose lock stands for one that a file server keeps for another host."""
    with (tmp_path / lock.NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@pytest.fixture
def held(dead, tmp_path):
    """The path of the locked file. A test writes who holds it."""
    return tmp_path / lock.NAME


def _holder(**changes):
    return json.dumps({"host": "node-7", "pid": 4242, "since": "2026-11-27T21:03:00+00:00", "born": "boot 17"} | changes)


def test_lock_of_another_host_is_waited_for_and_its_holder_is_named(quick, tmp_path, held):
    held.write_text(_holder())
    told = []
    with pytest.raises(RunError) as caught, lock.hold_lock(tmp_path, told.append):
        pass
    for text in (str(caught.value), told[0]):
        assert re.search(r"node-7.*\b4242\b.*2026-11-27T21:03", text)
    assert len(told) == 1  # not once for each look
    assert re.search(r"0 of at most 0 s", told[0])
    assert f"delete {held}" in str(caught.value)
    assert json.loads(held.read_text())["host"] == "node-7"  # the loser does not overwrite the holder's name


def test_lock_that_is_released_while_a_run_waits(quick, tmp_path, dead, held):
    held.write_text(_holder())
    told = []

    def tell(text):
        told.append(text)
        fcntl.flock(dead, fcntl.LOCK_UN)

    with lock.hold_lock(tmp_path, tell):
        found = json.loads(held.read_text())
    assert len(told) == 1
    assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())


@pytest.mark.parametrize("reborn", [False, True])
def test_live_process_of_this_host_is_refused_at_once(quick, tmp_path, held, reborn):
    """A container that restarts may have the host name and the process ids of the one before. Its boot or start time differs."""
    born = lock._born(os.getpid())
    held.write_text(_holder(host=socket.gethostname(), pid=os.getpid(), born=born + "1" * reborn))
    told = []
    with pytest.raises(RunError, match=rf"\b{os.getpid()}\b"), lock.hold_lock(tmp_path, told.append):
        pass
    assert bool(told) == reborn


@pytest.mark.parametrize("content", ["", "4242\n", "{", '["a"]'])
def test_holder_that_wrote_nothing_or_an_earlier_version_s_file(quick, tmp_path, held, content):
    held.write_text(content)
    with pytest.raises(RunError, match=r"in use by another process"), lock.hold_lock(tmp_path, lambda text: None):
        pass


def test_deleted_file_of_a_dead_holder(quick, tmp_path, held):
    """As the message advises. The next run locks a new file."""
    held.unlink()
    with lock.hold_lock(tmp_path, lambda text: None):
        assert json.loads(held.read_text())["pid"] == os.getpid()
        with pytest.raises(RunError, match="in use"), lock.hold_lock(tmp_path, lambda text: None):
            pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_file_system_without_locks(tmp_path, monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError) as caught, lock.hold_lock(tmp_path, print):
        pass
    assert os.strerror(number) in str(caught.value)
    assert "space" not in str(caught.value)
    assert re.search(r"Lustre.*`flock`.*`localflock`.*NFS.*vers=4", str(caught.value))


def test_other_errors_of_flock_pass(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), lock.hold_lock(tmp_path, print):
        pass


def test_killed_holder_leaves_nothing(tmp_path):
    code = """
import pathlib, sys
from discover_jax.runs import lock
with lock.hold_lock(pathlib.Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"{re.escape(socket.gethostname())}.*\b{holder.pid}\b"), lock.hold_lock(tmp_path, print):
            pass
        holder.kill()
        holder.wait()
        with lock.hold_lock(tmp_path, print):
            pass


@pytest.mark.parametrize(
    ("error", "advice", "wrong"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space", "permissions"),
        (ValueError('INTERNAL: write failed [tensorstore: "No space left on device"]'), "Free some space", "permissions"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota", "permissions"),
        (PermissionError(errno.EACCES, "Permission denied"), "permissions", "space"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only", "space"),
        (OSError(errno.ESTALE, "Stale file handle"), "file server", "space"),
        (OSError(errno.ENOSYS, "Function not implemented"), "does not support", "space"),
        (RuntimeError("no errno at all"), "Check the disk", "Free some"),
    ],
)
def test_remedy_follows_from_the_error(error, advice, wrong):
    assert advice in storage_remedy(error)
    assert wrong not in storage_remedy(error)
