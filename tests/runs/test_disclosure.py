"""What a run says of its scores: disclosure.json and the closing lines name the rows, their number, the interval, and weak isolation."""

import dataclasses
import io
import json

import numpy as np
import pandas as pd
import pytest

from discover_jax.exceptions import RunError
from discover_jax.runs.best import grade_of, write_best
from discover_jax.runs.disclosure import Isolation, read_isolation, write_disclosure
from discover_jax.runs.summary import Result, closing_lines, opening_lines
from discover_jax.runs.workdir import open_workdir
from discover_jax.tasks.interval import wilson_interval
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Execution, Grade, Outcome, RunKind, State, Verdict

BEST = State("0001-000-000", "seed", "code", value=0.9, score=0.9, stdout="", step=1, adapter_step=1)
BESIDE = {"disclosure": b"{}\n", "rerun": "#!/bin/sh\n"}
ROWS = [{"step": 0, "reward/mean": 0.5, "best/score": 0.8}, {"step": 1, "reward/mean": 0.6, "best/score": 0.9}]


@pytest.fixture
def workdir(tmp_path):
    with open_workdir(tmp_path / "run", {}, "train") as opened:
        yield opened


def disclose(workdir, task, isolation="bubblewrap 0.11", isolated=True):
    write_disclosure(workdir, [task], search={"learned": True}, isolation=Isolation(isolated, (isolation,)))
    return json.loads((workdir.path / "disclosure.json").read_text())


def closing(task, best, private_score, workdir, kind=RunKind.TRAIN):
    return closing_lines([Result(task, best, private_score)], ROWS, workdir=workdir, kind=kind)


def test_the_report_s_reward(workdir, tmp_path):
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    content = disclose(workdir, task)
    (of_task,) = content["competitions"]
    assert of_task["reward"]["rows"] == of_task["private_answers"]["rows"] == 1197
    assert of_task["reward"]["private_answers_reached_the_search"] is True
    assert of_task["grader"] == "native"
    assert of_task["leaderboard"]["thresholds"] == "unavailable"
    assert content["isolation"] == {"isolated": True, "lines": ["bubblewrap 0.11"]}
    low, high = wilson_interval(0.9, 1197)
    lines = "\n".join(closing(task, BEST, 0.9, workdir))
    assert f"0.8000 -> 0.9000   (+0.1000), 95% interval {low:.4f} to {high:.4f} (1,197 rows of the private answers)" in lines
    assert "optimised on the graded rows" in lines
    assert "leaderboard  unavailable" in lines
    assert "ISOLATION" not in lines


def test_cross_validation(workdir, tmp_path):
    task = prepare_task("digits-parity", raw=None, reward="holdout", holdout_folds=4, folder=tmp_path / "task")
    (of_task,) = disclose(workdir, task)["competitions"]
    assert of_task["reward"]["source"] == "holdout"
    assert (of_task["reward"]["rows"], of_task["reward"]["runs_of_each_program"]) == (600, 5)
    assert of_task["reward"]["private_answers_reached_the_search"] is False
    lines = "\n".join(closing(task, BEST, 0.85, workdir))
    assert "(600 training rows, each held out in one of 4 folds)" in lines
    low, high = wilson_interval(0.85, 1197)
    assert (
        f"its private accuracy  0.8500, 95% interval {low:.4f} to {high:.4f} (1,197 rows of the private answers); this chose nothing"
        in lines
    )
    assert "4-fold cross-validation over the public training table (600 rows)" in lines
    assert "its private accuracy  none; this" in "\n".join(closing(task, BEST, None, workdir))


def test_weaker_isolation_is_never_forgotten(workdir, tmp_path):
    """Neither by a run that has no score yet, nor when it is resumed elsewhere."""
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    disclose(workdir, task)
    assert read_isolation(workdir.path) == Isolation(True, ("bubblewrap 0.11",))
    disclose(workdir, task, "unsafe-subprocess: NO ISOLATION", isolated=False)
    content = disclose(workdir, task)
    assert content["isolation"] == {"isolated": False, "lines": ["bubblewrap 0.11", "unsafe-subprocess: NO ISOLATION"]}
    for best in (BEST, None):
        assert (
            "WEAKER ISOLATION: bubblewrap 0.11; then unsafe-subprocess: NO ISOLATION"
            in closing(task, best, None, workdir, kind=RunKind.SEARCH)[-1]
        )


@pytest.mark.parametrize(
    "text", ["", "{}", '{"isolation": {"isolated": "no", "lines": []}}', '{"isolation": {"isolated": true, "lines": [1]}}']
)
def test_an_altered_file_is_refused(workdir, tmp_path, text):
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    (workdir.path / "disclosure.json").write_text(text)
    with pytest.raises(RunError, match=r"disclosure\.json cannot be read"):
        disclose(workdir, task)


def test_how_memory_was_bounded_is_said_at_the_end_too(workdir, tmp_path):
    """As it was said at the beginning: `Executor.describe`'s line, whether a program has scored or not."""
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    line = "bubblewrap 0.11, under this user's uid; memory: best effort (4 GiB a process; no writable control group); 2 x 1 cores"
    disclose(workdir, task, line)
    for best in (BEST, None):
        assert closing(task, best, None, workdir)[-1] == f"programs ran in  {line}"


# ---------------------------------------------------------------------- scores that are no proportion


def predicted(task, noise) -> bytes:
    """A submission of noisy answers."""
    table = pd.read_csv(io.BytesIO(task.answers_as_submission()))
    rng = np.random.default_rng(0)
    table["malignant"] = np.clip(0.2 + 0.6 * table["malignant"] + noise * rng.normal(size=len(table)), 0.01, 0.99)
    return table.to_csv(index=False).encode()


def bundle(workdir, task, submission):
    """Writes best/ as a run does; the best state and its grade.json."""
    grade = task.combine([task.grade(submission)] * len(task.splits)) if len(task.splits) == 1 else None
    grade = grade or Grade(valid=True, reason="", score=0.2, private_score=task.grade(submission).private_score)
    best = State("0001-000-000", "seed", "code", value=-1.0, score=grade.score, stdout="", step=1, adapter_step=1)
    verdict = Verdict(Outcome.OK, grade, Execution(Outcome.OK, submission, "", "", 1.0))
    write_best(workdir.best_dir, lineage=[best], submission=submission, grade=grade_of(task, best, verdict, seed=0), **BESIDE)
    return best, json.loads((workdir.best_dir / "grade.json").read_text())


@pytest.mark.parametrize("reward", ["grade", "holdout"])
def test_log_loss_has_an_interval_wherever_it_is_shown(workdir, tmp_path, reward):
    task = prepare_task("breast-cancer", raw=None, reward=reward, folder=tmp_path / "task")
    disclose(workdir, task)
    best, grade = bundle(workdir, task, predicted(task, 0.1))
    for name in ("score", "private_score"):
        low, high = grade["interval_95" if name == "score" else "private_interval_95"]
        assert low < grade[name] < high
        assert high - low < 0.2
    assert grade["interval_95_method"].startswith("percentile bootstrap over rows, 1,000 resamples")
    assert grade["interval_95"] != grade["private_interval_95"] or reward == "grade"
    rows = {"grade": "329 rows of the private answers", "holdout": "48 training rows held out"}[reward]
    assert (grade["scored_on"], grade["rows"]) == (rows, 329 if reward == "grade" else 48)
    low, high = grade["interval_95"]
    expected = f"{best.score:.4f}{{}}, 95% interval {low:.4f} to {high:.4f} ({rows})"
    first = f"   ({best.score - 0.8:+.4f})"
    assert expected.format(first) in "\n".join(closing(task, best, grade["private_score"], workdir))
    assert f"best     log loss {expected.format('')}" in opening_lines([Result(task, best, None)], workdir)
    low, high = grade["private_interval_95"]
    said = f"its private log loss  {grade['private_score']:.4f}, 95% interval {low:.4f} to {high:.4f} (329 rows of the private answers)"
    assert (said in "\n".join(closing(task, best, grade["private_score"], workdir))) == (reward == "holdout")


def test_where_there_is_no_interval_the_reason_is_said(workdir, tmp_path):
    """Cross-validation keeps one of a program's submissions; a best/ may be another program's, or none."""
    folded = prepare_task("breast-cancer", raw=None, reward="holdout", holdout_folds=3, folder=tmp_path / "folded")
    disclose(workdir, folded)
    best, grade = bundle(workdir, folded, predicted(folded, 0.1))
    assert grade["interval_95"] is None
    assert "no interval: log loss is no share of rows, so its interval needs the predictions of all 3 folds" in grade["interval_95_method"]
    lines = "\n".join(closing(folded, best, grade["private_score"], workdir))
    assert grade["interval_95_method"] in lines
    assert "(240 training rows, each held out in one of 3 folds)" in lines
    assert grade["private_interval_95"] is not None

    whole = prepare_task("breast-cancer", raw=None, reward="grade", folder=tmp_path / "whole")
    another = dataclasses.replace(best, id="0009-000-000")
    lines = "\n".join(closing(whole, another, None, workdir))
    assert "no interval: the program's submission is not at hand" in lines
    assert f"best program 0009-000-000 of the journal, which {workdir.best_dir} does not hold" in lines
    assert "has another score" in "\n".join(closing(whole, dataclasses.replace(best, score=0.1234), None, workdir))


def test_before_the_first_score_only_the_rows_are_told(workdir, tmp_path):
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    (line,) = opening_lines([Result(task, None, None)], workdir)
    assert line == f"reward   {task.disclosure.text}"
    assert "private answers (1,197 rows)" in line
