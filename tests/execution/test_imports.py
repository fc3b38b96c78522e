"""Packages that are installed but cannot be imported in a sandbox, in programs that are run and in programs that are called."""

import pytest
from tiny_problem import Squares

from discover_jax.execution import Executor, executor, imports
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.text.prompts import installed_packages

pytestmark = pytest.mark.sandbox

MODULES = {"json5": "json", "dotted": "xml.dom", "lightgbm": "libgomp_is_missing", "numpy": "numpy"}


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules of the standard library, and one that does not exist, stand in for the packages."""
    monkeypatch.setattr(executor, "module_of", MODULES.__getitem__)


def test_packages_that_a_program_cannot_import(pool, stand_ins):
    assert pool.unusable_packages(list(MODULES)) == {"lightgbm": "ModuleNotFoundError: No module named 'libgomp_is_missing'"}


def test_packages_that_the_program_of_a_problem_cannot_import(task, tmp_path, stand_ins):
    limits = ResourceLimits(seconds=20.0, cores=1, memory_bytes=400 * MIB)
    with Executor([Squares(task.public_dir)], limits, workers=1, cache_dir=tmp_path / "cache") as problem:
        assert list(problem.unusable_packages(["json5", "lightgbm"])) == ["lightgbm"]
        assert problem.submit("def square(x):\n    return x * x\n").result(60).grade.score == 2.0  # the slot is free again


def test_packages_that_every_sandbox_imports_or_that_are_missing_start_no_program(pool, monkeypatch):
    monkeypatch.setattr(pool, "_import_error", lambda _: pytest.fail("started a program"))
    assert pool.unusable_packages(["numpy", "pandas", "scipy", "not-installed-at-all"]) == {}


def test_modules_of_packages():
    """Names that differ for pip and for import."""
    names = ["scikit-learn", "xgboost-cpu", "python-dateutil", "numpy", "threadpoolctl", "six", "PyYAML", "protobuf"]
    installed = {name: imports.module_of(name) for name in names if installed_packages([name])}
    expected = dict(zip(names, ("sklearn", "xgboost", "dateutil", "numpy", "threadpoolctl", "six", "yaml", "google.protobuf"), strict=True))
    assert {"scikit-learn", "numpy"} <= installed.keys()
    assert installed == {name: expected[name] for name in installed}
