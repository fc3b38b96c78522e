"""A run on a competition and a problem with a seed program: its files, prompts and report, and kill -9 and resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny_run
from phrase_model import write_phrase_model
from remainders_problem import ROWS, SEED_PROGRAM
from tiny_run import finish, kill_after_first_step

from discover_jax.execution import values

pytestmark = pytest.mark.slow  # whole runs; tests/runs/test_reuse_output.py runs a problem by default
HERE = Path(__file__).parent
# The problem has another number of rows than the competition.
RETURNED = f"frame if len(frame) != {ROWS} else frame['y'].tolist()"
STEPS = 2


def start(root: Path, workdir: Path) -> subprocess.Popen:
    options = [
        f"--config.task.competition={HERE / 'remainders.py'}, {HERE / 'remainders_problem.py'}",
        "--config.sampling.max_prompt_tokens=512",
    ]
    return tiny_run.start(root, workdir, STEPS, *options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("problems")
    write_phrase_model(root / "model", RETURNED)
    return root


@pytest.fixture(scope="module")
def unbroken(root):
    workdir = root / "unbroken"
    return workdir, finish(start(root, workdir))


def rows_of(workdir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_the_run_folder_tells_of_problem_and_competition(unbroken):
    workdir, said = unbroken
    journal = rows_of(workdir, "journal.jsonl")
    labels, remainders = ([row for row in journal if row["task"] == id] for id in ("labels", "remainders"))
    assert len(labels) == len(remainders) == STEPS * 3
    valid = [row for row in labels if row["outcome"] == "ok"]
    for row in valid:
        assert row["score"] == 1 - row["metrics"]["wrong"] / ROWS / 3  # all digits
        assert row["feedback"] == f"{row['metrics']['wrong']:.0f} labels are wrong"
    assert not any({"feedback", "metrics"} & row.keys() for row in remainders)
    best = max(valid, key=lambda row: row["reward"])
    bundle = workdir / "best" / "labels"
    grade = json.loads((bundle / "grade.json").read_text())
    assert (grade["id"], grade["score"], grade["leaderboard"]) == (best["id"], best["score"], "all right 1 (the rule in this file)")
    returned = json.loads((bundle / "returned.json").read_text())
    assert values.decode((bundle / "returned.value").read_bytes()) == returned
    assert sum(label != (row % 7 < 3) for row, label in enumerate(returned)) == best["metrics"]["wrong"]
    assert (workdir / "best" / "remainders" / "submission.csv").is_file()
    assert repr(best["score"]) in said
    disclosed = {each["id"]: each for each in json.loads((workdir / "disclosure.json").read_text())["competitions"]}
    assert disclosed["labels"]["reward"]["source"] == "evaluate"


def test_the_first_groups_improve_the_seed_program(unbroken):
    workdir, _ = unbroken
    shown = pd.read_parquet(workdir / "rollouts" / "step-000000.parquet")
    first = shown[shown["task"] == "labels"]["prompt"].dropna()
    assert len(first) == 1
    assert all(SEED_PROGRAM in prompt and "improve run()" in prompt for prompt in first)
    assert all("write run()" in prompt for prompt in shown[shown["task"] == "remainders"]["prompt"].dropna())


def test_kill_9_and_resume_gives_the_same_journal(root, unbroken):
    workdir = root / "killed"
    kill_after_first_step(start(root, workdir), workdir)
    finish(start(root, workdir))
    for name in ("journal.jsonl", "best/labels/returned.value", "best/labels/grade.json"):
        assert (workdir / name).read_bytes() == (unbroken[0] / name).read_bytes()


def test_rerun_reproduces_the_score(unbroken):
    script = unbroken[0] / "best" / "labels" / "rerun.sh"
    done = subprocess.run([script], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REPRODUCED" in done.stdout
    assert "the same bytes as in best/" in done.stdout
