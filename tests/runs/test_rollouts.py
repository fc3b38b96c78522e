"""rollouts/: readable by pandas, replaced atomically, never incomplete."""

import dataclasses
import re
from pathlib import Path

import fastparquet
import numpy as np
import pandas as pd
import pytest

from discover_jax import files
from discover_jax.archive.journal import Journal
from discover_jax.exceptions import ConfigError, RunError
from discover_jax.runs import rollouts
from discover_jax.runs.attempts import rollout_rows
from discover_jax.runs.rollouts import COLUMNS, write_rollouts
from discover_jax.types import Attempt, Execution, Grade, Outcome, Prompt, Rollout, StopReason, Verdict

ROW = {
    "id": "0007-001-002",
    "parent_id": "seed",
    "prompt_id": "0007-001",
    "task": "boats",
    "step": 7,
    "group": 1,
    "index": 2,
    "prompt": "write run()",
    "reply": "ä\n\x00",
    "program": "x = 1",
    "prompt_tokens": 3,
    "tokens": 26_000,
    "stop": "max_tokens",
    "temperature": 1.0,
    "logprob_sum": -1234.5678901234567,
    "outcome": "ok",
    "score": 0.1 + 0.2,
    "reward": -0.5,
    "advantage": 1e-300,
    "seconds": 2.5,
    "cached": True,
}
FAILED = ROW | {"prompt": None, "program": None, "score": None, "advantage": None, "seconds": None, "cached": False}


def test_rows_round_trip(tmp_path):
    path = write_rollouts(tmp_path, 7, [ROW, FAILED])
    assert path.name == "step-000007.parquet"
    table = pd.read_parquet(path)
    assert list(table.columns) == list(COLUMNS)
    first, second = table.to_dict("records")
    assert first == ROW
    assert [name for name, value in second.items() if pd.isna(value)] == ["prompt", "program", "score", "advantage", "seconds"]
    assert {name: value for name, value in second.items() if not pd.isna(value)} == {k: v for k, v in FAILED.items() if v is not None}
    assert list(pd.read_parquet(path, columns=["tokens", "score"]).columns) == ["tokens", "score"]


def test_text_that_utf8_cannot_encode_is_escaped(tmp_path):
    (text,) = pd.read_parquet(write_rollouts(tmp_path, 0, [ROW | {"reply": "ä\ud800€"}]))["reply"]
    assert text == "ä\\ud800€"


def test_repeated_step_writes_the_same_bytes(tmp_path):
    path = write_rollouts(tmp_path, 7, [ROW])
    before = path.read_bytes()
    write_rollouts(tmp_path, 7, [FAILED] * 3)
    write_rollouts(tmp_path, 7, [ROW])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_many_rows_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "_ROWS_AT_ONCE", 4)
    path = write_rollouts(tmp_path, 0, [(FAILED if n % 3 else ROW) | {"index": n} for n in range(10)])
    assert len(fastparquet.ParquetFile(path).row_groups) > 1
    table = pd.read_parquet(path)
    assert list(table["index"]) == list(range(10))
    assert list(table["prompt"].notna()) == [n % 3 == 0 for n in range(10)]


@pytest.mark.parametrize("row", [ROW | {"luck": 1}, {name: value for name, value in ROW.items() if name != "score"}])
def test_invalid_rows_are_refused(tmp_path, row):
    with pytest.raises(ConfigError, match=r"luck|score"):
        write_rollouts(tmp_path, 8, [ROW, row])
    assert not list(tmp_path.iterdir())


def test_disk_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_rollouts(tmp_path, 7, [ROW])
    before = path.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(RunError, match="No space left on device"):
        write_rollouts(tmp_path, 7, [FAILED])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


class Letters:
    def decode(self, ids):
        return "".join(chr(id) for id in ids)


_SHARED = {
    "task": "boats",
    "step": 3,
    "group": 0,
    "parent_id": "seed",
    "detail": "",
    "stdout": "",
    "private_score": None,
    "adapter_step": 0,
}
_OK = {"code": "x", "outcome": Outcome.OK, "score": 0.5, "reward": 0.5, "tokens": 2, "stop": StopReason.STOP_TOKEN}
_NO_PROGRAM = {"code": None, "outcome": Outcome.FORMAT_ERROR, "score": None, "reward": 0.0, "tokens": 1, "stop": StopReason.MAX_TOKENS}
ATTEMPTS = [Attempt(id=f"0003-000-00{index}", index=index, **_SHARED, **rest) for index, rest in enumerate((_OK, _NO_PROGRAM))]


def test_rows_of_a_step():
    """A row has everything about a rollout, with and without a program."""
    ids, logprobs = np.array([104, 105], np.int32), np.array([-1.5, -0.25], np.float32)
    prompt = np.arange(5, dtype=np.int32)
    written = {
        (0, 0): Rollout(0, 0, prompt, ids, logprobs, np.ones(2, bool), StopReason.STOP_TOKEN),
        (0, 1): Rollout(0, 1, prompt, ids[:1], logprobs[:1], np.ones(1, bool), StopReason.MAX_TOKENS, temperature=0.5),
    }
    verdicts = {(0, 0): Verdict(Outcome.OK, Grade(True, "", 0.5, None), Execution(Outcome.OK, b"", "", "", 2.5, cached=True))}
    first, second = rollout_rows(written, [Prompt(0, "seed", "do", prompt)], ATTEMPTS, {(0, 0): 1.25}, verdicts, Letters())
    assert first.keys() == second.keys() == COLUMNS.keys()
    texts, numbers = ("prompt_id", "prompt", "reply", "program", "stop", "outcome"), ("prompt_tokens", "tokens", "logprob_sum", "advantage")
    assert [first[name] for name in texts] == ["0003-000", "do", "hi", "x", "stop_token", "ok"]
    assert [second[name] for name in texts] == ["0003-000", None, "h", None, "max_tokens", "format_error"]
    assert [[row[name] for name in numbers] for row in (first, second)] == [[5, 2, -1.75, 1.25], [5, 1, -1.5, None]]
    assert [(row["seconds"], row["cached"]) for row in (first, second)] == [(2.5, True), (None, False)]


PAGE = (Path(__file__).parents[2] / "docs" / "run_folder.md").read_text()


def _documented(heading: str) -> list[str]:
    """The columns described in a section of the page."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [name for cell in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)]


def test_page_documents_every_column_field_and_outcome():
    both = _documented("Columns of rollouts and journal")
    assert sorted(both + _documented("rollouts/")) == sorted(COLUMNS)
    assert sorted(both + _documented("journal.jsonl")) == sorted(field.name for field in dataclasses.fields(Attempt))
    assert [o.value for o in Outcome if f'"{o.value}"' not in PAGE] == ["sandbox_error"]  # never written to the journal


def test_the_pages_examples_run(tmp_path, capsys):
    (tmp_path / "rollouts").mkdir()
    for step in (0, 1):
        prompt = {"step": step, "prompt_id": f"000{step}-001", "prompt": f"prompt of {step}"}
        write_rollouts(tmp_path / "rollouts", step, [ROW | prompt, FAILED | {"step": step, "index": 3}])
    (tmp_path / "rollouts" / ".step-000002.parquet.tmp").write_bytes(b"PAR1")  # left by a kill
    Journal(tmp_path / "journal.jsonl").append(ATTEMPTS)
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 2
    names = {}
    for example in examples:
        assert len(list(filter(None, example.splitlines()))) == 5
        exec(example.replace("runs/quickstart", str(tmp_path)), names)
    assert list(names["rollouts"]["prompt"]) == ["prompt of 0"] * 2 + ["prompt of 1"] * 2
    assert names["best"]["id"] == "0003-000-000"
    assert "0003-000-000\n0.5\nx\n" in capsys.readouterr().out
