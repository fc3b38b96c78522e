"""The folder of uninterrupted runs, shared by all test processes. Runs with faults are compared with them."""

import os
import sys
from pathlib import Path

import pytest

# The modules of this folder import each other by name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, the compiled functions and the uninterrupted runs."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults"
