"""The unbroken run with which the struck ones are compared, made once for all test processes."""

import os
import sys
from pathlib import Path

import pytest

# The tests here import each other's parts by name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model, of compiled programs and of unbroken runs."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults"
