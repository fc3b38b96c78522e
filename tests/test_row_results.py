"""Results of single rows: influences against resampled and perturbed tables, their text, and their place in grades."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.row_results import decode, difference_variance, encode, joined
from discover_jax.tasks.metrics import ACCURACY, LOG_LOSS, RMSE, ROC_AUC

ROWS = 400


def _table(metric, seed, noise=1.0):
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, 2, ROWS)
    score = answers + noise * rng.normal(size=ROWS)
    return answers, {
        ACCURACY: (score > 0.5).astype(int),
        ROC_AUC: np.round(score, 1),
        LOG_LOSS: 1 / (1 + np.exp(0.5 - score)),
        RMSE: score,
    }[metric]


@pytest.mark.parametrize("metric", [ACCURACY, ROC_AUC, LOG_LOSS, RMSE], ids=lambda metric: metric.name)
def test_influence_is_the_derivative_of_the_score_in_a_rows_weight(metric):
    """By the definition: the score of a table in which one row counts a little more."""
    answers, predictions = _table(metric, 0)
    influence = metric.influence(answers, predictions)
    influence = influence - influence.mean()  # a share has the rows' correctness
    score = metric.function(answers, predictions)
    copies = 200  # a table with each row 200 times, and one row once more
    for row in range(0, ROWS, 40):
        counts = np.full((1, ROWS), copies)
        counts[0, row] += 1
        if metric.resampled is not None:
            (changed,) = metric.resampled(answers, predictions, counts)
        else:
            changed = metric.function(np.repeat(answers, counts[0]), np.repeat(predictions, counts[0]))
        assert (changed - score) * (copies * ROWS + 1) == pytest.approx(influence[row], rel=0.05, abs=1e-4)


@pytest.mark.parametrize("metric", [ACCURACY, ROC_AUC, LOG_LOSS, RMSE], ids=lambda metric: metric.name)
def test_variance_of_a_difference_on_the_same_rows(metric):
    """Compared with the spread of the difference over 4,000 resampled tables."""
    answers, first = _table(metric, 1)
    second = np.where(np.random.default_rng(3).random(ROWS) < 0.9, first, _table(metric, 2)[1])
    rng = np.random.default_rng(5)
    drawn = rng.integers(0, ROWS, (4000, ROWS))
    if metric.resampled is not None:
        counts = np.stack([np.bincount(rows, minlength=ROWS) for rows in drawn])
        differences = metric.resampled(answers, second, counts) - metric.resampled(answers, first, counts)
    else:
        correct = (answers == second).astype(float) - (answers == first)
        differences = correct[drawn].mean(axis=1)
    results = [decode(encode(metric.influence(answers, p), share=metric.proportion)) for p in (first, second)]
    variance = np.mean((results[1].influence_R - results[0].influence_R) ** 2) / ROWS
    assert variance == pytest.approx(differences.var(), rel=0.15)
    assert variance < 0.5 * (results[0].variance + results[1].variance)  # the pairing helps


def test_mcnemar_by_hand():
    """Of 10 rows, only the child gets 3 right, only the parent 1: the variance is (3 + 1 - 2^2 / 10) / 10^2."""
    answers = np.ones(10, int)
    parent, child = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 1]), np.array([1, 1, 1, 0, 1, 1, 1, 0, 0, 1])
    a, b = (decode(encode(ACCURACY.influence(answers, p), share=True)).influence_R for p in (parent, child))
    assert np.mean((b - a) ** 2) / 10 == pytest.approx((3 + 1 - 0.4) / 100)


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_shares_survive_the_text(correct):
    values = np.array(correct, float)
    found = decode(encode(values, share=True))
    np.testing.assert_allclose(found.influence_R, values - values.mean(), atol=1e-12)
    assert found.rows == len(correct)


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=50))
def test_numbers_survive_the_text_to_half_precision(values):
    found = decode(encode(np.array(values), share=False)).influence_R
    np.testing.assert_allclose(found, np.array(values) - np.mean(values), atol=2e-3 * max(map(abs, values)))


def test_large_tables_keep_evenly_spaced_rows():
    correct = np.random.default_rng(0).random(1_000_000) < 0.8
    text = encode(correct, share=True)
    found = decode(text)
    assert len(text) < 12_000
    assert (found.rows, len(found.influence_R)) == (1_000_000, 65_536)
    assert found.variance == pytest.approx(0.16 / 1_000_000, rel=0.02)


@pytest.mark.parametrize(
    "text", ["", "bits:10:1", "bits:10:1:AAAA", "bits:0:1:", "float16:3:x:AAAA", "words:3:1:AAAA", "bits:99999999999:1:eJwDAAAAAAE="]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="results of a table's rows"):
        decode(text)


def test_a_longer_text_than_its_rows_is_refused():
    longer = encode(np.array([1.0, 0.0] * 2000), share=True).split(":")
    with pytest.raises(ValueError, match="results of a table's rows"):
        decode(":".join([longer[0], "10", *longer[2:]]))


def test_folds_are_joined():
    parts = [np.array([0.5, -0.5]), np.array([0.25, 0.25, -0.5])]
    found = decode(joined([encode(part, share=False) for part in parts]))
    np.testing.assert_allclose(found.influence_R, np.concatenate(parts), atol=1e-3)
    assert joined([encode(parts[0], share=False), ""]) == ""
    # A fold without an error, and one without a correct row, keep their rows' results.
    shares = [np.ones(20), np.zeros(20), (np.arange(20) < 16).astype(float)]
    found = decode(joined([encode(part, share=True) for part in shares]))
    np.testing.assert_allclose(found.influence_R, np.concatenate(shares) - np.concatenate(shares).mean(), atol=1e-12)
    large = decode(joined([encode(np.arange(10_000.0), share=False)] * 3))
    assert (large.rows, len(large.influence_R)) == (30_000, 4_096)


def test_extreme_influences_stay_finite():
    answers, predictions = np.zeros(1000), np.zeros(1000)
    predictions[0] = 1e154
    found = decode(encode(RMSE.influence(answers, predictions), share=False))
    assert np.isfinite(found.variance)
    assert np.isfinite(found.variance**2)


def test_shares_of_large_tables_differ_on_at_least_as_many_rows_as_the_score():
    rows = 200_000
    parent = (np.arange(rows) % 5 > 0).astype(float)
    child = parent.copy()
    unkept = np.setdiff1d(np.flatnonzero(parent == 0), np.linspace(0, rows - 1, 65_536).astype(int))[:3]
    child[unkept] = 1
    a, b = (decode(encode(x, share=True)) for x in (parent, child))
    assert difference_variance(a, b, 3 / rows) == pytest.approx(3 / rows**2, rel=1e-4)  # (b + c - (b - c)^2 / n) / n^2


@pytest.mark.parametrize("influence", [lambda a, p: 1 / 0, lambda a, p: np.ones(3)])
def test_a_metric_whose_influence_fails_rejects_the_submission(influence):
    from discover_jax.tasks import grading
    from discover_jax.tasks.competition import Competition

    metric = dataclasses.replace(RMSE, influence=influence)
    competition = Competition("c", "text", "id", "y", metric, lambda raw, public, private: None, failure_reward=-1e9, transform="negate")
    table = pd.DataFrame({"id": range(5), "y": range(5)})
    grade = grading.grade(table.to_csv(index=False).encode(), grading.Answers("id", "y", table), competition)
    assert not grade.valid
    assert "influence of single rows" in grade.reason


def _labels(path):
    return pd.read_csv(path)


def test_three_disjoint_sets_of_rows(tmp_path):
    """Rewards, selection and private answers: no row twice, labels only where they belong, and scores by hand."""
    from discover_jax.tasks.prepare import prepare_task

    settings = {"raw": None, "reward": "holdout", "holdout_fraction": 0.2, "selection_fraction": 0.1}
    task = prepare_task("digits-parity", folder=tmp_path / "task", **settings)
    tables = {name: _labels(tmp_path / "task" / name) for name in ("public/train.csv", "public/test.csv", "private/test.csv")}
    held = {name: _labels(tmp_path / "task" / "private" / name) for name in ("holdout.csv", "selection.csv")}
    ids = [set(table["id"]) for table in (tables["public/train.csv"], tables["private/test.csv"], *held.values())]
    assert sum(map(len, ids)) == len(set.union(*ids))
    assert set(tables["public/test.csv"]["id"]) == set.union(*ids[1:])
    total = len(ids[0]) + len(ids[2]) + len(ids[3])
    assert (len(ids[2]), len(ids[3])) == (round(0.2 * total), round(0.1 * total)) == (task.held_out_rows, task.selection_rows)
    assert "even" not in tables["public/test.csv"].columns

    sample = _labels(tmp_path / "task" / "public" / "sample_submission.csv")
    answers = pd.concat([tables["private/test.csv"], *held.values()]).set_index("id")["even"]
    # Right on the rows for rewards, wrong on those for selection, and the private rows by turns.
    private = sample["id"].isin(ids[1]) & (sample.index % 2 == 0)
    wrong = sample["id"].isin(ids[3]) | private
    sample["even"] = [answers[i] ^ bool(w) for i, w in zip(sample["id"], wrong, strict=True)]
    grade = task.grade(sample.to_csv(index=False).encode())
    assert (grade.score, grade.selection_score) == (1.0, 0.0)
    assert grade.private_score == pytest.approx(1 - private.sum() / len(ids[1]), abs=1e-5)
    assert decode(grade.rows).rows == task.held_out_rows
    assert decode(grade.selection_rows).rows == task.selection_rows
    assert f"{task.selection_rows:,} held-out rows served only for the choice" in task.disclosure.text
    perfect = task.grade(task.answers_as_submission())
    assert (perfect.score, perfect.selection_score, perfect.private_score) == (1.0, 1.0, 1.0)
    again = prepare_task("digits-parity", folder=tmp_path / "task", **settings)
    assert again == task
