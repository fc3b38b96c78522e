"""Grades a submission against the answers by MLE-bench's rules in MLE-bench's order, with a reason for every rejection."""

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from discover_jax.tasks.competition import Competition, Metric
from discover_jax.tasks.tables import read_table
from discover_jax.types import Grade

# Far above the executor's own limit on submissions.
MAX_SUBMISSION_BYTES = 64 << 20
# pandas needs seconds and gigabytes for a table of a million columns. Extra columns are ignored, so no submission needs many.
_MAX_COLUMNS = 1024
_MAX_REASON = 500


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers that a submission is compared with. It must have all of their rows.

    Attributes:
      id_column, target: names of the id and target columns; both empty if only the competition's `judge` knows the format.
      private: the private answers, one per row.
      held_out: answers of rows held out of the training table; None if there are none.
      private_counts: False if the private answers are only for the record. Then only `Grade.private_score` depends on their values; the
        score, the validity of the submission and the reason do not.
    """

    id_column: str
    target: str
    private: pd.DataFrame
    held_out: pd.DataFrame | None = None
    private_counts: bool = True


class _InvalidSubmission(Exception):
    """Carries the reason to `grade`; never leaves this module."""


def grade(submission: bytes, answers: Answers, competition: Competition) -> Grade:
    """Grades a submission. Never raises, whatever the bytes: they come from an untrusted program.

    A submission must have, checked in MLE-bench's order: as many rows as the answers, a target column, an id column, and the same ids (in
    any order). Other columns are ignored. Then the metric must accept its values. Scores are rounded to 5 places. If the competition has a
    `judge`, the judge gets the submitted rows as they are and makes its own checks.

    Args:
      submission: a CSV file.
      answers: private and held-out rows are scored separately.
      competition: provides the metric or the judge.

    Returns:
      A Grade. The score of a valid submission is None if the private answers do not count and there are no held-out rows.
    """
    try:
        table = _parse(submission)
        if competition.judge is None:
            kinds = _aligned(table, answers, competition.metric)
        else:
            kinds = _whole(table, answers, competition.judge, competition.metric.name)
        score = kinds.held_out() if answers.held_out is not None else None
        private_score = None
        try:
            private_score = kinds.private()
        except _InvalidSubmission:
            if answers.private_counts:
                raise
    except _InvalidSubmission as invalid:
        return Grade(valid=False, reason=str(invalid)[:_MAX_REASON], score=None, private_score=None)
    return Grade(valid=True, reason="", score=private_score if answers.private_counts else score, private_score=private_score)


def scored_rows(submission: bytes, answers: Answers, *, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Answers and predictions of the held-out or private rows, as arguments of the metric, for a valid submission.

    Raises:
      ValueError: the submission is not valid.
    """
    table = answers.held_out if held_out else answers.private
    assert table is not None, "asked for only where there are such rows"
    try:
        return _pairs(_sorted(_parse(submission), answers), table, answers)
    except _InvalidSubmission as invalid:
        raise ValueError(str(invalid)) from invalid


@dataclasses.dataclass(frozen=True)
class _Kinds:
    """Functions that compute a submission's score on each kind of rows; each may raise _InvalidSubmission."""

    private: Callable[[], float]
    held_out: Callable[[], float]


def _parse(submission: bytes) -> pd.DataFrame:
    if len(submission) > MAX_SUBMISSION_BYTES:
        raise _InvalidSubmission(f"The submission has {len(submission):,} bytes; at most {MAX_SUBMISSION_BYTES:,} are read.")
    try:
        text = submission.decode("utf-8")
        # Check the header and the first row: pandas takes surplus fields of that row for index columns. It rejects longer rows after it.
        start = itertools.islice((row for row in csv.reader(io.StringIO(text, newline="")) if row), 2)
        width = max((len(row) for row in start), default=0)
        if width > _MAX_COLUMNS:
            raise _InvalidSubmission(f"The submission has {width:,} columns; at most {_MAX_COLUMNS:,} are read.")
        return read_table(submission)
    except UnicodeDecodeError as error:
        raise _InvalidSubmission(f"The submission is not UTF-8 text: {error}.") from error
    except (csv.Error, ValueError) as error:  # pandas' ParserError is a ValueError
        raise _InvalidSubmission(f"The submission is not a CSV table: {str(error).strip()}.") from error


def _aligned(submission: pd.DataFrame, answers: Answers, metric: Metric) -> _Kinds:
    """Scores by the metric on each kind of rows, in the order of their ids."""
    rows = _sorted(submission, answers)

    def score_on(table: pd.DataFrame) -> float:
        answers_R, predictions_R = _pairs(rows, table, answers)
        return _score(metric.name, lambda: metric.function(answers_R, predictions_R))

    return _kinds(answers, score_on)


def _pairs(rows: pd.DataFrame, table: pd.DataFrame, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Answers and predictions of a table's rows in the order of their ids; `rows` is a submission from `_sorted`."""
    ordered = table.sort_values(answers.id_column, kind="stable")
    mine_R = rows.index.isin(ordered[answers.id_column].to_numpy())
    return ordered[answers.target].to_numpy(), rows[answers.target].to_numpy()[mine_R]


def _whole(submission: pd.DataFrame, answers: Answers, judge: Callable[[pd.DataFrame, pd.DataFrame], float], name: str) -> _Kinds:
    """Scores by the judge on the submission as it is or, with held-out rows, on each kind of rows."""
    if answers.held_out is None:
        return _kinds(
            answers, lambda table: _score(name, lambda: judge(submission.copy(), table.copy()))
        )  # copies: a judge may change them
    rows = _sorted(submission, answers)

    def score_on(table: pd.DataFrame) -> float:
        mine = rows.loc[rows.index.isin(table[answers.id_column].to_numpy())].reset_index(drop=True)
        return _score(name, lambda: judge(mine, table.copy()))

    return _kinds(answers, score_on)


def _kinds(answers: Answers, score_on: Callable[[pd.DataFrame], float]) -> _Kinds:
    def held_out() -> float:
        assert answers.held_out is not None, "asked for only where there are such rows"
        return score_on(answers.held_out)

    return _Kinds(private=lambda: score_on(answers.private), held_out=held_out)


def _sorted(submission: pd.DataFrame, answers: Answers) -> pd.DataFrame:
    """The submission sorted by id, with the ids as index, after checking its rows and columns."""
    id_column, target = answers.id_column, answers.target
    ids = pd.Series(pd.concat([answers.private[id_column], *([] if answers.held_out is None else [answers.held_out[id_column]])]))
    if len(submission) != len(ids):
        raise _InvalidSubmission(f"The submission has {len(submission):,} rows; it must have {len(ids):,}, one for each row of test.csv.")
    for column in (target, id_column):
        if column not in submission.columns:
            listed = ", ".join(map(str, submission.columns[:20]))
            raise _InvalidSubmission(f"The submission has no column {column!r}; its columns are: {listed}.")
    try:
        submission = submission.sort_values(id_column, kind="stable")
    except TypeError as error:
        raise _InvalidSubmission(f"The ids in column {id_column!r} are of several types: {error}.") from error
    expected = ids.sort_values(kind="stable").tolist()
    found = submission[id_column].to_numpy().tolist()
    if found != expected:
        raise _InvalidSubmission(_describe_ids(id_column, found, expected))
    predictions_R = np.asarray(submission[target])
    missing = int(pd.isna(predictions_R).sum())
    if missing:
        raise _InvalidSubmission(f"{missing:,} of the {len(predictions_R):,} predictions in column {target!r} are missing.")
    if np.issubdtype(predictions_R.dtype, np.number) and not np.isfinite(predictions_R).all():
        raise _InvalidSubmission(f"Column {target!r} holds infinite values.")
    return submission.set_index(id_column, drop=False)


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


def _score(name: str, compute: Callable[[], float]) -> float:
    try:
        score = float(compute())
    except Exception as error:  # any error of a metric is the reason of the rejection
        raise _InvalidSubmission(
            f"{name} cannot be computed from these predictions: {str(error).rstrip('.') or type(error).__name__}."
        ) from error
    if not math.isfinite(score):
        raise _InvalidSubmission(f"{name} of these predictions is {score}.")
    return round(score, 5)
