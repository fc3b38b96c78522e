"""The real mlebench package, if installed: its verdicts compared with ours, its competitions, and its side effects."""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import submission_table

from discover_jax.exceptions import ConfigError
from discover_jax.tasks import grading, mle_bench
from discover_jax.tasks.competition import Competition, Threshold
from discover_jax.tasks.loading import load_competition
from discover_jax.tasks.metrics import ACCURACY
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Grade

needs_mlebench = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import mlebench.registry"], capture_output=True, check=False).returncode != 0,
    reason="the package mlebench is not installed",
)

COLUMNS = {"key": "PassengerId", "sinks": "Transported"}
ANSWERS = grading.Answers("PassengerId", "Transported", submission_table.TABLE.rename(columns=COLUMNS))
NATIVE = Competition("spaceship-titanic", "Who was transported?", "PassengerId", "Transported", ACCURACY, lambda *_: None)
# The table of submissions, with this competition's column names, without those that take the package minutes.
_DATA = submission_table.VALID | {name: row[0] for name, row in submission_table.INVALID.items() if "too wide" not in name}
ROWS = {name: data.replace(b"key", b"PassengerId").replace(b"sinks", b"Transported") for name, data in _DATA.items()}


def their_score(data: bytes, path: Path) -> float | None:
    """The score by `mlebench grade`, with the package's own reader; None on any error."""
    from mlebench.registry import registry
    from mlebench.utils import read_csv

    path.write_bytes(data)
    try:
        table = read_csv(path)
    except ValueError:  # ParserError or UnicodeDecodeError, with which mlebench aborts
        return None
    return registry.get_competition("spaceship-titanic").grader(table, ANSWERS.private)


def without_rows(grade: Grade) -> Grade:
    """Without the results of single rows, which only our own graders know."""
    assert grade.rows
    return dataclasses.replace(grade, rows="")


@needs_mlebench
@pytest.mark.parametrize("name", ROWS)
def test_verdicts_agree_on_the_whole_table(name, tmp_path):
    expected = their_score(ROWS[name], tmp_path / "submission.csv")
    native = grading.grade(ROWS[name], ANSWERS, NATIVE)
    backend = grading.grade(ROWS[name], ANSWERS, mle_bench.with_its_grader(NATIVE))
    assert native.score == expected
    assert backend.score == expected
    assert backend.valid == (expected is not None)
    assert bool(backend.reason) == (expected is None)


@needs_mlebench
def test_its_grader_scores_held_out_rows(tmp_path):
    """The grader gets held-out and private rows separately."""
    private_R = np.arange(submission_table.ROWS) % 3 > 0
    answers = grading.Answers(
        "PassengerId", "Transported", ANSWERS.private[private_R], ANSWERS.private[~private_R].reset_index(drop=True), private_counts=False
    )
    native = grading.grade(ROWS["shuffled"], answers, NATIVE)
    assert grading.grade(ROWS["shuffled"], answers, mle_bench.with_its_grader(NATIVE)) == without_rows(native)
    assert native.score != native.private_score


@needs_mlebench
def test_nothing_is_left_in_the_working_directory_or_the_root_logger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(logging.root.handlers)
    mle_bench.with_its_grader(NATIVE)
    assert logging.root.handlers == before
    assert os.listdir() == []


@needs_mlebench
def test_its_own_preparation_of_a_competition(spaceship_raw, tmp_path):
    """mlebench:ID from raw data on this machine, without credentials: the same files and scores as ours."""
    raw = tmp_path / "data" / "spaceship-titanic" / "raw"
    raw.mkdir(parents=True)
    shutil.copy(spaceship_raw, raw / "train.csv")
    definition = tmp_path / "theirs.py"
    definition.write_text(
        "from discover_jax.tasks.mle_bench import mlebench_competition\n"
        "COMPETITION = mlebench_competition('spaceship-titanic', higher_is_better=True, proportion=True)\n"
    )
    theirs = prepare_task(str(definition), raw=tmp_path / "data", reward="grade", folder=tmp_path / "theirs")
    ours = prepare_task("spaceship-titanic", raw=spaceship_raw, reward="grade", folder=tmp_path / "ours")
    assert {file.name for file in theirs.files} == {"train.csv", "test.csv", "sample_submission.csv"}
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        assert (theirs.public_dir / name).read_bytes() == (ours.public_dir / name).read_bytes()
    submission = pd.read_csv(ours.public_dir / "sample_submission.csv").assign(Transported=lambda table: table.index % 3 == 0)
    data = submission.to_csv(index=False).encode()
    assert theirs.grade(data) == without_rows(ours.grade(data))
    assert theirs.score_interval(0.8, None) == ours.score_interval(0.8, None)
    assert theirs.disclosure.grader.startswith("mlebench ")
    with pytest.raises(ConfigError, match="holdout"):
        prepare_task(str(definition), raw=tmp_path / "data", reward="holdout", folder=tmp_path / "held")


@needs_mlebench
def test_unknown_competition_and_unknown_direction(tmp_path):
    with pytest.raises(ConfigError, match=r"'spaceship-titan'.*'spaceship-titanic'"):
        prepare_task("mlebench:spaceship-titan", raw=None, reward="grade", folder=tmp_path / "task")


class _Grader:
    """Replaces the package's grader: medals by its rule for fewer than 100 teams."""

    def rank_score(self, score, leaderboard):
        assert score is None
        scores = leaderboard["score"]
        return {
            "gold_threshold": scores[0],
            "silver_threshold": scores[1],
            "bronze_threshold": scores[3],
            "median_threshold": scores.median(),
        }

    def is_lower_better(self, leaderboard):
        return leaderboard["score"].iloc[0] < leaderboard["score"].iloc[-1]


class _Theirs:
    def __init__(self, leaderboard: Path):
        self.leaderboard, self.grader = leaderboard, _Grader()


def test_thresholds_come_only_from_a_real_leaderboard(tmp_path):
    path = tmp_path / "leaderboard.csv"
    thresholds, note, higher = mle_bench._leaderboard(_Theirs(path))
    assert (thresholds, higher) == ((), None)
    assert "has no leaderboard" in note
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:e071\nsize 125841\n")
    thresholds, note, higher = mle_bench._leaderboard(_Theirs(path))
    assert (thresholds, higher) == ((), None)
    assert "Git-LFS pointer" in note
    path.write_text("teamId,score\n" + "".join(f"{n},{0.1 * n:.1f}\n" for n in range(1, 10)))
    thresholds, note, higher = mle_bench._leaderboard(_Theirs(path))
    assert thresholds == tuple(Threshold(f"Kaggle {n}", s) for n, s in (("median", 0.5), ("bronze", 0.4), ("silver", 0.2), ("gold", 0.1)))
    assert higher is False
    assert "9 teams" in note
    path.write_text("nothing\n1\n")
    assert mle_bench._leaderboard(_Theirs(path))[0] == ()


class _Judged(_Theirs):
    """The part of the package's competition that `with_its_grader` uses."""

    def __init__(self, leaderboard: Path):
        super().__init__(leaderboard)
        self.grader.grade_fn = _judge


def _judge(submission, answers):
    return 0.5


def test_real_leaderboard_replaces_the_reports_thresholds(monkeypatch, tmp_path):
    """Without a leaderboard, the thresholds stay and name their source."""
    path = tmp_path / "leaderboard.csv"
    monkeypatch.setattr(mle_bench, "_theirs", lambda id: _Judged(path))
    ours = load_competition("spaceship-titanic", "")
    without = mle_bench.with_its_grader(ours)
    assert without.judge is _judge
    assert (without.thresholds, without.thresholds_note) == (ours.thresholds, ours.thresholds_note)
    assert without.thresholds_source == "from the report, not from a leaderboard on this machine"
    path.write_text("teamId,score\n" + "".join(f"{n},{0.1 * n:.1f}\n" for n in range(9, 0, -1)))
    real = mle_bench.with_its_grader(ours)
    assert real.thresholds_source == "from the leaderboard in the installed mlebench"
    assert [threshold.name for threshold in real.thresholds] == ["Kaggle median", "Kaggle bronze", "Kaggle silver", "Kaggle gold"]
    assert "9 teams" in real.thresholds_note


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlebench.registry", None)
    with pytest.raises(ConfigError, match=r"mlebench.*config\.task\.grader"):
        prepare_task("digits-parity", raw=None, reward="grade", grader="mlebench", folder=tmp_path / "task")
