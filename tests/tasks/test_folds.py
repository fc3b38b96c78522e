"""Cross-validation as the reward: each training row is graded in a run that does not see its label. Private answers do not count."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from discover_jax.exceptions import ConfigError
from discover_jax.execution import Executor, sandbox_spec
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.tasks.interval import wilson_interval
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Outcome


def text_table(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture
def folded(tmp_path, write_competition):
    return prepare_task(write_competition(), raw=None, reward="holdout", holdout_folds=3, folder=tmp_path / "task", seed=5)


def submissions(task, truth=None):
    """Correct submissions of all runs, as tables."""
    truth = (lambda n: n * 7 % 11 < 5) if truth is None else truth
    tables = [pd.read_csv(shown / "sample_submission.csv") for shown in task.public_dirs]
    return [table.assign(sinks=[truth(int(key[:4])) for key in table["key"]]) for table in tables]


def graded(task, tables):
    return [task.grade(table.to_csv(index=False).encode(), run) for run, table in enumerate(tables)]


def test_each_row_is_held_out_once(folded, tmp_path, write_competition):
    whole = prepare_task(write_competition(), raw=None, reward="grade", folder=tmp_path / "whole")
    names = ("train.csv", "test.csv", "sample_submission.csv")
    old = {name: text_table(whole.public_dir / name) for name in names}
    assert [path.name for path in folded.public_dirs] == ["fold-1", "fold-2", "fold-3", "public"]
    for name in names:
        assert (folded.public_dir / name).read_bytes() == (whole.public_dir / name).read_bytes()
    held = []
    for shown in folded.public_dirs[:-1]:
        new = {name: text_table(shown / name) for name in names}
        mine = set(old["train.csv"]["key"]) - set(new["train.csv"]["key"])
        held.append(mine)
        assert set(new["test.csv"]["key"]) == set(old["test.csv"]["key"]) | mine
        assert new["train.csv"].equals(old["train.csv"][~old["train.csv"]["key"].isin(mine)].reset_index(drop=True))
        assert "sinks" not in new["test.csv"].columns
        assert new["sample_submission.csv"]["key"].tolist() == new["test.csv"]["key"].tolist()
    assert sorted(key for fold in held for key in fold) == sorted(old["train.csv"]["key"])
    assert sorted(len(fold) for fold in held) == [33, 33, 34]
    assert (folded.score_rows, folded.private_rows) == (100, 40)
    assert [file.rows for file in folded.files][:2] in ([66, 74], [67, 73])


def test_score_of_the_folds_is_that_of_all_rows_together(folded):
    """Wrong on 7 of the 100 training rows, in any fold, and on 4 of the 40 private rows."""
    wrong = {3, 17, 31, 44, 58, 72, 99, 101, 110, 120, 139}
    grades = graded(folded, submissions(folded, lambda n: (n * 7 % 11 < 5) != (n in wrong)))
    assert all(grade.valid for grade in grades)
    assert (grades[-1].valid, grades[-1].score, grades[-1].private_score) == (True, None, 0.9)
    combined = folded.combine(grades)
    assert combined.score == pytest.approx(0.93, abs=2e-5)
    assert combined.private_score == 0.9
    interval = folded.score_interval(combined.score, None)
    assert interval.bounds == wilson_interval(combined.score, 100)
    with pytest.raises(ValueError, match="4 runs"):
        folded.combine(grades[:-1])


def test_each_run_must_submit_its_rows(folded):
    tables = submissions(folded)
    assert "it must have" in folded.grade(tables[-1].to_csv(index=False).encode(), 0).reason
    assert "it must have 40" in folded.grade(tables[0].to_csv(index=False).encode()).reason


def test_folds_depend_on_the_seed(folded, tmp_path, write_competition):
    def prepare(name, **settings):
        return prepare_task(write_competition(), raw=None, reward="holdout", folder=tmp_path / name, **settings)

    assert prepare("a", holdout_folds=3, seed=5).fingerprint == folded.fingerprint
    assert prepare("b", holdout_folds=3, seed=6).fingerprint != folded.fingerprint
    assert prepare("c", holdout_folds=4, seed=5).fingerprint != folded.fingerprint


def test_impossible_folds(tmp_path, write_competition):
    path = write_competition()
    for settings, message in (
        ({"reward": "grade", "holdout_folds": 3}, r"holdout_folds\b.*\b3\b"),
        ({"reward": "holdout", "holdout_folds": 0}, r"holdout_folds\b.*\b0\b"),
        ({"reward": "holdout", "holdout_folds": 101}, r"\b100\b"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_task(path, raw=None, folder=tmp_path / "task", **settings)
        assert not (tmp_path / "task").exists()


# ---------------------------------------------------------------------- private answers have no influence

OTHER_ANSWERS = {
    "shuffled": "test = test.assign(sinks=test['sinks'].to_numpy()[::-1])",
    "another type": "test = test.assign(sinks=[f'label {n}' for n in range(len(test))])",
    "numbers": "test = test.assign(sinks=[n + 0.5 for n in range(len(test))])",
}


@pytest.mark.parametrize("folds", [1, 2])
@pytest.mark.parametrize("change", OTHER_ANSWERS)
def test_private_answers_change_only_the_private_score(tmp_path, write_competition, change, folds):
    """Score, validity and reason stay the same for submissions of any quality, even if the metric fails on the private rows."""
    settings = {"raw": None, "reward": "holdout", "holdout_folds": folds}
    ours = prepare_task(write_competition(), folder=tmp_path / "ours", **settings)
    line = f"{OTHER_ANSWERS[change]}; test.to_csv(private / 'test.csv', index=False)"
    other = prepare_task(write_competition(line), folder=tmp_path / "other", **settings)
    for shown, same in zip(ours.public_dirs, other.public_dirs, strict=True):
        assert {path.name: path.read_bytes() for path in shown.iterdir()} == {path.name: path.read_bytes() for path in same.iterdir()}
    random = np.random.default_rng(0)
    private_scores = set()
    for values in ("truth", "noise", "numbers", "words", "missing"):
        for run, table in enumerate(submissions(ours)):
            noise = {
                "truth": table["sinks"],
                "noise": random.random(len(table)) < 0.5,
                "numbers": random.integers(0, 2, len(table)),
                "words": ["perhaps"] * len(table),
                "missing": [None] * len(table),
            }[values]
            data = table.assign(sinks=noise).to_csv(index=False).encode()
            mine, theirs = ours.grade(data, run), other.grade(data, run)
            assert (mine.valid, mine.reason, mine.score) == (theirs.valid, theirs.reason, theirs.score)
            private_scores.add((mine.private_score, theirs.private_score))
    assert any(mine != theirs for mine, theirs in private_scores)  # otherwise the change had no effect
    assert ours.disclosure == other.disclosure


# ---------------------------------------------------------------------- real runs of a program

_LIMITS = ResourceLimits(seconds=60, cores=1, memory_bytes=900 * MIB)

_LOOKUP = """
import glob, os
import pandas as pd

def run():
    train = pd.read_csv("data/train.csv").set_index("key")["sinks"]
    sample = pd.read_csv("data/sample_submission.csv")
    print(len(train), sorted(os.listdir("data")), os.path.exists(ELSEWHERE))
    # Right where the label can be seen, wrong elsewhere.
    sample["sinks"] = [bool(train[key]) if key in train.index else not int(key[:4]) * 7 % 11 < 5 for key in sample["key"]]
    return sample
"""
_FAILS_LATER = """
import pandas as pd

def run():
    sample = pd.read_csv("data/sample_submission.csv")
    if len(pd.read_csv("data/train.csv")) == 100:
        raise KeyError("only the whole table")
    return sample
"""


@pytest.fixture
def light(monkeypatch):
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())


def test_program_runs_once_per_fold_and_sees_only_that_fold(folded, tmp_path, light):
    """It submits the labels that it finds. None of them is of a held-out row, so its score is exactly 0."""
    elsewhere = str(folded.public_dirs[1] / "train.csv")
    assert Path(elsewhere).exists()
    with Executor([folded], _LIMITS, workers=1, cache_dir=tmp_path / "cache") as executor:
        verdict = executor.submit(_LOOKUP.replace("ELSEWHERE", repr(elsewhere))).result(300)
        failure = executor.submit(_FAILS_LATER).result(300)
        again = executor.submit(_LOOKUP.replace("ELSEWHERE", repr(elsewhere))).result(300)
        assert re.search(r"\b4 runs\b", executor.describe())
    assert (verdict.outcome, verdict.grade.score, verdict.grade.private_score) == (Outcome.OK, 0.0, 0.0)
    assert verdict.execution.stdout.strip() in (f"{n} ['sample_submission.csv', 'test.csv', 'train.csv'] False" for n in (66, 67))
    assert (verdict.execution.result or b"").count(b"\n") == 41  # the submission of the last run
    assert failure.outcome is Outcome.EXCEPTION
    assert "only the whole table" in failure.execution.detail
    assert dataclasses.replace(verdict.execution, cached=True) == again.execution
    assert again.grade == verdict.grade
