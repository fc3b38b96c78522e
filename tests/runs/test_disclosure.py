"""disclosure.json and the closing lines report the rows of scores, the interval and weaker isolation."""

import dataclasses
import io
import json
import re

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


def test_grade_reward(workdir, tmp_path):
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
    assert re.search(rf"\b0\.8000\b.*\b0\.9000\b.*\+0\.1000\b.*\b95%.*\b{low:.4f}\b.*\b{high:.4f}\b.*\b1,197\b", lines)
    assert re.search(r"(?m)^.*leaderboard\b.*\bunavailable\b", lines)
    assert "unsafe-subprocess" not in lines


def test_cross_validation(workdir, tmp_path):
    task = prepare_task("digits-parity", raw=None, reward="holdout", holdout_folds=4, folder=tmp_path / "task")
    (of_task,) = disclose(workdir, task)["competitions"]
    assert of_task["reward"]["source"] == "holdout"
    assert (of_task["reward"]["rows"], of_task["reward"]["runs_of_each_program"]) == (600, 5)
    assert of_task["reward"]["private_answers_reached_the_search"] is False
    lines = "\n".join(closing(task, BEST, 0.85, workdir))
    assert re.search(r"\(600\b.*\b4\b", lines)  # rows and folds
    low, high = wilson_interval(0.85, 1197)
    assert re.search(rf"private accuracy\b.*\b0\.8500\b.*\b95%.*\b{low:.4f}\b.*\b{high:.4f}\b.*\b1,197\b", lines)
    assert "4-fold" in lines
    (private,) = [line for line in closing(task, BEST, None, workdir) if "private accuracy" in line]
    assert not re.search(r"\d\.\d", private)  # no score


def test_weaker_isolation_stays_recorded(workdir, tmp_path):
    """Also if the run has no score yet, and if it is resumed elsewhere."""
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    disclose(workdir, task)
    assert read_isolation(workdir.path) == Isolation(True, ("bubblewrap 0.11",))
    disclose(workdir, task, "unsafe-subprocess: NO ISOLATION", isolated=False)
    content = disclose(workdir, task)
    assert content["isolation"] == {"isolated": False, "lines": ["bubblewrap 0.11", "unsafe-subprocess: NO ISOLATION"]}
    for best in (BEST, None):
        assert re.search(
            r"bubblewrap 0\.11; .*unsafe-subprocess: NO ISOLATION", closing(task, best, None, workdir, kind=RunKind.SEARCH)[-1]
        )


@pytest.mark.parametrize(
    "text", ["", "{}", '{"isolation": {"isolated": "no", "lines": []}}', '{"isolation": {"isolated": true, "lines": [1]}}']
)
def test_altered_file_is_refused(workdir, tmp_path, text):
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    (workdir.path / "disclosure.json").write_text(text)
    with pytest.raises(RunError, match=r"disclosure\.json"):
        disclose(workdir, task)


def test_closing_lines_show_the_memory_limit(workdir, tmp_path):
    """The line of `Executor.describe`, as at the start, with and without a score."""
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    line = "bubblewrap 0.11, under this user's uid; memory: best effort (4 GiB a process; no writable control group); 2 x 1 cores"
    disclose(workdir, task, line)
    for best in (BEST, None):
        assert closing(task, best, None, workdir)[-1].endswith(f"  {line}")


# ---------------------------------------------------------------------- scores that are not proportions


def predicted(task, noise) -> bytes:
    """A submission of noisy answers."""
    table = pd.read_csv(io.BytesIO(task.answers_as_submission()))
    rng = np.random.default_rng(0)
    table["malignant"] = np.clip(0.2 + 0.6 * table["malignant"] + noise * rng.normal(size=len(table)), 0.01, 0.99)
    return table.to_csv(index=False).encode()


def bundle(workdir, task, submission):
    """Writes best/ as a run does. Returns the best state and its grade.json."""
    grade = task.combine([task.grade(submission)] * len(task.splits)) if len(task.splits) == 1 else None
    grade = grade or Grade(valid=True, reason="", score=0.2, private_score=task.grade(submission).private_score)
    best = State("0001-000-000", "seed", "code", value=-1.0, score=grade.score, stdout="", step=1, adapter_step=1)
    verdict = Verdict(Outcome.OK, grade, Execution(Outcome.OK, submission, "", "", 1.0))
    write_best(workdir.best_dir, lineage=[best], submission=submission, grade=grade_of(task, best, verdict, seed=0), **BESIDE)
    return best, json.loads((workdir.best_dir / "grade.json").read_text())


@pytest.mark.parametrize("reward", ["grade", "holdout"])
def test_log_loss_has_an_interval_everywhere(workdir, tmp_path, reward):
    task = prepare_task("breast-cancer", raw=None, reward=reward, folder=tmp_path / "task")
    disclose(workdir, task)
    best, grade = bundle(workdir, task, predicted(task, 0.1))
    for name in ("score", "private_score"):
        low, high = grade["interval_95" if name == "score" else "private_interval_95"]
        assert low < grade[name] < high
        assert high - low < 0.2
    assert grade["interval_95_method"].startswith("percentile bootstrap")
    assert "1,000" in grade["interval_95_method"]
    assert grade["interval_95"] != grade["private_interval_95"] or reward == "grade"
    rows = {"grade": 329, "holdout": 48}[reward]
    assert grade["rows"] == rows
    assert re.match(rf"{rows}\b", grade["scored_on"])
    low, high = grade["interval_95"]
    interval = rf"\b95%.*\b{low:.4f}\b.*\b{high:.4f}\b.*\b{re.escape(grade['scored_on'])}"
    first = re.escape(f"{best.score - 0.8:+.4f}")
    assert re.search(rf"\b{best.score:.4f}\b.*{first}\b.*{interval}", "\n".join(closing(task, best, grade["private_score"], workdir)))
    assert re.search(rf"\blog loss {best.score:.4f}\b.*{interval}", "\n".join(opening_lines([Result(task, best, None)], workdir)))
    low, high = grade["private_interval_95"]
    private = rf"private log loss\b.*\b{grade['private_score']:.4f}\b.*\b95%.*\b{low:.4f}\b.*\b{high:.4f}\b.*\b329\b"
    shown = re.search(private, "\n".join(closing(task, best, grade["private_score"], workdir)))
    assert (shown is not None) == (reward == "holdout")


def test_missing_interval_has_a_reason(workdir, tmp_path):
    """Cross-validation keeps only one of a program's submissions. best/ may be missing, or of another program."""
    folded = prepare_task("breast-cancer", raw=None, reward="holdout", holdout_folds=3, folder=tmp_path / "folded")
    disclose(workdir, folded)
    best, grade = bundle(workdir, folded, predicted(folded, 0.1))
    assert grade["interval_95"] is None
    assert re.search(r"\blog loss\b.*\b3 folds\b", grade["interval_95_method"])
    lines = "\n".join(closing(folded, best, grade["private_score"], workdir))
    assert grade["interval_95_method"] in lines
    assert re.search(r"\(240\b.*\b3\b", lines)
    assert grade["private_interval_95"] is not None

    whole = prepare_task("breast-cancer", raw=None, reward="grade", folder=tmp_path / "whole")
    another = dataclasses.replace(best, id="0009-000-000")
    lines = "\n".join(closing(whole, another, None, workdir))
    assert "95% interval" not in lines
    assert re.search(rf"\b0009-000-000\b.*{workdir.best_dir}\b", lines)
    assert closing(whole, dataclasses.replace(best, score=0.1234), None, workdir) != closing(whole, best, None, workdir)


def test_opening_lines_without_a_score_show_only_the_rows(workdir, tmp_path):
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    (line,) = opening_lines([Result(task, None, None)], workdir)
    assert line.endswith(task.disclosure.text)
    assert "1,197" in line


def test_lines_of_a_problem_show_the_seed_program_and_small_gains(workdir, tmp_path):
    task = prepare_task("circle-packing-26", raw=None, reward="grade", folder=tmp_path / "task")
    disclose(workdir, task)
    (_, seed) = opening_lines([Result(task, None, None, seed_score=2.369796095106739)], workdir)
    assert re.search(r"\bsum of radii 2\.369796095106739 of the seed program", seed)
    best = State("0001-000-000", "seed", "code", value=2.6359828, score=2.6359828, stdout="", step=1, adapter_step=1)
    rows = [row | {"best/score": 2.6359827} for row in ROWS]
    lines = closing_lines([Result(task, best, None, seed_score=2.369796095106739)], rows, workdir=workdir, kind=RunKind.TRAIN)
    assert any("seed program" in line and "2.369796095106739" in line for line in lines)
    assert any("2.6359827 -> 2.6359828   (+1e-07)" in line for line in lines)


def test_a_start_that_continued_another_run_and_failed_is_not_disclosed(tmp_path):
    """Its config was corrected before the first step, so the run began anew."""
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    shared = {"search": {}, "isolation": Isolation(True, ("bubblewrap 0.11",))}
    for resumed_from, disclosed in (({"run": "runs/a"}, {"run": "runs/a"}), (None, None), ({"run": "runs/b"}, {"run": "runs/b"})):
        with open_workdir(tmp_path / "run", {}, "train") as workdir:
            write_disclosure(workdir, [task], goes_on_from=resumed_from, **shared)
        assert json.loads((tmp_path / "run" / "disclosure.json").read_text())["goes_on_from"] == disclosed
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with open_workdir(tmp_path / "run", {}, "train") as workdir:
        write_disclosure(workdir, [task], **shared)
    assert json.loads((tmp_path / "run" / "disclosure.json").read_text())["goes_on_from"] == {"run": "runs/b"}, "it has steps"
