"""rollouts/: what the policy wrote, one Parquet file a step, for reading and plotting. The run itself never reads it back."""

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
"""Name -> type, in the order of a file; docs/run_folder.md says what each means. Texts and numbers may be missing, counts may not."""

_ROWS_AT_ONCE = 512
"""Rows of a row group, all of whose texts are in memory at once in another form: 6,000 replies of 26,000 tokens are 600 MB."""


def write_rollouts(directory: Path, step: int, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes step-NNNNNN.parquet, one row a rollout, all or nothing; a resumed run replaces the file of a step that it does again.

    Args:
      directory: exists.
      step: from 0.
      rows: each with all names of COLUMNS; None for what is missing.

    Returns:
      The file's path.

    Raises:
      ConfigError: a name is not in COLUMNS, or one is missing.
      RunError: the disk is full or fails.
    """
    for row in rows:
        if row.keys() != COLUMNS.keys():
            raise ConfigError(
                "A row of rollouts does not fit discover_jax.runs.rollouts.COLUMNS: unknown"
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
    """The value, lone surrogates of a text as escapes: UTF-8 has none, and what a program printed may hold some."""
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-8", "backslashreplace").decode()
