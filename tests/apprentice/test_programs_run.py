"""Programs of the corpus run on a real competition, in its folder, and return a valid submission."""

import random
import types
import warnings

import numpy as np
import pytest

from discover_jax.apprentice import programs
from discover_jax.apprentice.grammar import MODELS
from discover_jax.tasks.prepare import prepare_task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path_factory.mktemp("task") / "digits-parity")


def _submission(code: str, folder, monkeypatch) -> bytes:
    """Runs a program like the harness: in a folder with data/, with seeds, and with the submission as CSV."""
    monkeypatch.chdir(folder)
    random.seed(0)
    np.random.seed(0)
    module = types.ModuleType("program")
    # sklearn warns if a program does not converge or divides by the spread of a constant column.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "program.py", "exec"), module.__dict__)
        return module.run().to_csv(index=False).encode()


@pytest.fixture
def scratch(task, tmp_path):
    (tmp_path / "data").symlink_to(task.public_dir)
    return tmp_path


def _bare(model: str, seed: int) -> programs.Program:
    """A random program whose only model is the given one."""
    rng = random.Random(seed)
    while True:
        program = programs.sample(rng)
        if len(program.models) == 1 and program.models[0].choice.option == model:
            return program


@pytest.mark.parametrize("model", list(MODELS))
def test_each_model_runs_and_is_graded(model, task, scratch, monkeypatch):
    code = programs.render(_bare(model, seed=17))
    first = _submission(code, scratch, monkeypatch)
    grade = task.grade(first)
    assert grade.valid, grade.reason
    assert 0.3 < grade.score <= 1.0
    if model in ("forest", "network", "xgboost"):
        assert _submission(code, scratch, monkeypatch) == first


def test_scores_vary(task, scratch, monkeypatch):
    rng = random.Random(23)
    scores = [task.grade(_submission(programs.render(programs.sample(rng)), scratch, monkeypatch)).score for _ in range(6)]
    assert None not in scores
    assert max(scores) - min(scores) > 0.05
    assert np.mean(scores) < max(scores) - 0.02
