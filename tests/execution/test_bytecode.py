"""Bytecode of packages that sandboxes import: written where it is missing, in spite of the environment, and a warning where that fails."""

import pytest

from discover_jax.execution.bytecode import packages_without_bytecode, write_bytecode


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package without bytecode that this process and its children can import."""
    folder = tmp_path / "without_bytecode"
    folder.mkdir()
    (folder / "__init__.py").write_text("from without_bytecode import part\n")
    (folder / "part.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return folder


def test_missing_bytecode_is_written_even_if_the_environment_forbids_it(package, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    modules = ["without_bytecode.part", "not_installed_at_all"]
    assert packages_without_bytecode(modules) == {"without_bytecode": package}
    write_bytecode(modules)
    assert packages_without_bytecode(modules) == {}
    assert {path.name.split(".")[0] for path in (package / "__pycache__").iterdir()} == {"__init__", "part"}


def test_complete_packages_start_no_process(package, monkeypatch):
    write_bytecode(["without_bytecode"])
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("started a process"))
    write_bytecode(["without_bytecode"])


def test_a_warning_names_the_package_and_the_remedy(package, caplog):
    (package / "__pycache__").write_text("a file where the folder would be")
    write_bytecode(["without_bytecode"])
    assert "without_bytecode" in caplog.text
    assert f"compileall {package.parent}" in caplog.text
