"""The folder of uninterrupted runs, shared by all test processes. Runs with faults are compared with them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from discover_jax.execution import sandbox_spec

# The modules of this folder import each other by name.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_run import environment


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, the compiled functions and the uninterrupted runs."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults"


@pytest.fixture(scope="module")
def in_this_process(root: Path) -> Iterator[None]:
    """Runs in this process are as those of `tiny_run.command`: with its compiled functions, and with sandboxes that preload nothing.

    A process of its own would import jax, orbax and pandas for seconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(root).items():
            patch.setenv(name, value)
        patch.setattr(sandbox_spec, "PRELOAD", ())
        before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
