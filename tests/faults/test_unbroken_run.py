"""An uninterrupted run of the phrase model: its files, a second start, and mistakes. tests/test_main.py uses the apprentice."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from phrase_config import get_config
from tiny_run import STEPS, unbroken

from discover_jax import main
from discover_jax.config import validate
from discover_jax.exceptions import DataError, DiscoverError
from discover_jax.runs.console import QuietConsole
from discover_jax.tasks.prepare import prepare_task

GROUPS, SIZE = 2, 3


@pytest.fixture(scope="module")
def workdir(root) -> Path:
    return unbroken(root)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_leaves_the_files_of_the_documentation(workdir):
    metrics = rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS))
    required = {"reward/mean", "reward/max", "best/score", "rollouts/valid_frac", "groups/constant_frac", "logprob_gap/mean"}
    required |= {"time/sample_s", "time/execute_s", "time/update_s"}
    assert all(required <= row.keys() for row in metrics)
    assert all(row["logprob_gap/mean"] < 1e-5 for row in metrics)  # one model samples and trains
    journal = rows(workdir / "journal.jsonl")
    assert len(journal) == STEPS * GROUPS * SIZE
    best = max((row for row in journal if row["score"] is not None), key=lambda row: row["score"])
    grade = json.loads((workdir / "best" / "grade.json").read_text())
    assert grade["score"] == best["score"] == metrics[-1]["best/score"]
    assert (workdir / "best" / "solution.py").read_text().rstrip() == best["code"].rstrip()
    assert (workdir / "best" / "submission.csv").read_text().startswith("id,y")
    rollouts = pd.read_parquet(workdir / "rollouts").sort_values(["step", "group", "index"])
    assert list(rollouts["id"]) == [row["id"] for row in journal]
    assert list(rollouts["program"].dropna()) == [row["code"] for row in journal if row["code"] is not None]
    assert (rollouts["logprob_sum"] < 0).all()
    assert list(rollouts["prompt"].notna()) == [True, False, False] * GROUPS * STEPS
    (events,) = (workdir / "tensorboard").iterdir()
    assert all(events.read_bytes().count(name.encode()) == STEPS for name in required - {"reward/max"} | {"outcome/ok"})
    assert not (workdir / "wandb_id").exists()
    disclosure = json.loads((workdir / "disclosure.json").read_text())
    assert disclosure["competitions"][0]["reward"]["rows"] == grade["rows"] == 70
    assert disclosure["isolation"]["isolated"] is True
    assert disclosure["search"]["learned"] is True
    assert (workdir / "report.html").stat().st_size > 10_000


def test_best_grade_matches_the_tasks_grade(workdir):
    task = prepare_task(str(Path(__file__).with_name("remainders.py")), raw=None, reward="grade", folder=workdir / "task")
    grade = json.loads((workdir / "best" / "grade.json").read_text())
    assert task.grade((workdir / "best" / "submission.csv").read_bytes()).score == grade["score"]


def test_finished_run_does_nothing_when_it_is_started_again(root, workdir, in_this_process, capsys):
    before = (workdir / "journal.jsonl").read_bytes()
    main.run(validate(get_config(str(root / "model"))), workdir)
    said = capsys.readouterr().out
    assert re.search(rf"\bresume[sd]\b.*\bstep {STEPS}\b", said)
    assert str(workdir / "best") in said
    assert "\x1b" not in said  # no terminal: plain lines
    assert (workdir / "journal.jsonl").read_bytes() == before


def test_mistakes_are_one_clear_error_and_damage_nothing(root, workdir, tmp_path):
    """tests/test_cli.py tests that the command prints such an error and ends with code 2."""
    before = (workdir / "journal.jsonl").read_bytes()
    config = get_config(str(root / "model"))
    config.seed = 5
    with pytest.raises(DiscoverError, match=r"(?s)\bseed\b.*\b5\b"):
        main.run(validate(config), workdir, console=QuietConsole())
    assert (workdir / "journal.jsonl").read_bytes() == before
    config = get_config(str(root / "model"))
    config.task.raw = "/nowhere/train.csv"
    with pytest.raises(DataError, match=r"/nowhere/train\.csv"):
        main.run(validate(config), tmp_path / "run", console=QuietConsole())
    assert not (tmp_path / "run" / "journal.jsonl").exists()
