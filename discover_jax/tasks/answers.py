"""The private answers and those of held-out rows: read from a prepared folder, checked, and typed."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from discover_jax.exceptions import DataError
from discover_jax.tasks import grading
from discover_jax.tasks.tables import read_table, read_text_table


@dataclasses.dataclass(frozen=True)
class TextColumns:
    """Target columns whose values are text, as decided when the task was prepared; pandas infers the type of others.

    Attributes:
      answers: columns whose answers are text.
      predictions: those of them whose predictions are text, too; not probabilities.
    """

    answers: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a competition: see `Competition`, where `classes` is a mapping."""

    id_column: str
    target: str | tuple[str, ...]
    classes: tuple[tuple[str, str], ...]
    text: TextColumns

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


@functools.lru_cache(maxsize=128)
def load_answers(
    private: Path,
    digests: tuple[tuple[str, str], ...],
    columns: Columns,
    training: Path | None,
    private_counts: bool,
) -> grading.Answers:
    """Reads and checks the answers, once per process.

    Args:
      private: the folder of the answers.
      digests: file and sha256 of the private answers, then of the answers of held-out rows.
      columns: of the competition.
      training: the training table that the held-out rows come from; None if there are none.
      private_counts: see `grading.Answers`.

    Raises:
      DataError: a file is missing or was altered.
    """
    parts = []
    for name, digest in digests:
        path = private / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"The answers {path} cannot be read ({error}). Delete {private.parent} to prepare the task again.") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataError(f"The answers {path} changed since they were prepared. Delete {private.parent} to prepare the task again.")
        parts.append(data)
    answers = grading.Answers(
        columns.id_column,
        columns.target,
        read_table(parts[0], columns.text.answers),
        private_counts=private_counts,
        text=columns.text.predictions,
        classes=columns.classes,
    )
    if training is None:
        return answers
    tables = [read_text_table(part) for part in parts]
    # pandas infers types. The type of labels comes from all labels of the original training table, not from private ones; the type of ids
    # comes from all ids together, as in a submission.
    ids = _typed([table[columns.id_column] for table in tables])
    withheld = [pd.DataFrame({columns.id_column: ids_R}) for ids_R in ids[1:]]
    shown = read_text_table(training.read_bytes())
    for target in columns.labels:
        labels = [shown[target], *(table[target] for table in tables[1:])]
        typed = [column.to_numpy(object) for column in labels] if target in columns.text.answers else _typed(labels)
        for table, labels_R in zip(withheld, typed[1:], strict=True):
            table[target] = labels_R
    held_out, selection = [*withheld, None][:2]
    private_table = answers.private.assign(**{columns.id_column: ids[0]})
    return dataclasses.replace(answers, private=private_table, held_out=held_out, selection=selection)


def _typed(columns: Sequence[Any]) -> list[np.ndarray]:
    """Columns of text with the type that pandas infers for all of them together."""
    values = read_table(pd.concat(columns).to_csv(index=False).encode()).iloc[:, 0].to_numpy()
    return np.split(values, np.cumsum([len(column) for column in columns])[:-1])
