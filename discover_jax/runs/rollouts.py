"""rollouts/: prompts and replies, one Parquet file per step, for reading and plotting. The run itself never reads them."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastparquet
import pandas as pd

from discover_jax.exceptions import ConfigError
from discover_jax.files import atomic_file

_TEXT, _COUNT, _NUMBER, _YES_NO = "object", "int64", "float64", "bool"

COLUMNS: dict[str, str] = {
    "id": _TEXT,
    "parent_id": _TEXT,
    "prompt_id": _TEXT,
    "task": _TEXT,
    "step": _COUNT,
    "group": _COUNT,
    "index": _COUNT,
    "prompt": _TEXT,
    "reply": _TEXT,
    "program": _TEXT,
    "prompt_tokens": _COUNT,
    "tokens": _COUNT,
    "stop": _TEXT,
    "temperature": _NUMBER,
    "logprob_sum": _NUMBER,
    "outcome": _TEXT,
    "score": _NUMBER,
    "reward": _NUMBER,
    "advantage": _NUMBER,
    "seconds": _NUMBER,
    "cached": _YES_NO,
}
"""Name -> type, in the order of a file; docs/run_folder.md defines them. Texts and numbers may be missing, counts may not."""

_ROWS_AT_ONCE = 512
"""Rows of a row group. The writer holds a second copy of a row group's texts in memory; 6,000 replies of 26,000 tokens are 600 MB."""


def write_rollouts(directory: Path, step: int, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes step-NNNNNN.parquet atomically, one row per rollout. A resumed run replaces the files of steps that it repeats.

    Args:
      directory: an existing folder.
      step: from 0.
      rows: each with all names of COLUMNS; None for a missing value.

    Returns:
      The file's path.

    Raises:
      ConfigError: a name is not in COLUMNS, or one is missing.
      RunError: the disk is full or fails.
    """
    for row in rows:
        if row.keys() != COLUMNS.keys():
            raise ConfigError(
                "A rollout row does not match discover_jax.runs.rollouts.COLUMNS: unknown"
                f" {sorted(row.keys() - COLUMNS.keys())}, missing {sorted(COLUMNS.keys() - row.keys())}."
            )
    table = pd.DataFrame(
        {name: pd.Series([_stored(row[name]) for row in rows], dtype=kind) for name, kind in COLUMNS.items()}, columns=list(COLUMNS)
    )
    path = directory / f"step-{step:06d}.parquet"
    with atomic_file(path) as file:
        fastparquet.write(
            str(path),
            table,
            row_group_offsets=_ROWS_AT_ONCE,
            compression="ZSTD",
            open_with=lambda *_: contextlib.nullcontext(file),
            write_index=False,
            object_encoding="utf8",
        )
    return path


def _stored(value: Any) -> Any:
    """The value, with lone surrogates escaped: a program may print them, but UTF-8 cannot encode them."""
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-8", "backslashreplace").decode()
