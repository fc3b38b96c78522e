"""The command that installs an optional part of this project, for messages."""

import sys


def install_command(extra: str) -> str:
    """How to install an extra of pyproject.toml, in the versions of constraints/, in the environment that runs this.

    The name `discover_jax` alone would not do: outside an environment that has the project, pip would look for a package of that name
    elsewhere, and it would not use the constraints.
    """
    constraints = "py311" if sys.version_info < (3, 12) else "py312"  # as the Makefile
    return f"`pip install -c constraints/{constraints}.txt -e '.[{extra}]'` in the project's folder"
