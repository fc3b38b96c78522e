"""Settings of all tests that make compilation and imports cheap: most of the time goes into functions and processes that run once.

The whole-run tests in test_main use XLA's flags as users have them.
"""

import atexit
import gc
import os
import pathlib
import shutil
import sys
import tempfile
from importlib.metadata import version

import hypothesis
import jax
import numpy as np
import pytest

from discover_jax.execution.bytecode import write_bytecode
from discover_jax.execution.sandbox_spec import PRELOAD

_FLAGS = ["--xla_backend_optimization_level=0"]
# On a GPU, XLA otherwise compiles and times many variants of each product of the references.
_FLAGS.append("--xla_gpu_autotune_level=0")
if version("jaxlib").startswith("0.10."):  # later versions abort at unknown flags
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # compiles a third faster
    _FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")  # compiles with a fifth less CPU time
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

# The processes that tests start import jax and pandas. Without bytecode that takes three to four times as long. Containers often forbid
# Python to write it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Each worker and each process that a test starts would have threads of its own for every core, and idle ones spin. XLA has its own threads.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

# A busy machine is no failure.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# All processes of the session share compiled functions: this one, its workers, and the scripts that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    # jax read the environment of this process when it was imported.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    write_bytecode(PRELOAD)  # many tests start sandboxes without an executor, which does this for runs


@pytest.fixture(scope="session")
def random_weights():
    """Fills an abstract tree of weights, such as `model.abstract_frozen()`, with random numbers for which activations stay of order 1.

    NumPy draws them. `model.init_frozen` compiles a random generator for every shape, which takes most of the time of a test of a small
    model.
    """

    def draw(abstract, seed: int = 0):
        rng = np.random.default_rng(seed)

        def leaf(path, struct):
            name, values = path[-1].key, rng.standard_normal(struct.shape)
            if "norm" in name:
                values = 1 + 0.1 * values
            else:
                values *= {"bias": 0.1, "sinks": 1.0, "embedding": 1.0}.get(name, struct.shape[-1] ** -0.5)
            return jax.device_put(values.astype(struct.dtype))

        return jax.tree_util.tree_map_with_path(leaf, abstract)

    return draw


def pytest_collection_modifyitems(config, items):
    """Runs the files of whole runs first: they take longest, and at the end they would leave other workers idle.

    `-m accelerator` leaves out slow tests, so that it ends within ten minutes. `-m "slow and accelerator"` runs them.
    """
    if config.option.markexpr == "accelerator":
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    here = pathlib.Path(__file__).parent
    whole_runs = (here, here / "faults", here / "execution", here / "kernels")
    items.sort(key=lambda item: whole_runs.index(item.path.parent) if item.path.parent in whole_runs else len(whole_runs))


TORCH = ('importorskip("torch"', 'usefixtures("torch"')
"""A file with tests that need torch says one of these. One worker runs all these files: importing torch and transformers takes 10 s of CPU
time."""


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config, log):
    """For `--dist loadfile`: each file on one worker, and the files with torch on the same one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    root, here = config.rootpath, pathlib.Path(__file__).parent
    whole_run = here / "test_main.py"  # long enough by itself

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "torch" if file in with_torch else file

    files = (file for file in here.rglob("test_*.py") if file != whole_run)
    with_torch = {file.relative_to(root).as_posix() for file in files if any(said in file.read_text() for said in TORCH)}
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The garbage collector never looks at modules and collected tests: they stay, and looking at them takes a fifth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
