"""Grades a submission against the answers by MLE-bench's rules in MLE-bench's order, with a reason for every rejection."""

import csv
import dataclasses
import io
import itertools
import logging
import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from discover_jax import row_results
from discover_jax.tasks.competition import Competition, Metric
from discover_jax.tasks.tables import read_table
from discover_jax.types import Grade

# pandas needs seconds and gigabytes for a table of a million columns. Extra columns are ignored, so no submission needs many.
_MAX_COLUMNS = 1024
# pandas fills short rows up to the header's width. No table that it wrote has short rows, and then a cell takes at least a byte.
_CELLS_PER_BYTE, _SPARE_CELLS = 4, 1_000_000
_MAX_REASON = 500
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers that a submission is compared with. It must have all of their rows.

    Attributes:
      id_column, target: names of the id column and the target column or columns; both empty if only the competition's `judge` knows the
        format.
      private: the private answers, one per row.
      held_out: answers of rows held out of the training table for rewards; None if there are none.
      selection: answers of further rows held out of it, for the choice of the best program; None if there are none.
      private_counts: False if the private answers are only for the record. Then only `Grade.private_score` depends on their values; the
        score, the validity of the submission and the reason do not.
      text: target columns whose predictions are text: only an empty cell is missing. pandas infers the type of others, as for MLE-bench.
      classes: label and column of the submission for each class, if probabilities of the classes are predicted. The answers are then text.
    """

    id_column: str
    target: str | tuple[str, ...]
    private: pd.DataFrame
    held_out: pd.DataFrame | None = None
    selection: pd.DataFrame | None = None
    private_counts: bool = True
    text: tuple[str, ...] = ()
    classes: tuple[tuple[str, str], ...] = ()

    @property
    def submitted(self) -> tuple[str, ...]:
        """The columns of predictions."""
        if self.classes:
            return tuple(column for _, column in self.classes)
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def tables(self) -> list[pd.DataFrame]:
        """All of the tables, whose rows a submission must have."""
        return [table for table in (self.private, self.held_out, self.selection) if table is not None]


class _InvalidSubmission(Exception):
    """Carries the reason to `grade`; never leaves this module."""


def grade(submission: bytes, answers: Answers, competition: Competition) -> Grade:
    """Grades a submission. Never raises, whatever the bytes: they come from an untrusted program. Only a MemoryError passes.

    A submission must have, checked in MLE-bench's order: as many rows as the answers, a target column, an id column, and the same ids (in
    any order). Other columns are ignored. Then the metric must accept its values. Scores are rounded to 5 places. If the competition has a
    `judge`, the judge gets the submitted rows as they are and makes its own checks.

    Args:
      submission: a CSV file.
      answers: private rows, held-out rows and those for selection are scored separately.
      competition: provides the metric or the judge.

    Returns:
      A Grade. The score of a valid submission is None if the private answers do not count and there are no held-out rows. The results of
      single rows are missing if the metric has no `influence`.
    """
    try:
        # A judge makes its own checks. Otherwise, one row too many is enough to see that there are too many.
        most_rows = sum(map(len, answers.tables)) + 1 if competition.judge is None else None
        table = _parse(submission, answers, most_rows)
        score_on = _by_metric(table, answers, competition.metric) if competition.judge is None else _by_judge(table, answers, competition)
        scored = score_on(answers.held_out) if answers.held_out is not None else None
        selected = score_on(answers.selection) if answers.selection is not None else None
        private = None
        try:
            private = score_on(answers.private)
        except _InvalidSubmission:
            if answers.private_counts:
                raise
    except _InvalidSubmission as invalid:
        return Grade(valid=False, reason=str(invalid)[:_MAX_REASON], score=None, private_score=None)
    except MemoryError:
        raise
    except Exception as error:  # pandas and numpy raise many types for unforeseen tables
        _log.warning("A submission is rejected because grading it failed.", exc_info=True)
        return Grade(valid=False, reason=f"Grading the submission failed: {_text(error)}"[:_MAX_REASON], score=None, private_score=None)
    counting = private if answers.private_counts else scored
    return Grade(
        valid=True,
        reason="",
        score=None if counting is None else counting.score,
        private_score=None if private is None else private.score,
        rows="" if counting is None else counting.rows,
        selection_score=None if selected is None else selected.score,
        selection_rows="" if selected is None else selected.rows,
    )


def scored_rows(submission: bytes, answers: Answers, *, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Answers and predictions of the held-out or private rows, as arguments of the metric, for a valid submission.

    Raises:
      ValueError: the submission is not valid.
    """
    table = answers.held_out if held_out else answers.private
    assert table is not None, "asked for only where there are such rows"
    try:
        return _pairs(_sorted(_parse(submission, answers), answers), table, answers)
    except _InvalidSubmission as invalid:
        raise ValueError(str(invalid)) from invalid


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A score to 5 places, and the results of its rows (see `row_results.encode`); "" if the metric has none."""

    score: float
    rows: str = ""


_ScoreOn = Callable[[pd.DataFrame], _Scored]
"""Scores a submission on one of the tables of answers. It may raise _InvalidSubmission."""


def _text(error: Exception) -> str:
    try:
        return f"{str(error).rstrip('.') or type(error).__name__}."
    except Exception:  # for example an error about an integer of too many digits
        return f"{type(error).__name__}."


def _parse(submission: bytes, answers: Answers, most_rows: int | None = None) -> pd.DataFrame:
    """The submission as a table, of at most `most_rows` rows if that is given."""
    try:
        text = submission.decode("utf-8")
        # Check the header and the first row: pandas takes surplus fields of that row for index columns. It rejects longer rows after it.
        start = itertools.islice((row for row in csv.reader(io.StringIO(text, newline="")) if row), 2)
        width = max((len(row) for row in start), default=0)
        most = _MAX_COLUMNS + len(answers.submitted) - 1
        if width > most:
            raise _InvalidSubmission(f"The submission has {width:,} columns; at most {most:,} are read.")
        rows = min(submission.count(b"\n") + submission.count(b"\r") + 1, most_rows or len(submission))
        if rows * width > _CELLS_PER_BYTE * len(submission) + _SPARE_CELLS:
            raise _InvalidSubmission(
                f"The submission has {width:,} columns and about {rows:,} rows in {len(submission):,} bytes, so most rows are shorter than"
                " the longest. Each row must have a field for each column."
            )
        return read_table(submission, answers.text, most_rows)
    except UnicodeDecodeError as error:
        raise _InvalidSubmission(f"The submission is not UTF-8 text: {error}.") from error
    except (csv.Error, ValueError) as error:  # pandas' ParserError is a ValueError
        raise _InvalidSubmission(f"The submission is not a CSV table: {str(error).strip()}.") from error


def _by_metric(submission: pd.DataFrame, answers: Answers, metric: Metric) -> _ScoreOn:
    """Scores by the metric, in the order of the rows' ids."""
    rows = _sorted(submission, answers)

    def score_on(table: pd.DataFrame) -> _Scored:
        answers_R, predictions_R = _pairs(rows, table, answers)
        score = _score(metric.name, lambda: metric.function(answers_R, predictions_R))
        if metric.influence is None:
            return _Scored(score)
        return _Scored(score, _row_results(metric, answers_R, predictions_R))

    return score_on


def _pairs(rows: pd.DataFrame, table: pd.DataFrame, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Answers and predictions of a table's rows in the order of their ids; `rows` is a submission from `_sorted`. See `Metric.function`."""
    ordered = table.sort_values(answers.id_column, kind="stable")
    mine_R = rows.index.isin(ordered[answers.id_column].to_numpy())
    if answers.classes:
        return _one_hot(ordered, answers), _values(rows, answers.submitted)[mine_R]
    if isinstance(answers.target, tuple):
        return _values(ordered, answers.target), _values(rows, answers.target)[mine_R]
    return ordered[answers.target].to_numpy(), rows[answers.target].to_numpy()[mine_R]


def _values(table: pd.DataFrame, columns: tuple[str, ...]) -> np.ndarray:
    """The cells of several columns, as an array of rows and columns."""
    return table[list(columns)].to_numpy()


def _one_hot(table: pd.DataFrame, answers: Answers) -> np.ndarray:
    """For each row and class, 1.0 if the row's label is the class, otherwise 0.0."""
    labels_R1 = table[[answers.target]].to_numpy(object)
    return (labels_R1 == np.array([label for label, _ in answers.classes], object)).astype(np.float64)


def perfect_submission(answers: Answers, *, probabilities: bool = False) -> bytes:
    """The answers as a submission: the labels, or 1 for the class of each row and 0 for the others.

    Args:
      probabilities: replace two labels by 0 and 1, in the order in which metrics such as log loss and ROC AUC sort classes.
    """
    table = pd.concat(answers.tables)
    if not answers.id_column:
        return table.to_csv(index=False).encode()
    if probabilities:
        two = [column for column in answers.submitted if column in table and len(set(table[column])) == 2]
        table = table.assign(**{column: (table[column] == sorted(table[column].unique())[1]).astype(float) for column in two})
    if answers.classes:
        predictions = pd.DataFrame(_one_hot(table, answers), columns=list(answers.submitted), index=table.index)
        table = pd.concat([table[[answers.id_column]], predictions], axis=1)
    return table[[answers.id_column, *answers.submitted]].to_csv(index=False).encode()


def has_labels(data: bytes, answers: Answers) -> bool:
    """Whether a submission predicts labels that occur in the answers."""
    submission, labels = read_table(data, answers.text), pd.concat(answers.tables)
    columns = [column for column in answers.submitted if column in labels and column in submission]
    return bool(columns) and all(set(submission[column]) <= set(labels[column]) for column in columns)


def _by_judge(submission: pd.DataFrame, answers: Answers, competition: Competition) -> _ScoreOn:
    """Scores by the judge: the submission as it is, or its rows of a table if there are several."""
    judge, name = competition.judge, competition.metric.name
    assert judge is not None, "the caller has checked"
    if len(answers.tables) == 1:
        return lambda table: _Scored(_score(name, lambda: judge(submission.copy(), table.copy())))  # copies: a judge may change them
    rows = _sorted(submission, answers)

    def score_on(table: pd.DataFrame) -> _Scored:
        mine = rows.loc[rows.index.isin(table[answers.id_column].to_numpy())].reset_index(drop=True)
        return _Scored(_score(name, lambda: judge(mine, table.copy())))

    return score_on


def _sorted(submission: pd.DataFrame, answers: Answers) -> pd.DataFrame:
    """The submission sorted by id, with the ids as index, after checking its rows and columns."""
    id_column = answers.id_column
    ids = pd.Series(pd.concat([table[id_column] for table in answers.tables]))
    if len(submission) != len(ids):
        count = f"{'at least ' if len(submission) > len(ids) else ''}{len(submission):,} rows"
        raise _InvalidSubmission(f"The submission has {count}; it must have {len(ids):,}, one for each row of test.csv.")
    for column in (*answers.submitted, id_column):
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
    for column in answers.submitted:
        _check_predictions(column, np.asarray(submission[column]))
    return submission.set_index(id_column, drop=False)


def _check_predictions(column: str, predictions_R: np.ndarray) -> None:
    missing = int(pd.isna(predictions_R).sum())
    if missing:
        raise _InvalidSubmission(f"{missing:,} of the {len(predictions_R):,} predictions in column {column!r} are missing.")
    if np.issubdtype(predictions_R.dtype, np.number) and not np.isfinite(predictions_R).all():
        raise _InvalidSubmission(f"Column {column!r} holds infinite values.")


def _row_results(metric: Metric, answers_R: np.ndarray, predictions_R: np.ndarray) -> str:
    assert metric.influence is not None, "the caller has checked"
    try:
        influence_R = np.asarray(metric.influence(answers_R, predictions_R), np.float64)
        if influence_R.shape != answers_R.shape[:1]:
            raise ValueError(f"it has the shape {influence_R.shape} for {len(answers_R)} rows")
    except Exception as error:  # any error of a metric is the reason of the rejection
        raise _InvalidSubmission(f"The influence of single rows on {metric.name} cannot be computed: {_text(error)}") from error
    return row_results.encode(influence_R, share=metric.proportion)


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
        raise _InvalidSubmission(f"{name} cannot be computed from these predictions: {_text(error)}") from error
    if not math.isfinite(score):
        raise _InvalidSubmission(f"{name} of these predictions is {score}.")
    return round(score, 5)
