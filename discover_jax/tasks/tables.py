"""Reading CSV as MLE-bench does, so that scores and checksums agree with it, and as plain text, so that rows can be moved unchanged."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

# MLE-bench asks for floats that survive a round trip; pandas does so by itself since 3.1, which warns if it is asked.
_ROUND_TRIP: dict[str, Any] = (
    {} if tuple(int(part) for part in pd.__version__.split(".")[:2]) >= (3, 1) else {"float_precision": "round_trip"}
)


def read_table(data: bytes, text_columns: Sequence[str] = (), most_rows: int | None = None) -> pd.DataFrame:
    """A table with the types that pandas infers. An empty file is an empty table.

    Args:
      text_columns: columns that keep their text instead: only an empty cell is missing, and `NA` or `None` is a text like others. Names
        that the table lacks are ignored.
      most_rows: rows after these are not read; None: all are.

    Raises:
      ValueError: not a CSV (pandas' ParserError), or not UTF-8 (UnicodeDecodeError); both derive from it.
    """
    try:
        # low_memory would infer types by chunks, and so give one column of a long file several types.
        table = pd.read_csv(io.BytesIO(data), low_memory=False, nrows=most_rows, **_ROUND_TRIP)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    if shown := [column for column in text_columns if column in table.columns]:
        texts = pd.read_csv(io.BytesIO(data), usecols=shown, dtype=str, keep_default_na=False, nrows=most_rows)
        for column in shown:
            table[column] = texts[column].astype(object).where(texts[column] != "", None).to_numpy()
    return table


def read_text_table(data: bytes) -> pd.DataFrame:
    """A table whose cells are the file's own text, so that rows can be moved between files unchanged.

    Raises:
      ValueError: as `read_table`; or the file is empty or holds NUL bytes, or its rows have more fields than its first line has names.
    """
    if b"\0" in data:  # UTF-16, or not text at all: decoded as UTF-8 it might pass for a table
        raise ValueError("it holds NUL bytes; write it as UTF-8")
    table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    # pandas takes surplus fields of the second line for an index, but refuses them without a header.
    pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False, header=None, nrows=2)
    return table


def write_text_table(table: pd.DataFrame, path: Path) -> None:
    """Writes a table of `read_text_table`. Reading it again gives the same cells."""
    text = table.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # the csv module of some versions of Python leaves a carriage return without quotes, which ends the row
        text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)
    path.write_bytes(text.encode())
