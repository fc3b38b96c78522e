"""Bytecode of the packages that programs import.

Sandboxes cannot write it, and some installers do not. Without it, each program compiles these packages again, which takes several times as
long as importing them.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from absl import logging

# A module that cannot be imported is reported on standard error. The others are still imported.
_IMPORT = """import importlib, sys, traceback
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(*traceback.format_exception_only(error), sep="", end="", file=sys.stderr)
"""
_IMPORTED_WITH = (
    "numpy.linalg",
    "numpy.random",
    "scipy.optimize",
    "scipy.sparse",
    "scipy.stats",
    "dateutil",
    "pyarrow",
    "numexpr",
    "bottleneck",
    "joblib",
    "threadpoolctl",
    "cloudpickle",
    "psutil",
    "narwhals",
    "rich",
    "charset_normalizer",
    "six",
    "lightgbm",
    "catboost",
)
"""What pandas, scikit-learn, xgboost, lightgbm and catboost import where it is installed, and the last two themselves. The first packages
have one module for each part: other programs import, and compile, only some parts."""


def _sources(module: str) -> tuple[Path, list[Path]] | None:
    """Folder of the module's top-level package, and source files of that package and of the module; None if there is none in Python.

    Does not import the package.
    """
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    source = Path(spec.origin)
    inner = source.parent.joinpath(*parts)
    candidates = [inner / "__init__.py", inner.with_suffix(".py")] if parts else []
    return source.parent, [source, *(path for path in candidates if path.exists())]


def _compiled(source: Path) -> Path:
    # Not importlib.util.cache_from_source: sandboxes do not inherit PYTHONPYCACHEPREFIX.
    return source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"


def packages_without_bytecode(modules: Iterable[str]) -> dict[str, Path]:
    """The installed packages of these modules that lack bytecode, with their folders: of `__init__` or of one of the modules."""
    found = {}
    for module in modules:
        located = _sources(module)
        if located is not None and not all(_compiled(source).exists() for source in located[1]):
            found[module.partition(".")[0]] = located[0]
    return found


def write_bytecode(modules: Iterable[str]) -> None:
    """Makes Python write the bytecode of the modules and of what is imported with them (`_IMPORTED_WITH`).

    Imports all of them in another process if any lacks bytecode, otherwise only looks at files. Logs a warning if it cannot be written.
    """
    modules = list(dict.fromkeys([*modules, *_IMPORTED_WITH]))
    missing = packages_without_bytecode(modules)
    if not missing:
        return
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    installed = [module for module in modules if importlib.util.find_spec(module.partition(".")[0]) is not None]
    done = subprocess.run([sys.executable, "-c", _IMPORT, *installed], env=environment, capture_output=True, text=True, check=False)
    if missing := packages_without_bytecode(modules):
        said = done.stderr.strip().splitlines()
        logging.warning(
            "Programs start slowly: %s has no bytecode, and it cannot be written%s. Run `python -m compileall %s` as this folder's owner.",
            ", ".join(missing),
            f" ({said[-1]})" if said else "",
            next(iter(missing.values())).parent,
        )
