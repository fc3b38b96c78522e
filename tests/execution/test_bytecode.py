"""Bytecode of packages that sandboxes import: written where it is missing, in spite of the environment, and a warning where that fails."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from discover_jax.execution import bytecode
from discover_jax.execution.bytecode import packages_without_bytecode, write_bytecode
from discover_jax.execution.sandbox_spec import SandboxSpec

# Imports its arguments and prints the top-level packages of all modules that Python has compiled from a folder of packages.
_IMPORTED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
specs = [module.__spec__ for module in sys.modules.values() if getattr(module, "__spec__", None)]
print(*{spec.name.partition(".")[0] for spec in specs if spec.cached and "site-packages" in spec.origin})
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package without bytecode that this process and its children can import. Nothing else is looked at."""
    monkeypatch.setattr(bytecode, "_IMPORTED_WITH", ())
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


def test_a_module_is_looked_at_though_its_package_has_bytecode(package, monkeypatch):
    """Another program imported only a part of the package."""
    (package / "other.py").write_text("VALUE = 2\n")
    write_bytecode(["without_bytecode"])
    assert packages_without_bytecode(["without_bytecode.other", "without_bytecode.missing"]) == {"without_bytecode": package}
    monkeypatch.setattr(bytecode, "_IMPORTED_WITH", ("without_bytecode.other",))
    write_bytecode(["without_bytecode"])
    assert (package / "__pycache__" / f"other.{sys.implementation.cache_tag}.pyc").exists()


def test_a_package_that_fails_to_import_does_not_stop_the_others(package, caplog):
    """Like lightgbm without libgomp: its own bytecode is written before it fails."""
    broken = package.parent / "broken_package.py"
    broken.write_text("raise OSError('libgomp.so.1: cannot open shared object file')\n")
    write_bytecode(["broken_package", "without_bytecode"])
    assert packages_without_bytecode(["broken_package", "without_bytecode"]) == {}
    assert caplog.text == ""


def test_all_packages_that_sandboxes_and_boosters_import_are_looked_at(monkeypatch):
    """Compared with what Python really imports here."""
    preload = next(field.default for field in dataclasses.fields(SandboxSpec) if field.name == "preload")
    boosters = [name for name in ("lightgbm", "catboost") if importlib.util.find_spec(name)]
    modules = ["pandas", *preload]
    done = subprocess.run([sys.executable, "-P", "-s", "-c", _IMPORTED, *modules, *boosters], capture_output=True, text=True, check=True)
    imported = {name for name in done.stdout.split() if not name.startswith("_")}  # .pth files import modules with an underscore
    assert {"numpy", "scipy", "dateutil", "joblib", "sklearn", "pandas"} <= imported
    monkeypatch.setattr(bytecode, "_compiled", lambda _: Path("/nowhere"))
    assert imported <= packages_without_bytecode([*modules, *bytecode._IMPORTED_WITH]).keys()
