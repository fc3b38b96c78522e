"""The baseline: the same loop as `main` without the update. `python -m discover_jax.search --config=configs/quickstart.py`."""

import functools

from discover_jax import cli, dry_run, main
from discover_jax.types import RunKind

run = functools.partial(main.run, kind=RunKind.SEARCH)
"""Runs or resumes a search; see `main.run`."""

if __name__ == "__main__":
    cli.launch(run, functools.partial(dry_run.run, learn=False))
