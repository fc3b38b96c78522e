"""Puts this folder and the report tests' synthetic run on the import path, and runs scripts."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "report")]


@pytest.fixture
def output(monkeypatch, capsys):
    """Runs a script and returns what it prints. In a process of its own, it would take longer to import than to print."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run
