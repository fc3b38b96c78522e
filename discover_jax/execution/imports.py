"""Which module a package is imported by, and a program that only imports it: an installed package may still fail to import in a sandbox.

Example: lightgbm needs the system's libgomp, and a library outside /usr and Python's folders does not exist in a sandbox.
"""

import importlib.metadata

_PROGRAM = """import {module}


def run():
    import pandas

    return pandas.DataFrame()
"""


def module_of(package: str) -> str:
    """The module by which programs import an installed package, such as sklearn for scikit-learn.

    Args:
      package: its name for pip.

    Raises:
      importlib.metadata.PackageNotFoundError: it is not installed.
    """
    files = importlib.metadata.distribution(package).files or ()
    packages = [file.parts[:-1] for file in files if file.name == "__init__.py" and len(file.parts) > 1]
    top = min(map(len, packages), default=0)  # 2 in a namespace: google/protobuf/__init__.py
    found = {".".join(parts) for parts in packages if len(parts) == top}
    found |= {file.stem for file in files if len(file.parts) == 1 and file.suffix == ".py"}
    same = package.lower().replace("-", "_")
    return same if same in found else min((name for name in found if not name.startswith("_")), default=same)


def program_importing(module: str) -> str:
    """A program that succeeds if it can import the module, whether it is run or loaded for calls."""
    return _PROGRAM.format(module=module)
