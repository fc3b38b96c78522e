"""A run on a bundled problem beside a competition: kill -9 and resume, rerun.sh, and what best/ and the journal say of the packing."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import tiny_run
from phrase_model import PACKING_FOLLOWERS, PACKING_PHRASES, write_phrase_model
from tiny_run import finish, kill_after_first_step, results

from discover_jax.execution import values

pytestmark = pytest.mark.slow  # three runs

HERE = Path(__file__).parent
STEPS = 3


def start(root: Path, workdir: Path) -> subprocess.Popen:
    options = [
        f"--config.task.competition={HERE / 'remainders.py'}, circle-packing-26",
        "--config.groups=4",
        "--config.sampling.max_prompt_tokens=2048",  # bytes of the problem's seed program
    ]
    return tiny_run.start(root, workdir, STEPS, *options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundled")
    write_phrase_model(root / "model", phrases=PACKING_PHRASES, followers_of=PACKING_FOLLOWERS)
    return root


@pytest.fixture(scope="module")
def unbroken(root):
    return root / "unbroken", finish(start(root, root / "unbroken"))


def test_scores_are_sums_of_radii_and_rejections_say_why(unbroken):
    workdir, said = unbroken
    journal = [json.loads(line) for line in (workdir / "journal.jsonl").read_text().splitlines()]
    packings = [row for row in journal if row["task"] == "circle-packing-26"]
    assert len(packings) == sum(row["task"] == "remainders" for row in journal) == STEPS * 2 * 3
    assert {row["outcome"] for row in packings} >= {"ok", "invalid_submission"}
    for row in packings:
        if row["outcome"] == "ok":
            # 26 of the side^2 circles of a grid, each shrunk by a factor.
            (side,), (factor,) = ([line for line in row["code"].splitlines() if text in line] for text in ("side = ", "radii = "))
            side, factor = float(side.rpartition(" ")[2]), float(factor.rpartition(" ")[2])
            assert row["score"] == pytest.approx(26 * 0.5 / side * factor, rel=1e-14)
            assert "has the most room" in row["feedback"]
        elif row["outcome"] == "invalid_submission":
            assert any(reason in row["detail"] for reason in ("overlap", "leaves the square", "26"))
    bundle = workdir / "best" / "circle-packing-26"
    grade = json.loads((bundle / "grade.json").read_text())
    assert "AlphaEvolve 2.63586276 (arXiv 2506.13131)" in grade["leaderboard"]
    _, radii = json.loads((bundle / "returned.json").read_text())
    exact = sum(map(Fraction, values.decode((bundle / "returned.value").read_bytes())[1].tolist()))
    assert sum(map(Fraction, radii)) == exact
    assert 0 <= exact - Fraction(grade["score"]) < Fraction(1, 10**15)  # rounded down
    assert repr(grade["score"]) in said


def test_kill_9_and_resume_gives_the_same_results(root, unbroken):
    workdir = root / "killed"
    kill_after_first_step(start(root, workdir), workdir)
    finish(start(root, workdir))
    assert results(workdir) == results(unbroken[0])


def test_rerun_reproduces_the_score(unbroken):
    script = unbroken[0] / "best" / "circle-packing-26" / "rerun.sh"
    done = subprocess.run([script], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REPRODUCED" in done.stdout
    assert "the same bytes as in best/" in done.stdout
