"""Grading agrees with MLE-bench: the table of submissions, and arbitrary bytes."""

import dataclasses
import io
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from submission_table import GUESS, GUESS_SCORE, INVALID, KEYS, ORDER, ROWS, TABLE, TRUTH, VALID, shuffled, submission

from discover_jax.tasks import grading
from discover_jax.tasks.competition import Competition, Metric
from discover_jax.tasks.metrics import ACCURACY, LOG_LOSS, RMSE, ROC_AUC
from discover_jax.types import Grade

ANSWERS = grading.Answers("key", "sinks", TABLE)


def by(metric, id_column="key", target="sinks"):
    """A competition with only a metric."""
    return Competition("boats", "Which boats sink?", id_column, target, metric, lambda *_: None, transform=_PLAIN[metric.higher_is_better])


_PLAIN = {True: "identity", False: "negate"}


@pytest.mark.parametrize("name", VALID)
def test_valid_submissions_have_the_same_score(name):
    found = grading.grade(VALID[name], ANSWERS, by(ACCURACY))
    assert found == Grade(True, "", GUESS_SCORE, GUESS_SCORE, rows=found.rows)


@pytest.mark.parametrize("name", INVALID)
def test_invalid_submissions_have_a_reason(name):
    data, reason = INVALID[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grade = grading.grade(data, ANSWERS, by(ACCURACY))
    assert (grade.valid, grade.score, grade.private_score) == (False, None, None)
    assert pd.Series([grade.reason]).str.contains(reason, regex=True).all(), grade.reason
    assert 0 < len(grade.reason) <= 500


def test_reasons_have_the_order_of_mle_bench():
    """Rows before target, target before id, id before its values, values before predictions."""
    assert "rows" in grading.grade(b"a\n1\n", ANSWERS, by(ACCURACY)).reason
    assert "no column 'sinks'" in grading.grade(submission(names=("a", "b")), ANSWERS, by(ACCURACY)).reason
    assert "no column 'key'" in grading.grade(submission([np.nan] * ROWS, names=("a", "sinks")), ANSWERS, by(ACCURACY)).reason
    assert "ids" in grading.grade(submission([np.nan] * ROWS, keys=["x"] * ROWS), ANSWERS, by(ACCURACY)).reason


@given(data=st.binary(max_size=300))
def test_any_bytes_have_a_grade(data):
    assert not grading.grade(data, ANSWERS, by(ACCURACY)).valid


@given(
    values=st.lists(
        st.sampled_from(["True", "false", "0", "1", "0.0", "2", "", "nan", "inf", "yes", "1e400", "-1", '"', "a,b", "\x00"]),
        min_size=3,
        max_size=3,
    )
)
def test_agreement_with_a_plain_implementation(values):
    """A plain version of MLE-bench's grading: pandas reads, rows are sorted by id, scikit-learn scores, any error rejects."""
    from sklearn.metrics import accuracy_score  # half a second that only the worker of this test needs

    answers = pd.DataFrame({"key": ["a", "b", "c"], "sinks": [True, False, True]})
    data = "key,sinks\n" + "".join(f"{k},{v}\n" for k, v in zip("cab", values, strict=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = pd.read_csv(io.StringIO(data)).sort_values("key")
            assert table["key"].tolist() == ["a", "b", "c"]
            expected = round(accuracy_score(answers["sinks"].to_numpy(), table["sinks"].to_numpy()), 5)
    except (ValueError, TypeError, AssertionError):
        expected = None
    grade = grading.grade(data.encode(), grading.Answers("key", "sinks", answers), by(ACCURACY))
    assert grade.score == expected
    assert grade.valid == (expected is not None)


def test_held_out_and_private_rows_are_scored_separately():
    private_R = np.arange(ROWS)[ORDER] % 3 > 0
    answers = grading.Answers("key", "sinks", TABLE[private_R], TABLE[~private_R], private_counts=False)
    grade = grading.grade(shuffled(), answers, by(ACCURACY))
    numbers = np.arange(ROWS)
    right = GUESS == TRUTH
    assert grade.private_score == round(right[numbers % 3 > 0].mean(), 5)
    assert grade.score == round(right[numbers % 3 == 0].mean(), 5)
    assert grade.score != grade.private_score


def test_numeric_ids_are_compared_as_numbers():
    answers = grading.Answers("id", "y", pd.DataFrame({"id": [7, 10], "y": [True, False]}))
    assert grading.grade(b"id,y\n10,False\n007,True\n", answers, by(ACCURACY)).score == 1.0
    assert not grading.grade(b"id,y\n10,False\n7_,True\n", answers, by(ACCURACY)).valid


@pytest.mark.parametrize(
    ("metric", "predictions", "expected"),
    [
        # By hand: -(ln .9 + ln .8 + ln .6)/3; one of the two pairs of a 1 and a 0 in order; sqrt((.1^2 + .2^2 + .4^2)/3).
        (LOG_LOSS, "0.9,0.2,0.6", round(-(np.log(0.9) + np.log(0.8) + np.log(0.6)) / 3, 5)),
        (ROC_AUC, "0.9,0.7,0.6", 0.5),
        (RMSE, "0.9,0.2,0.6", round(np.sqrt(0.21 / 3), 5)),
    ],
)
def test_other_metrics(metric, predictions, expected):
    answers = grading.Answers("id", "y", pd.DataFrame({"id": [1, 2, 3], "y": [1, 0, 1]}))
    rows = "".join(f"{n},{p}\n" for n, p in enumerate(predictions.split(","), 1))
    assert grading.grade(f"id,y\n{rows}".encode(), answers, by(metric)).score == pytest.approx(expected)


def test_predictions_that_a_metric_refuses():
    answers = grading.Answers("id", "y", pd.DataFrame({"id": [1, 2], "y": [1.0, 0.0]}))
    assert "probabilities must lie in" in grading.grade(b"id,y\n1,2.5\n2,0\n", answers, by(LOG_LOSS)).reason
    assert "log loss cannot be computed" in grading.grade(b"id,y\n1,yes\n2,no\n", answers, by(LOG_LOSS)).reason
    nan = Metric("nothing", True, lambda answers_R, predictions_R: float("nan"))
    assert grading.grade(b"id,y\n1,1\n2,0\n", answers, by(nan)).reason == "nothing of these predictions is nan."


WIDE = ",".join(["key", "sinks", *(f"c{number}" for number in range(1022))])


@pytest.mark.parametrize("row", ["1", "a,b", '"x"', ""], ids=repr)
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"], ids=repr)
def test_short_rows_below_a_wide_header_are_not_filled_up(monkeypatch, row, end):
    """100,000 rows of 1,024 columns would take gigabytes."""
    monkeypatch.setattr(grading, "read_table", None)
    for by_metric in (True, False):
        competition = by(ACCURACY) if by_metric else dataclasses.replace(by(ACCURACY), judge=lambda *_: 1.0)
        answers = dataclasses.replace(ANSWERS, private=pd.concat([ANSWERS.private] * 200))
        reason = grading.grade((WIDE + end + (row + end) * 100_000).encode(), answers, competition).reason
        assert "1,024 columns" in reason, reason


def test_wide_tables_with_full_rows_are_read():
    table = pd.DataFrame({"key": KEYS, "sinks": GUESS} | {f"c{number}": 0 for number in range(1022)})
    assert grading.grade(table.to_csv(index=False).encode(), ANSWERS, by(ACCURACY)).valid


def test_rows_beyond_one_too_many_are_not_read(monkeypatch):
    read, real = [], grading.read_table
    monkeypatch.setattr(grading, "read_table", lambda data, text, most: read.append(most) or real(data, text, most))
    rows = submission(np.array([*GUESS, *[True] * 1000]), [*KEYS, *range(1000)])
    assert "at least 871 rows; it must have 870" in grading.grade(rows, ANSWERS, by(ACCURACY)).reason
    assert read == [871]


@pytest.mark.parametrize(
    "error", [KeyError("y"), RecursionError(), AssertionError("x"), ValueError(10**5000), OverflowError("o")], ids=type
)
def test_unexpected_errors_are_the_submissions_fault(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(grading, "_sorted", fail)
    reason = grading.grade(submission(), ANSWERS, by(ACCURACY)).reason
    assert reason.startswith("Grading the submission failed:")
