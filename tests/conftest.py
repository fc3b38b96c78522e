"""Settings of all tests that make compilation cheap: most of their time goes into compiling small functions that run once.

The whole-run tests in test_main use XLA's flags as users have them.
"""

import atexit
import os
import pathlib
import shutil
import tempfile
from importlib.metadata import version

_FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # later versions abort at unknown flags
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # compiles a third faster
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

# All processes of the session share compiled functions: this one, its workers, and the scripts that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Runs the files of whole runs first: they take longest, and at the end they would leave other workers idle."""
    here = pathlib.Path(__file__).parent
    whole_runs = (here, here / "faults", here / "execution", here / "kernels")
    items.sort(key=lambda item: whole_runs.index(item.path.parent) if item.path.parent in whole_runs else len(whole_runs))
