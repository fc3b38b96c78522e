"""The guides show the files in docs/examples, which can be prepared, graded and checked."""

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from discover_jax import doctor
from discover_jax.config import validate
from discover_jax.exceptions import DataError
from discover_jax.execution import sandbox_spec
from discover_jax.tasks.prepare import prepare_task

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "my_table.py"
PROBLEM = ROOT / "docs" / "examples" / "my_problem.py"


@pytest.mark.parametrize(("page", "example"), [("own_competition.md", EXAMPLE), ("own_problem.md", PROBLEM)])
def test_page_shows_the_file(page, example):
    assert f"```python\n{example.read_text()}```" in (ROOT / "docs" / page).read_text()
    assert len(example.read_text().splitlines()) <= 31  # the pages promise short files


@pytest.mark.parametrize("reward", ["grade", "holdout"])
def test_table_is_split_and_graded(tmp_path, reward):
    months = np.random.default_rng(0).integers(1, 60, 200)
    table = pd.DataFrame({"id": [f"c{number}" for number in range(200)], "left": months < 20, "months": months})
    table.to_csv(tmp_path / "customers.csv", index=False)
    task = prepare_task(str(EXAMPLE), raw=str(tmp_path / "customers.csv"), reward=reward, folder=tmp_path / "task")
    shown = pd.read_csv(task.public_dir / "test.csv")
    assert list(shown.columns) == ["id", "months"]
    assert len(shown) == {"grade": 40, "holdout": 40 + 32}[reward]  # a fifth, then a fifth of the rest
    for wrong in (0, 8):
        right = shown.assign(left=(shown["months"] < 20) ^ (shown.index < wrong))[["id", "left"]]
        grade = task.grade(right.to_csv(index=False).encode())
        assert (grade.score == 1.0) == (wrong == 0)


def test_missing_raw_data_is_an_error_that_names_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"config\.task\.raw\b"):
        prepare_task(str(EXAMPLE), raw="", reward="grade", folder=tmp_path / "task")


def test_doctor_checks_the_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.task.competition = str(PROBLEM)
    found = {finding.name: finding for finding in doctor.examine(validate(config), tmp_path / "run")}
    assert all(finding.ok for finding in found.values()), found
    points = np.random.RandomState(0).rand(13, 2)
    distances = [np.hypot(*(a - b)) for number, a in enumerate(points) for b in points[:number]]
    assert f"the seed program scores {min(distances)}" in found["sandbox"].text
    assert "cannot solve far-apart" in found["prompt"].text
