"""Reading CSV as MLE-bench does, so that scores and checksums agree with it."""

import io
from typing import Any

import pandas as pd

# MLE-bench asks for floats that survive a round trip; pandas does so by itself since 3.1, which warns if it is asked.
_ROUND_TRIP: dict[str, Any] = (
    {} if tuple(int(part) for part in pd.__version__.split(".")[:2]) >= (3, 1) else {"float_precision": "round_trip"}
)


def read_table(data: bytes) -> pd.DataFrame:
    """A table with the types that pandas infers. An empty file is an empty table.

    Raises:
      ValueError: not a CSV (pandas' ParserError), or not UTF-8 (UnicodeDecodeError); both derive from it.
    """
    try:
        # low_memory would infer types by chunks, and so give one column of a long file several types.
        return pd.read_csv(io.BytesIO(data), low_memory=False, **_ROUND_TRIP)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def read_text_table(data: bytes) -> pd.DataFrame:
    """A table whose cells are the file's own text, so that rows can be moved between files unchanged. Raises as `read_table`."""
    return pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
