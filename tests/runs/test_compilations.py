"""The folder of compiled functions: only its user may write to it; it is refused if others could."""

import os
import stat

import jax
import pytest

from discover_jax.exceptions import RunError
from discover_jax.runs.compilations import cache_compilations, own_folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "discover_jax" / "compiled"


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_folder_is_private_for_any_umask(folder, umask):
    before = os.umask(umask)
    try:
        own_folder(folder)
        own_folder(folder)
    finally:
        os.umask(before)
    assert (mode(folder), mode(folder.parent)) == (0o700, 0o700)


@pytest.mark.parametrize("which", ["compiled", "discover_jax"])
@pytest.mark.parametrize("bits", [0o770, 0o757, 0o777, 0o1777])
def test_folders_that_others_can_write_are_refused(folder, bits, which):
    own_folder(folder)
    path = folder if which == "compiled" else folder.parent
    path.chmod(bits)
    with pytest.raises(RunError, match=rf"write to {path} .*\b{bits:o}\b.*native code.*Delete {path} .*chmod -R go-w {path} "):
        own_folder(folder)
    path.chmod(0o755)  # all may read it
    own_folder(folder)


@pytest.mark.parametrize("which", ["compiled", "discover_jax"])
def test_folders_of_other_users_are_refused(folder, which, monkeypatch):
    own_folder(folder)
    path = folder if which == "compiled" else folder.parent
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:  # not root, so simulate another user; new files then belong to another one, too
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        monkeypatch.setattr("discover_jax.runs.compilations._owner_of_new_files", lambda folder: None)
        path = folder.parent  # checked first
    with pytest.raises(RunError, match=rf"{path} belongs to another user.*native code.*Delete {path} .*JAX_COMPILATION_CACHE_DIR"):
        own_folder(folder)


@pytest.mark.parametrize("which", ["compiled", "discover_jax"])
def test_links_and_files_are_refused(folder, which, tmp_path):
    (tmp_path / "elsewhere" / "compiled").mkdir(parents=True, mode=0o700)
    path = folder if which == "compiled" else folder.parent
    path.parent.mkdir(parents=True, mode=0o700)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=rf"{path} is not a folder.*Delete {path} "):
        own_folder(folder)


@pytest.fixture
def restored():
    """Restores jax's settings."""
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_jax_uses_the_folder(folder, monkeypatch, restored):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parents[1]))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    cache_compilations()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    folder.chmod(0o777)
    with pytest.raises(RunError, match=rf"{folder} .*\b777\b"):
        cache_compilations()


def test_environment_settings_take_precedence(folder, monkeypatch, restored):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parents[1]))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    before = jax.config.jax_compilation_cache_dir
    cache_compilations()
    assert jax.config.jax_compilation_cache_dir == before
    assert not folder.exists()


def test_unwritable_home_only_logs_a_warning(monkeypatch, restored, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_compilation_cache_dir
    cache_compilations()
    assert jax.config.jax_compilation_cache_dir == before
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "not kept between runs" in record.getMessage()
    assert "/dev/null/cache/discover_jax/compiled" in record.getMessage()
