"""Files are replaced atomically, and a failed append is truncated."""

import os

import pytest

from discover_jax import files
from discover_jax.exceptions import RunError
from discover_jax.files import append_synced, replacement, write_atomic


def _full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(files.os, "fsync", _full)
        else:
            patch.setattr(files.Path, "replace", _full)
        with pytest.raises(RunError, match="No space left on device"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.json"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_interrupted_replacement_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def interrupted():
        with replacement(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_failed_append_is_truncated(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    append_synced(path, b"one\n")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", _full)
        with pytest.raises(OSError, match="No space left on device"):
            append_synced(path, b"two\n")
    append_synced(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"
