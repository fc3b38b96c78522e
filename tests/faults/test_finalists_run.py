"""A whole run that chooses its best program by retests: the files tell how, resuming changes nothing, and a failure is refused early."""

import json
import re
from pathlib import Path

import phrase_config
import pytest
from phrase_model import write_phrase_model

from discover_jax import config as settings
from discover_jax import main
from discover_jax.exceptions import ConfigError
from discover_jax.execution import sandbox_spec
from discover_jax.runs.console import QuietConsole
from discover_jax.tasks import holdout


class _Telling(QuietConsole):
    def __init__(self):
        self.said: list[str] = []

    def note(self, text):
        self.said.append(text)

    def finish(self, lines):
        self.said += lines


def _run(folder: Path, model: Path, **changes) -> list[str]:
    config = phrase_config.get_config(str(model))
    config.train.steps = 2
    config.task.reward, config.task.holdout_fraction, config.task.selection_fraction = "holdout", 0.3, 0.2
    config.finalists.count, config.finalists.retests, config.finalists.every = 4, 2, 1
    config.update_from_flattened_dict(changes)
    console = _Telling()
    main.run(settings.validate(config), folder, console=console)
    return console.said


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())
    monkeypatch.setattr(holdout, "LEAST_ROWS", 3)


@pytest.mark.slow  # tests/archive/test_finalists.py and tests/tasks/test_retests.py test the parts
def test_the_best_program_is_the_winner_of_the_retests(tmp_path):
    write_phrase_model(tmp_path / "model")
    folder = tmp_path / "run"
    said = _run(folder, tmp_path / "model")
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    ((found,),) = [json.loads((folder / "finalists.json").read_text())]
    scored = sorted({row["code"]: row["reward"] for row in journal if row["score"] is not None}.values(), reverse=True)
    by_id = {row["id"]: row for row in journal}
    finalists = found["finalists"]
    assert sorted((by_id[row["id"]]["reward"] for row in finalists), reverse=True) == scored[:4]
    # One score on the 6 rows for selection, then the retests of 8 and 7 rows.
    assert [len(row["scores"]) for row in finalists] == sorted((len(row["scores"]) for row in finalists), reverse=True)
    assert finalists[0]["retested_rows"] == 6 + 15
    assert all(row["scores"][0] == by_id[row["id"]]["selection_score"] for row in finalists)
    assert found["chosen"] == finalists[0]["id"]
    assert found["runs"] == sum(len(row["scores"]) - 1 for row in finalists)
    grade = json.loads((folder / "best" / "grade.json").read_text())
    assert grade["id"] == found["chosen"]
    assert grade["retested"] == finalists[0]
    assert (folder / "best" / "solution.py").read_text().strip() == by_id[found["chosen"]]["code"].strip()
    assert any(re.search(r"^retested +\d\.\d{4}\b.*\b21 rows that gave no reward\b.*best of 4 finalists", line) for line in said)
    assert "served only for the choice" in json.loads((folder / "disclosure.json").read_text())["competitions"][0]["reward"]["text"]


@pytest.mark.slow
def test_a_finished_run_keeps_its_choice(tmp_path):
    write_phrase_model(tmp_path / "model")
    folder = tmp_path / "run"
    _run(folder, tmp_path / "model")
    before = {name: (folder / name).read_bytes() for name in ("finalists.json", "journal.jsonl", "best/grade.json")}
    _run(folder, tmp_path / "model")
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_retests_without_enough_rows_are_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.undo()
    write_phrase_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"config\.finalists\.retests = 2"):
        _run(tmp_path / "run", tmp_path / "model", **{"task.selection_fraction": 0.0})
    with pytest.raises(ConfigError, match=r"(?s)config\.task\.selection_fraction = 0\.2.*\b6\b.*\b30\b"):
        _run(tmp_path / "other", tmp_path / "model")
    assert not (tmp_path / "run" / "journal.jsonl").exists()
