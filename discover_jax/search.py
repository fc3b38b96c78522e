"""The baseline: the same prompts, reuse and grading, but no update. `python -m discover_jax.search --config=configs/quickstart.py`."""

import functools
from pathlib import Path
from typing import Any

from discover_jax import cli, dry_run, main
from discover_jax.hosts.processes import ALONE, Processes


def run(config: Any, folder: Path, processes: Processes = ALONE) -> None:
    """Runs or resumes a search; see `main.run`."""
    main.run(config, folder, processes, learn=False)


if __name__ == "__main__":
    cli.launch(run, functools.partial(dry_run.run, learn=False))
