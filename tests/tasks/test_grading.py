"""Submissions are judged as spec and MLE-bench say: the table of submissions, row by row, and any bytes at all."""

import io
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from discover_jax.tasks import grading
from discover_jax.tasks.competition import Metric
from discover_jax.tasks.metrics import ACCURACY, LOG_LOSS, RMSE, ROC_AUC
from discover_jax.types import Grade

ROWS = 870
KEYS = [f"{n:04d}_01" for n in range(ROWS)]
TRUTH = np.array([n * 7 % 11 < 5 for n in range(ROWS)])
# Right but for every seventh row; the score is counted by hand below.
GUESS = np.where(np.arange(ROWS) % 7 == 0, ~TRUTH, TRUTH)
GUESS_SCORE = round((ROWS - 125) / ROWS, 5)
# The answers' own rows are out of order, as a random split leaves them.
ORDER = np.random.RandomState(1).permutation(ROWS)
ANSWERS = grading.Answers("key", "sinks", pd.DataFrame({"key": np.array(KEYS)[ORDER], "sinks": TRUTH[ORDER]}), np.ones(ROWS, bool))


def submission(values=GUESS, keys=KEYS, names=("key", "sinks")):
    return pd.DataFrame({names[0]: keys, names[1]: values}).to_csv(index=False).encode()


def shuffled():
    order = np.random.RandomState(0).permutation(ROWS)
    return submission(GUESS[order], np.array(KEYS)[order])


VALID = {
    "booleans": submission(),
    "quoted": ('"key","sinks"\n' + "".join(f'"{k}","{g}"\n' for k, g in zip(KEYS, GUESS, strict=True))).encode(),
    "lower case": submission([str(g).lower() for g in GUESS]),
    "upper case": submission([str(g).upper() for g in GUESS]),
    "integers": submission(GUESS.astype(int)),
    "floats": submission(GUESS.astype(float)),
    "shuffled": shuffled(),
    "extra columns": pd.DataFrame({"p": 0.3, "sinks": GUESS, "key": KEYS, "note": None}).to_csv().encode(),
    "windows lines and a byte order mark": b"\xef\xbb\xbf" + submission().replace(b"\n", b"\r\n"),
    "blank lines": b"\n\n" + submission().replace(b"\n", b"\n\n"),
}
INVALID = {
    "missing rows": (submission(GUESS[:-1], KEYS[:-1]), "869 rows; it must have 870"),
    "extra rows": (submission([*GUESS, True], [*KEYS, "9999_01"]), "871 rows; it must have 870"),
    "empty": (b"", "0 rows"),
    "header only": (b"key,sinks\n", "0 rows"),
    "target missing": (submission(names=("key", "Sinks")), "no column 'sinks'.*: key, Sinks"),
    "id missing": (submission(names=("id", "sinks")), "no column 'key'"),
    "duplicate id": (submission(keys=[KEYS[0], *KEYS[:-1]]), "1 repeated; 1 missing, such as '0869_01'"),
    "unknown id": (submission(keys=["x", *KEYS[1:]]), "1 unknown, such as 'x'; 1 missing, such as '0000_01'"),
    "missing id": (submission(keys=[None, *KEYS[1:]]), "column 'key'"),
    "not a number": (submission([np.nan, *GUESS[1:]]), "1 of the 870 predictions in column 'sinks' are missing"),
    "infinite": (submission([np.inf, *GUESS[1:].astype(float)]), "infinite"),
    "probabilities": (submission(GUESS * 0.8 + 0.1), "accuracy cannot be computed"),
    "yes and no": (submission(np.where(GUESS, "yes", "no")), "accuracy cannot be computed"),
    "mixed types": (submission([1, *GUESS[1:]]), "accuracy cannot be computed"),
    "undecodable": (submission().replace(b"True", b"\xff\xfe"), "not UTF-8"),
    "unterminated quote": (submission() + b'"', "not a CSV"),
    "ragged": (submission() + b"a,b,c,d\n", "not a CSV"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "zeros": (b"\0" * 1000, ""),
    "too wide": (b"," * 1_000_000 + b"\n", "1,000,001 columns; at most 1,024"),
    "too wide below the header": (b"key,sinks\n" + b"1," * 1_000_000, "columns; at most 1,024"),
    "endless field": (b'key,sinks\n"' + b"x" * 1_000_000, "not a CSV"),
}


@pytest.mark.parametrize("name", VALID)
def test_valid_submissions_have_the_same_score(name):
    assert grading.grade(VALID[name], ANSWERS, ACCURACY) == Grade(True, "", GUESS_SCORE, GUESS_SCORE)


@pytest.mark.parametrize("name", INVALID)
def test_invalid_submissions_have_a_reason(name):
    data, reason = INVALID[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grade = grading.grade(data, ANSWERS, ACCURACY)
    assert (grade.valid, grade.score, grade.private_score) == (False, None, None)
    assert pd.Series([grade.reason]).str.contains(reason, regex=True).all(), grade.reason
    assert 0 < len(grade.reason) <= 500


def test_reasons_come_in_the_order_of_mle_bench():
    """Rows before target, target before id, id before its values, and those before the predictions."""
    assert "rows" in grading.grade(b"a\n1\n", ANSWERS, ACCURACY).reason
    assert "no column 'sinks'" in grading.grade(submission(names=("a", "b")), ANSWERS, ACCURACY).reason
    assert "no column 'key'" in grading.grade(submission([np.nan] * ROWS, names=("a", "sinks")), ANSWERS, ACCURACY).reason
    assert "ids" in grading.grade(submission([np.nan] * ROWS, keys=["x"] * ROWS), ANSWERS, ACCURACY).reason


def test_a_submission_that_is_too_large(monkeypatch):
    monkeypatch.setattr(grading, "MAX_SUBMISSION_BYTES", 100)
    assert "at most 100 are read" in grading.grade(submission(), ANSWERS, ACCURACY).reason


@given(data=st.binary(max_size=300))
def test_any_bytes_have_a_grade(data):
    assert not grading.grade(data, ANSWERS, ACCURACY).valid


@given(
    values=st.lists(
        st.sampled_from(["True", "false", "0", "1", "0.0", "2", "", "nan", "inf", "yes", "1e400", "-1", '"', "a,b", "\x00"]),
        min_size=3,
        max_size=3,
    )
)
def test_agreement_with_the_plain_way(values):
    """MLE-bench's way, written plainly: pandas reads, rows are sorted by id, scikit-learn scores, any error is a rejection."""
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
    grade = grading.grade(data.encode(), grading.Answers("key", "sinks", answers, np.ones(3, bool)), ACCURACY)
    assert grade.score == expected
    assert grade.valid == (expected is not None)


def test_held_out_and_private_rows_are_scored_apart():
    private_R = np.arange(ROWS)[ORDER] % 3 > 0
    grade = grading.grade(shuffled(), grading.Answers("key", "sinks", ANSWERS.table, private_R), ACCURACY)
    numbers = np.arange(ROWS)
    right = GUESS == TRUTH
    assert grade.private_score == round(right[numbers % 3 > 0].mean(), 5)
    assert grade.score == round(right[numbers % 3 == 0].mean(), 5)
    assert grade.score != grade.private_score


def test_numeric_ids_are_compared_as_numbers():
    answers = grading.Answers("id", "y", pd.DataFrame({"id": [7, 10], "y": [True, False]}), np.ones(2, bool))
    assert grading.grade(b"id,y\n10,False\n007,True\n", answers, ACCURACY).score == 1.0
    assert not grading.grade(b"id,y\n10,False\n7_,True\n", answers, ACCURACY).valid


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
    answers = grading.Answers("id", "y", pd.DataFrame({"id": [1, 2, 3], "y": [1, 0, 1]}), np.ones(3, bool))
    rows = "".join(f"{n},{p}\n" for n, p in enumerate(predictions.split(","), 1))
    assert grading.grade(f"id,y\n{rows}".encode(), answers, metric).score == pytest.approx(expected)


def test_what_a_metric_refuses_or_returns():
    answers = grading.Answers("id", "y", pd.DataFrame({"id": [1, 2], "y": [1.0, 0.0]}), np.ones(2, bool))
    assert "probabilities must lie in" in grading.grade(b"id,y\n1,2.5\n2,0\n", answers, LOG_LOSS).reason
    assert "log loss cannot be computed" in grading.grade(b"id,y\n1,yes\n2,no\n", answers, LOG_LOSS).reason
    nan = Metric("nothing", True, lambda answers_R, predictions_R: float("nan"))
    assert grading.grade(b"id,y\n1,1\n2,0\n", answers, nan).reason == "nothing of these predictions is nan."
