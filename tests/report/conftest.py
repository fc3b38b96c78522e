"""Fixtures: a real run, which is the uninterrupted one of tests/faults and shared by all test processes; and a browser, if there is one."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The tests import modules of this folder and the tiny run of tests/faults by name.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "faults")]

from browser import NAMES, Browser, find_chromium  # noqa: E402
from tiny_run import unbroken  # noqa: E402


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run of four steps. Tests must not write to it."""
    base = tmp_path_factory.getbasetemp()
    return unbroken((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip(f"no Chromium on this machine ({', '.join(NAMES)}); Debian's package is `chromium`")
    with Browser(executable, tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened
