import dataclasses
import sys
from pathlib import Path

import pytest

from discover_jax.kernels.kernel_set import PLATFORMS, find_kernel, kernel_set

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that tests of this folder share


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU whose kernels can be chosen, but not run."""
    pytest.importorskip("triton", reason="needs triton (extra `parity` or `kernels`)")
    monkeypatch.setitem(PLATFORMS, "gpu", dataclasses.replace(PLATFORMS["gpu"], package="jax", refusal=lambda: ""))
    for found in (find_kernel, kernel_set):
        found.cache_clear()
    yield
    for found in (find_kernel, kernel_set):
        found.cache_clear()
