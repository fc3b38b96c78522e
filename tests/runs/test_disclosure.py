"""What a run says of its scores: disclosure.json and the closing lines name the rows, their number, the interval, and weak isolation."""

import json

import pytest

from discover_jax.exceptions import RunError
from discover_jax.runs.disclosure import weaker_isolation, write_disclosure
from discover_jax.runs.summary import Result, closing_lines
from discover_jax.runs.workdir import open_workdir
from discover_jax.tasks.interval import wilson_interval
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import State

BEST = State("0001-000-000", "seed", "code", value=0.9, score=0.9, stdout="", step=1, adapter_step=1)
ROWS = [{"step": 0, "reward/mean": 0.5, "best/score": 0.8}, {"step": 1, "reward/mean": 0.6, "best/score": 0.9}]


@pytest.fixture
def workdir(tmp_path):
    with open_workdir(tmp_path / "run", {}, "train") as opened:
        yield opened


def disclose(workdir, task, isolation="bubblewrap 0.11", isolated=True):
    write_disclosure(workdir, [task], search={"learned": True}, isolation=isolation, isolated=isolated)
    return json.loads((workdir.path / "disclosure.json").read_text())


def closing(task, best, private_score, workdir, learn=True):
    return closing_lines([Result(task, best, private_score)], ROWS, workdir=workdir, learn=learn)


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
    lines = "\n".join(closing(task, BEST, 0.9, workdir, learn=True))
    assert f"0.8000 -> 0.9000   (+0.1000), 95% interval {low:.4f} to {high:.4f} (1,197 rows)" in lines
    assert "optimised on the graded rows" in lines
    assert "leaderboard  unavailable" in lines
    assert "ISOLATION" not in lines


def test_cross_validation(workdir, tmp_path):
    task = prepare_task("digits-parity", raw=None, reward="holdout", holdout_folds=4, folder=tmp_path / "task")
    (of_task,) = disclose(workdir, task)["competitions"]
    assert of_task["reward"]["source"] == "holdout"
    assert (of_task["reward"]["rows"], of_task["reward"]["runs_of_each_program"]) == (600, 5)
    assert of_task["reward"]["private_answers_reached_the_search"] is False
    lines = "\n".join(closing(task, BEST, 0.85, workdir, learn=True))
    assert "(600 rows)" in lines
    low, high = wilson_interval(0.85, 1197)
    assert f"its private accuracy  0.8500, 95% interval {low:.4f} to {high:.4f} (1,197 rows); this chose nothing" in lines
    assert "4-fold cross-validation over the public training table (600 rows)" in lines
    assert "its private accuracy  none; this" in "\n".join(closing(task, BEST, None, workdir, learn=True))


def test_weaker_isolation_is_never_forgotten(workdir, tmp_path):
    """Neither by a run that has no score yet, nor when it is resumed elsewhere."""
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    disclose(workdir, task)
    assert weaker_isolation(workdir) == ""
    disclose(workdir, task, "unsafe-subprocess: NO ISOLATION", isolated=False)
    content = disclose(workdir, task)
    assert content["isolation"] == {"isolated": False, "lines": ["bubblewrap 0.11", "unsafe-subprocess: NO ISOLATION"]}
    for best in (BEST, None):
        assert (
            "WEAKER ISOLATION: bubblewrap 0.11; then unsafe-subprocess: NO ISOLATION" in closing(task, best, None, workdir, learn=False)[-1]
        )


@pytest.mark.parametrize(
    "text", ["", "{}", '{"isolation": {"isolated": "no", "lines": []}}', '{"isolation": {"isolated": true, "lines": [1]}}']
)
def test_an_altered_file_is_refused(workdir, tmp_path, text):
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    (workdir.path / "disclosure.json").write_text(text)
    with pytest.raises(RunError, match=r"disclosure\.json cannot be read"):
        disclose(workdir, task)
