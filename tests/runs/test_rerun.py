"""rerun.sh, the shell script of a run: it reproduces the score in grade.json, or reports that it does not."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from discover_jax.config import default_config
from discover_jax.runs.best import grade_of, write_best
from discover_jax.runs.disclosure import Isolation, write_disclosure
from discover_jax.runs.rerun import rerun_script
from discover_jax.runs.workdir import open_workdir
from discover_jax.tasks.prepare import prepare_task
from discover_jax.typed_settings import rerun_settings
from discover_jax.types import Execution, Outcome, State, Verdict

CODE = """import pandas as pd
from sklearn.neighbors import KNeighborsClassifier

def run():
    train, test = pd.read_csv("data/train.csv"), pd.read_csv("data/test.csv")
    names = [name for name in test.columns if name != "id"]
    model = KNeighborsClassifier(3).fit(train[names], train["even"])
    return pd.DataFrame({"id": test["id"], "even": model.predict(test[names])})
"""


def run_here(public: Path) -> bytes:
    """The submission of CODE, computed in this process with only pandas and scikit-learn."""
    names: dict = {}
    exec(CODE.replace("data/", f"{public}/"), names)
    return names["run"]().to_csv(index=False).encode()


@pytest.fixture(scope="module", params=["grade", pytest.param("holdout", marks=pytest.mark.slow)])
def bundle(request, tmp_path_factory) -> Path:
    """best/ of a run whose best program is CODE."""
    root = tmp_path_factory.mktemp("a run's folder")
    config = default_config()
    config.task.competition, config.task.reward, config.seed = "digits-parity", request.param, 3
    config.execution.cores, config.execution.seconds = 1, 60.0
    with open_workdir(root / "run", {}, "train") as workdir:
        task = prepare_task("digits-parity", raw=None, reward=request.param, folder=workdir.task_dir, seed=3)
        write_disclosure(workdir, [task], search={}, isolation=Isolation(True, ("bubblewrap",)))
        submission = run_here(task.public_dir)
        grade = task.grade(submission)
        verdict = Verdict(Outcome.OK, grade, Execution(Outcome.OK, submission, "", "", 1.0))
        best = State("0000-000-000", "seed", CODE, value=grade.score, score=grade.score, stdout="", step=0, adapter_step=0, task=task.id)
        write_best(
            workdir.best_dir,
            lineage=[best],
            submission=submission,
            grade=grade_of(task, best, verdict, 3),
            disclosure=(workdir.path / "disclosure.json").read_bytes(),
            rerun=rerun_script(rerun_settings(config, 0, stratified=request.param == "holdout")),
        )
    # The bundle must be self-contained and work in any folder, also with a space and a quote in its path.
    return (root / "run" / "best").rename(root / "it's the best")


def rerun(bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(bundle / "rerun.sh"), *options], cwd="/", capture_output=True, text=True, check=False, timeout=300)


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The lines of the report before the last, by their first word."""
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:-1])


def test_the_score_is_reproduced(bundle):
    done = rerun(bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    score = json.loads((bundle / "grade.json").read_text())["score"]
    assert score > 0.9
    report = report_of(done)
    assert report["score"].count(str(score)) == 2  # the new score and that of grade.json
    assert "the same bytes" in report["submission"]
    assert report["data"] == "the run's"
    assert "bubblewrap" in report["ran"]
    assert done.stdout.splitlines()[-1] == "REPRODUCED"


@pytest.mark.slow
def test_different_score_and_data_are_reported(bundle, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(bundle), str(copy)], check=True)
    (copy / "solution.py").write_text(CODE.replace("KNeighborsClassifier(3)", "KNeighborsClassifier(299)"))
    done = rerun(copy, "--reward=holdout", "--holdout_fraction=0.5")
    assert done.returncode == 1, done.stdout + done.stderr
    report = report_of(done)
    assert "other bytes" in report["submission"]
    assert report["data"].startswith("NOT the run's")
    assert done.stdout.splitlines()[-1] == "NOT REPRODUCED"


@pytest.mark.slow
def test_failing_program_is_reported(bundle, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(bundle), str(copy)], check=True)
    (copy / "solution.py").write_text("def run():\n    return 1 / 0\n")
    done = rerun(copy)
    assert done.returncode == 1
    assert re.match(r"no score +exception: ", done.stdout)
    assert "ZeroDivisionError" in done.stdout


def test_mistakes(bundle, tmp_path):
    done = rerun(bundle, f"--bundle={tmp_path}")
    assert done.returncode == 2
    assert f"{tmp_path} is not a complete bundle" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_names_what_a_score_depends_on(tmp_path):
    """Paths are quoted for the shell. With several competitions, only this one's data is named."""
    config = default_config()
    raw = tmp_path / "it's here" / "train.csv"
    config.task.competition, config.task.raw = "digits-parity, spaceship-titanic", f",{raw}"
    config.execution.backend, config.execution.allow_weaker = "unsafe-subprocess", True
    words = shlex.split(rerun_script(rerun_settings(config, 1, stratified=False)), comments=True)
    assert "--competition=spaceship-titanic" in words
    assert f"--raw={raw}" in words
    assert "--backend=unsafe-subprocess" in words
    assert "--allow_weaker" in words
    assert "--stratified" not in words
    words = shlex.split(rerun_script(rerun_settings(config, 0, stratified=False)), comments=True)
    assert not any("raw" in word for word in words)
    config.execution.backend, config.execution.allow_weaker, config.task.reward = "ray", False, "holdout"
    words = shlex.split(rerun_script(rerun_settings(config, 0, stratified=True)), comments=True)
    assert "--stratified" in words
    assert "--backend=bubblewrap" in words  # on this machine, even if it ran on a cluster
