"""A real run to report on: the unbroken one of tests/faults, which all test processes share; and a browser, where there is one."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The tests here import each other's parts by name, and the tiny run of the faults.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "faults")]

from browser import NAMES, Browser, find_chromium  # noqa: E402
from tiny_run import unbroken  # noqa: E402


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps; not to be written to."""
    base = tmp_path_factory.getbasetemp()
    return unbroken((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip(f"no Chromium on this machine ({', '.join(NAMES)}); Debian's package is `chromium`")
    with Browser(executable, tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened
