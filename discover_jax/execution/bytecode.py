"""Bytecode of the packages that programs import.

Sandboxes cannot write it, and some installers do not. Without it, each program compiles pandas and scikit-learn again, which takes several
times as long as importing them.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from absl import logging

_IMPORT = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"


def packages_without_bytecode(modules: Iterable[str]) -> dict[str, Path]:
    """The installed packages of these modules whose `__init__` has no bytecode, with their folders."""
    found = {}
    for package in dict.fromkeys(module.partition(".")[0] for module in modules):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        source = Path(spec.origin)
        # Not importlib.util.cache_from_source: sandboxes do not inherit PYTHONPYCACHEPREFIX.
        if not (source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc").exists():
            found[package] = source.parent
    return found


def write_bytecode(modules: Iterable[str]) -> None:
    """Imports the modules in another process if a package lacks bytecode, so that Python writes it. Logs a warning if it cannot."""
    modules = list(modules)
    missing = packages_without_bytecode(modules)
    if not missing:
        return
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    installed = [module for module in modules if importlib.util.find_spec(module.partition(".")[0]) is not None]
    done = subprocess.run([sys.executable, "-c", _IMPORT, *installed], env=environment, capture_output=True, text=True, check=False)
    if missing := packages_without_bytecode(missing):
        logging.warning(
            "Programs start slowly: %s has no bytecode, and it cannot be written%s. Run `python -m compileall %s` as this folder's owner.",
            ", ".join(missing),
            f" ({done.stderr.strip().splitlines()[-1]})" if done.returncode and done.stderr.strip() else "",
            next(iter(missing.values())).parent,
        )
