"""A run whose programs read what their parents returned: kill -9 and resume, rerun.sh, and a value that is missing on resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from growing_problem import RETURNED, ROWS
from phrase_model import write_phrase_model
from tiny_run import finish, kill_after_first_step

pytestmark = pytest.mark.slow  # three runs

HERE = Path(__file__).parent
STEPS = 3


def start(root: Path, workdir: Path, steps: int = STEPS) -> subprocess.Popen:
    options = [f"--config.task.competition={HERE / 'growing_problem.py'}", "--config.sampling.max_prompt_tokens=1024"]
    return tiny_run.start(root, workdir, steps, *options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("reuse")
    write_phrase_model(root / "model", RETURNED)
    return root


@pytest.fixture(scope="module")
def unbroken(root):
    finish(start(root, root / "unbroken"))
    return root / "unbroken"


def test_scores_climb_and_the_values_are_stored(unbroken):
    journal = [json.loads(line) for line in (unbroken / "journal.jsonl").read_text().splitlines()]
    best = [max(row["score"] for row in journal if row["step"] == step and row["score"] is not None) for step in range(STEPS)]
    assert [int(score) for score in best] == [1 + ROWS, 1 + 2 * ROWS, 1 + 3 * ROWS]
    stored = {path.stem for path in (unbroken / "outputs").iterdir()}
    outputs = {row["output"] for row in journal if row["outcome"] == "ok"}
    assert len(stored & outputs) >= STEPS
    assert len(stored - outputs) == 1  # of the seed program


def test_kill_9_and_resume_gives_the_same_journal(root, unbroken):
    workdir = root / "killed"
    kill_after_first_step(start(root, workdir), workdir)
    finish(start(root, workdir))
    for name in ("journal.jsonl", "best/returned.value", "best/parent_output.value", "best/grade.json"):
        assert (workdir / name).read_bytes() == (unbroken / name).read_bytes()


def test_rerun_reproduces_the_score_of_a_program_that_read_a_value(unbroken):
    script = unbroken / "best" / "rerun.sh"
    done = subprocess.run([script], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bytes as in best/" in done.stdout


def test_a_missing_value_stops_a_resumed_run(root, unbroken):
    grade = json.loads((unbroken / "best" / "grade.json").read_text())
    row = next(json.loads(line) for line in (unbroken / "journal.jsonl").read_text().splitlines() if f'"{grade["id"]}"' in line)
    (unbroken / "outputs" / f"{row['output']}.value").unlink()
    said, _ = (process := start(root, unbroken)).communicate(timeout=300)
    assert process.returncode != 0
    assert row["output"] in said
    assert "Traceback" not in said
