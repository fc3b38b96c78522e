"""Grading a submission against the answers, with MLE-bench's rules in MLE-bench's order, and a reason for every rejection."""

import csv
import dataclasses
import io
import itertools
import math

import numpy as np
import pandas as pd

from discover_jax.tasks.competition import Metric
from discover_jax.tasks.tables import read_table
from discover_jax.types import Grade

# A wide margin over the executor's own limit on what a program may return.
MAX_SUBMISSION_BYTES = 64 << 20
# pandas spends seconds and gigabytes on a table of a million columns; extra columns are ignored, so that many are never needed.
_MAX_COLUMNS = 1024
_MAX_REASON = 500


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a submission is compared with.

    Attributes:
      id_column, target: names of the two columns of `table`.
      table: one row an answer.
      private_R: bool, True for the rows of the private answers, False for those held out of the public table.
    """

    id_column: str
    target: str
    table: pd.DataFrame
    private_R: np.ndarray

    @property
    def has_holdout(self) -> bool:
        return not bool(self.private_R.all())


class _InvalidSubmission(Exception):
    """Carries the reason to `grade`; never leaves this module."""


def grade(submission: bytes, answers: Answers, metric: Metric) -> Grade:
    """The verdict on a submission. Never raises, whatever the bytes: they come from a program that nobody trusts.

    In MLE-bench's order, a submission is rejected unless it has as many rows as the answers, a target column, an id column, and the same
    ids (in any order). Other columns are ignored. Then the metric must accept its values. Scores are rounded to 5 places.

    Args:
      submission: a CSV file.
      answers: private answers and, for the reward `holdout`, the held-out rows; the submission must have all of them.
      metric: applied to the two kinds of rows apart.
    """
    try:
        answers_R, predictions_R, private_R = _align(_parse(submission), answers)
        private_score = _score(metric, answers_R[private_R], predictions_R[private_R])
        score = _score(metric, answers_R[~private_R], predictions_R[~private_R]) if answers.has_holdout else private_score
    except _InvalidSubmission as invalid:
        return Grade(valid=False, reason=str(invalid)[:_MAX_REASON], score=None, private_score=None)
    return Grade(valid=True, reason="", score=score, private_score=private_score)


def _parse(submission: bytes) -> pd.DataFrame:
    if len(submission) > MAX_SUBMISSION_BYTES:
        raise _InvalidSubmission(f"The submission has {len(submission):,} bytes; at most {MAX_SUBMISSION_BYTES:,} are read.")
    try:
        text = submission.decode("utf-8")
        # The header, and the first row: pandas would take surplus fields of that row for index columns. It refuses longer rows after it.
        start = itertools.islice((row for row in csv.reader(io.StringIO(text, newline="")) if row), 2)
        width = max((len(row) for row in start), default=0)
        if width > _MAX_COLUMNS:
            raise _InvalidSubmission(f"The submission has {width:,} columns; at most {_MAX_COLUMNS:,} are read.")
        return read_table(submission)
    except UnicodeDecodeError as error:
        raise _InvalidSubmission(f"The submission is not UTF-8 text: {error}.") from error
    except (csv.Error, ValueError) as error:  # pandas' ParserError is a ValueError
        raise _InvalidSubmission(f"The submission is not a CSV table: {str(error).strip()}.") from error


def _align(submission: pd.DataFrame, answers: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers, predictions, and which are private, all in the order of the sorted ids."""
    id_column, target = answers.id_column, answers.target
    if len(submission) != len(answers.table):
        raise _InvalidSubmission(
            f"The submission has {len(submission):,} rows; it must have {len(answers.table):,}, one for each row of test.csv."
        )
    for column in (target, id_column):
        if column not in submission.columns:
            listed = ", ".join(map(str, submission.columns[:20]))
            raise _InvalidSubmission(f"The submission has no column {column!r}; its columns are: {listed}.")
    order_R = np.argsort(answers.table[id_column].to_numpy(), kind="stable")
    try:
        submission = submission.sort_values(id_column, kind="stable")
    except TypeError as error:
        raise _InvalidSubmission(f"The ids in column {id_column!r} are of several types: {error}.") from error
    expected = answers.table[id_column].to_numpy()[order_R].tolist()
    found = submission[id_column].to_numpy().tolist()
    if found != expected:
        raise _InvalidSubmission(_describe_ids(id_column, found, expected))
    predictions_R = np.asarray(submission[target])
    missing = int(pd.isna(predictions_R).sum())
    if missing:
        raise _InvalidSubmission(f"{missing:,} of the {len(predictions_R):,} predictions in column {target!r} are missing.")
    if np.issubdtype(predictions_R.dtype, np.number) and not np.isfinite(predictions_R).all():
        raise _InvalidSubmission(f"Column {target!r} holds infinite values.")
    return answers.table[target].to_numpy()[order_R], predictions_R, answers.private_R[order_R]


def _describe_ids(id_column: str, found: list, expected: list) -> str:
    """What is wrong with ids that do not match."""
    parts = [f"The ids in column {id_column!r} are not those of test.csv"]
    repeated = len(found) - len(set(found))
    if repeated:
        parts.append(f"{repeated:,} repeated")
    for word, ids in (("unknown", set(found) - set(expected)), ("missing", set(expected) - set(found))):
        if ids:
            parts.append(f"{len(ids):,} {word}, such as {min(ids, key=str)!r}")
    return "; ".join(parts) + "."


def _score(metric: Metric, answers_R: np.ndarray, predictions_R: np.ndarray) -> float:
    try:
        score = float(metric.function(answers_R, predictions_R))
    except Exception as error:  # whatever a metric raises on values that it cannot judge is the reason
        raise _InvalidSubmission(
            f"{metric.name} cannot be computed from these predictions: {str(error) or type(error).__name__}."
        ) from error
    if not math.isfinite(score):
        raise _InvalidSubmission(f"{metric.name} of these predictions is {score}.")
    return round(score, 5)
