"""What ids and labels are graded as. pandas infers types, so that 7 and 007 are the same id and 1 and 1.0 the same label, as in MLE-bench.

Two kinds of columns need care. Ids of different text may be one number, such as 1.1 and 1.10: a submission could then not name its rows.
And labels that are text may look like numbers or like missing values in a table that lacks some of them.
"""

from collections.abc import Sequence

import pandas as pd

from discover_jax.tasks.tables import read_table


def inferred(texts: Sequence[str]) -> list:
    """The values that pandas reads from the cells of one column, together."""
    # The second column keeps rows whose cell is empty: pandas skips blank lines.
    data = pd.DataFrame({"value": list(texts), "row": 0}).to_csv(index=False, lineterminator="\r\n").encode()
    return read_table(data)["value"].tolist()


def merged_ids(ids: Sequence[str]) -> tuple[str, str] | None:
    """Two ids of different text that pandas reads as the same value; None if all stay different.

    Args:
      ids: the text of all ids of one submission, all different.
    """
    values = inferred(ids)
    if pd.Series(values).is_unique:
        return None
    seen: dict[object, str] = {}
    for text, value in zip(ids, values, strict=True):
        key = None if pd.isna(value) else value
        if key in seen:
            return seen[key], text
        seen[key] = text
    return None


def is_text(labels: Sequence[str]) -> bool:
    """Whether labels are text: not all of them are numbers, or not all of them truth values. Empty cells do not count."""
    return any(isinstance(value, str) for value in inferred([label for label in labels if label]))


def hidden_labels(labels: Sequence[str]) -> list[str]:
    """The different labels that pandas takes for missing values though they are not empty, such as `NA` and `None`."""
    shown = sorted({label for label in labels if label})
    return [label for label, value in zip(shown, inferred(shown), strict=True) if pd.isna(value)]


def text_labels(tables: Sequence[pd.DataFrame], column: str, *, complete: bool) -> bool:
    """Whether the labels in a column are text, from the labels of all tables that are known at preparation.

    Args:
      tables: of text, see `read_text_table`.
      complete: whether no label of the last table is missing, so that a text such as `NA` in it is a class.
    """
    # Truth values in one table and numbers in another stay what they are: True equals 1.
    return any(is_text(table[column].tolist()) for table in tables) or (complete and bool(hidden_labels(tables[-1][column].tolist())))


def text_predictions(labels: Sequence[str], sample: Sequence[str]) -> bool:
    """Whether predictions of text labels are text, too: labels, and not probabilities. The sample submission tells.

    Args:
      labels: all labels that are known at preparation.
      sample: predictions of the sample submission.
    """
    return set(sample) <= set(labels) or is_text(sample)
