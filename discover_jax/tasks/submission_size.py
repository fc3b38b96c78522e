"""How large submissions may be: a limit derived from the competitions' own tables, or set by the config."""

import functools
from collections.abc import Sequence
from pathlib import Path

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.prepare import AnyTask
from discover_jax.tasks.task import Task

MIB = 1 << 20
LEAST_BYTES = 8 * MIB
"""The derived limit, unless a competition needs more. Values of problems have this limit, too."""
_CELL_BYTES = 32
"""Room for one prediction: a float64 in CSV has at most 25 characters with its comma."""
_STATED_FRACTION = 0.25
"""Prompts state the limit if a submission may need more than this fraction of it."""


def result_bytes(tasks: Sequence[AnyTask], mib: int) -> int:
    """The limit of a submission as CSV, and of a value that a problem's function returns.

    Args:
      tasks: of the run.
      mib: config.execution.result_mib. 0: derived, 8 MiB or what the largest competition needs; see `needed_bytes`.

    Raises:
      ConfigError: a competition's sample submission is larger than the configured limit.
    """
    if not mib:
        return max(LEAST_BYTES, -(-max(map(_needed, tasks)) // MIB) * MIB)
    for task in tasks:
        if (sample := _sample_bytes(task)) > mib * MIB:
            raise ConfigError(
                f"config.execution.result_mib = {mib} is too small for {task.id!r}: its sample submission has {sample / MIB:.1f} MiB."
                f" Set it to 0, which derives {-(-_needed(task) // MIB)} from the sample, or to at least {-(-2 * sample // MIB)}."
            )
    return mib * MIB


def stated_bytes(tasks: Sequence[AnyTask], mib: int) -> int:
    """The limit if prompts must state it, since a submission may come near it or the user set it; otherwise 0."""
    limit = result_bytes(tasks, mib)
    return limit if mib or max(map(_needed, tasks)) > _STATED_FRACTION * limit else 0


@functools.lru_cache(maxsize=64)
def needed_bytes(sample: Path) -> int:
    """The size that an honest submission can have: twice that of the sample submission, and 32 bytes for each predicted number.

    Predictions are longer than the zeros and ones of many samples.
    """
    data = sample.read_bytes()
    header, _, rows = data.partition(b"\n")
    return 2 * len(data) + _CELL_BYTES * header.count(b",") * rows.count(b"\n")


def _samples(task: AnyTask) -> list[Path]:
    return [folder / "sample_submission.csv" for folder in task.public_dirs] if isinstance(task, Task) else []


def _needed(task: AnyTask) -> int:
    return max(map(needed_bytes, _samples(task)), default=0)


def _sample_bytes(task: AnyTask) -> int:
    return max((sample.stat().st_size for sample in _samples(task)), default=0)
